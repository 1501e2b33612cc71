import copy

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from stillroom.adapt import quantizers
from stillroom.catalogue import cards
from stillroom.catalogue.execute import execute
from stillroom.core import config as configs
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.core.store import Store
from stillroom.data.embedded import digits
from stillroom.data.load import load_images
from stillroom.recipes.compact import quantized_distillation as qd
from stillroom.vision.hub import load_classifier

SMALL = {"teacher_steps": 20, "steps": 30, "point_steps": 10, "student": "small:convnet-w4", "teacher": "small:convnet-w4", "labelled": 300}


def test_the_loss_is_the_papers():
    answer, logits, label = torch.randn(6, 4).double(), torch.randn(6, 4).double(), torch.randint(4, (6,))
    config = qd.Config(temperature=3.0, kd_weight=0.6)
    p, log_q = (answer / 3).softmax(1), (logits / 3).log_softmax(1)
    expected = 0.6 * 9 * (p * (p.log() - log_q)).sum(1) + 0.4 * F.cross_entropy(logits, label, reduction="none")
    torch.testing.assert_close(sum(qd.losses(config, logits, answer, label).values()), expected)
    # the reference's nn.KLDivLoss() averaged over samples and classes
    reference = qd.losses(qd.Config(temperature=3.0, kd_weight=1.0, kl_reduction="mean"), logits, answer, label)["kd"].mean()
    torch.testing.assert_close(reference, 9 * (p * (p.log() - log_q)).mean())
    assert set(qd.losses(config, logits, None, label)) == {"ce"}


def test_a_step_is_save_quantize_backward_restore_update(tmp_path):
    """Against the procedure written out: gradients at Q(w), update with momentum and decay on w, batch norm's buffers kept."""
    data = digits(0, labelled=64, transfer=0)
    config = qd.Config(steps=3, batch_size=64, kd_weight=0.0, bits=2, bucket=16, optimizer=Optimizer("sgd", 0.1, weight_decay=0.1))
    torch.manual_seed(0)
    net = load_classifier("small:convnet-w4", data=data)
    other = copy.deepcopy(net).train()
    with Run(tmp_path, plots=False) as run:
        trained = qd.train(run, config, data, None, net, config.bits)
    velocity = [torch.zeros_like(p) for p in other.parameters()]
    for step in range(3):
        rows = torch.from_numpy(np.random.default_rng([0, step]).permutation(64))
        saved = [p.detach().clone() for p in other.parameters()]
        for p in other.parameters():
            p.data = quantizers.uniform(p.detach(), 2, 16)
        loss = F.cross_entropy(other(data.train.images()[rows]), data.train.labels[rows])
        gradients = torch.autograd.grad(loss, list(other.parameters()))
        for p, w, g, v in zip(other.parameters(), saved, gradients, velocity):
            v.mul_(0.9).add_(g + 0.1 * w)
            p.data = w - 0.1 * v
    for (name, mine), theirs in zip(trained.state_dict().items(), other.state_dict().values()):
        torch.testing.assert_close(mine, theirs, msg=name, atol=1e-5, rtol=1e-4)


def test_learning_points_moves_no_weight_but_batch_norm_and_points(tmp_path):
    data = digits(0, labelled=64, transfer=0)
    config = qd.Config(quantize="points", point_steps=4, kd_weight=0.5)
    net = load_classifier("small:convnet-w4", data=data)
    before = copy.deepcopy(net)
    with Run(tmp_path, store=Store(tmp_path / "store"), plots=False) as run:
        coded, extra = qd.learn_points(run, config, data, None, net)
        points = list(run.roles["points"].parameters)
    assert set(extra) == {"gain"}
    changed = {name for name, b in before.named_buffers() if not torch.equal(b, net.get_buffer(name))}
    assert {name.rpartition(".")[2] for name in changed} == {"running_mean", "running_var", "num_batches_tracked"}
    for (name, p), levels in zip(before.named_parameters(), points):
        assert torch.equal(levels, levels.sort().values)
        scaled = quantizers.scale(p.detach(), config.bucket)
        assert torch.equal(coded[name].levels, levels)
        torch.testing.assert_close(net.get_parameter(name), quantizers.learned(scaled, levels.detach(), p))


def test_which_parameters_are_quantized():
    net = load_classifier("small:convnet-w4", data=digits())
    names = [name for name, _ in net.named_parameters()]
    assert qd.quantized(net, qd.Config()) == names
    assert qd.quantized(net, qd.Config(ends=False)) == names[1:-1]
    assert qd.quantized(net, qd.Config(vectors=False)) == [n for n in names if net.get_parameter(n).ndim > 1]


def test_gradient_norms_leave_the_net_alone():
    data = digits(0, labelled=64, transfer=0)
    net = load_classifier("small:convnet-w4", data=data).train()
    state = copy.deepcopy(net.state_dict())
    batch = data.train.take(torch.arange(32))
    norms = qd.gradient_norms(net, dict(net.named_parameters()), [batch, batch])
    assert all(torch.equal(a, b) for a, b in zip(state.values(), net.state_dict().values()))
    gradients = torch.autograd.grad(F.cross_entropy(net(batch.images), batch.labels), list(net.parameters()))
    torch.testing.assert_close(torch.tensor(norms), torch.stack([g.norm() for g in gradients]))


@pytest.mark.parametrize("arm", ["quantized distillation, 2 bits", "after, 4 bits", "points, dealt bits"])
def test_end_to_end(arm, tmp_path):
    config = configs.override(cards.config_of(qd, arm), SMALL)
    with Run(tmp_path / "run", store=Store(tmp_path / "cache"), plots=arm.startswith("quantized")) as run:
        result = execute("quantized-distillation", config, run, arm=arm)
    student = tmp_path / "run" / "student"
    size = (student / "packed.safetensors").stat().st_size
    assert result["metrics"]["file_bytes"] == size
    assert not (student / "model.safetensors").exists()
    data = load_images("digits", seed=0, labelled=300, transfer=False, noise=0.3)
    net = load_classifier(f"run:{tmp_path}/run", data=data)
    assert size < sum(p.numel() * 4 for p in net.parameters()) / 2
    assert qd.accuracy(net, data) == pytest.approx(result["metrics"]["accuracy"], abs=2e-3)
    levels = max(len(p.unique()) for p in net.parameters() if p.numel() <= config.bucket)
    assert levels <= (2**config.bits if not config.auto_bits else 64)
    if run.plots:
        assert (tmp_path / "run" / "samples" / "weights before and after.svg").exists()
        assert [row["name"] for row in run.rows] == ["teacher", "full precision", "student"]


def test_functional_call_updates_batch_norm_in_place():
    net = load_classifier("small:convnet-w4", data=digits()).train()
    before = copy.deepcopy(dict(net.named_buffers()))
    functional_call(net, {name: p * 1 for name, p in net.named_parameters()}, (torch.rand(8, 1, 8, 8),))
    assert any(not torch.equal(b, before[name]) for name, b in net.named_buffers())


@pytest.mark.parametrize("arm", ["quantized distillation, 2 bits", "points, 2 bits"])
def test_a_stopped_run_ends_where_an_uninterrupted_one_ends(arm, tmp_path, monkeypatch):
    config = configs.override(cards.config_of(qd, arm), SMALL | {"stochastic": True})

    def outcome(folder: str) -> dict[str, float]:
        with Run(tmp_path / folder, store=Store(tmp_path / f"cache-{folder}"), plots=False, save_seconds=0) as run:
            return qd.main(config, run, data=digits(0, labelled=128, transfer=0))

    expected, update, left = outcome("straight"), Run.update, [0]

    def stopping(self, *args, **parts):
        left[0] -= 1
        if left[0] == 0:
            raise InterruptedError
        return update(self, *args, **parts)

    monkeypatch.setattr(Run, "update", stopping)
    for left[0] in (25, 15, 5):
        with pytest.raises(InterruptedError):
            outcome("stopped")
    assert outcome("stopped") == expected
