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
from stillroom.core.engine import make
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.core.store import Store
from stillroom.data.batches import Batches
from stillroom.data.embedded import digits
from stillroom.data.load import load_images
from stillroom.nets.packed import Coded
from stillroom.recipes.compact import quantized_distillation as qd
from stillroom.testing import trace
from stillroom.vision.hub import load_classifier
from tests.recipes.common import assert_resumes

SMALL = {"teacher_steps": 20, "steps": 30, "point_steps": 6, "student": "small:convnet-w4", "teacher": "small:convnet-w4", "labelled": 300}


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


# -- the loops by trace ------------------------------------------------------------------------------------------------------------
QUICK = {"teacher": "small:convnet-w4", "student": "small:convnet-w4", "labelled": 60, "batch_size": 20, "steps": 4}


def traced(run: Run, **changes):
    quick = {name: value for name, value in QUICK.items() if changes.get("kd_weight", 1) or name != "teacher"}
    return trace(qd, run, {**quick, **changes}, watch=["losses", "functional_call"])


@pytest.mark.parametrize("changes", [{}, {"kd_weight": 0.0}, {"stochastic": True, "bits": 4}])
def test_every_pass_uses_quantized_weights_and_the_teacher_answers_for_the_batch(run, changes):
    seen = traced(run, **changes)
    assert seen.steps("student") == [0, 1, 2, 3]
    assert seen.moved("student")
    levels = 2 ** changes.get("bits", 2)
    for call, loss in zip(seen.calls("functional_call"), seen.calls("losses"), strict=True):
        for weight in call.args[1].values():
            assert all(len(bucket.unique()) <= levels for bucket in weight.flatten().split(256))
        cfg, logits, answer, label = loss.args
        assert torch.equal(logits, call.result)
        assert label.shape == (20,)
        if cfg.kd_weight:
            assert torch.allclose(answer, seen.nets["frozen 0"](call.args[2][0]), atol=1e-4)
        else:
            assert answer is None
            assert "frozen 0" not in seen.nets
    for update, loss in zip(seen.updates("student"), seen.calls("losses"), strict=True):
        assert update.parts.keys() == loss.result.keys()
        assert all(torch.equal(update.parts[name], value) for name, value in loss.result.items())
    assert len({len(p.unique()) for p in run.unwrap(seen.nets["student"]).parameters()}) >= 1


def test_points_learn_after_the_student_and_stay_sorted(run):
    seen = traced(run, quantize="points", point_steps=3)
    assert [u.stage.rpartition("/")[2] for u in seen.updates("student")] == ["full precision"] * 4
    assert seen.steps("points") == [0, 1, 2]
    assert seen.moved("points")
    assert all(torch.equal(p, p.sort().values) for p in seen.nets["points"])
    own = [call for call in seen.calls("losses") if call.stage == "run"]
    assert all(call.args[2] is not None for call in own), "the full-precision student is the points' teacher"
    assert not any(seen.moved(name) for name in seen.nets if name.startswith("frozen"))


def test_points_at_rest_adapt_batch_norm_alone(run):
    seen = traced(run, quantize="points", point_learning=False, point_steps=3)
    assert seen.steps("points") == []
    assert not seen.moved("points")
    ran = [call for call in seen.calls("functional_call") if call.stage == "run"]
    assert len(ran) == 3
    assert not any(call.grad for call in ran)
    assert "gain" in seen.metrics


@pytest.mark.parametrize("changes", [{"stochastic": True, "backward": "exact", "bits": 3, "bucket": 64}, {"backward": "truncated"}])
def test_the_quantizer_is_asked_as_the_flags_say(run, changes, monkeypatch):
    asked, uniform = [], quantizers.uniform
    monkeypatch.setattr(quantizers, "uniform", lambda *args, **keywords: asked.append((args[1:], keywords)) or uniform(*args, **keywords))
    traced(run, steps=1, kd_weight=0.0, **changes)
    wanted = {"backward": changes["backward"], "stochastic": changes.get("stochastic", False)}
    assert asked
    assert all(call == ((changes.get("bits", 2), changes.get("bucket", 256)), wanted) for call in asked)


def test_what_is_delivered_are_the_quantizers_values_and_the_rest_stays():
    net = load_classifier("small:convnet-w4", data=digits())
    before = copy.deepcopy(net)
    config = qd.Config(vectors=False, ends=False, bits=3, bucket=32)
    qd.deliver(net, qd.encode(net, config))
    chosen = qd.quantized(before, config)
    for name, p in before.named_parameters():
        wanted = quantizers.uniform(p.detach(), 3, 32) if name in chosen else p
        torch.testing.assert_close(net.get_parameter(name), wanted)
    assert 0 < len(chosen) < len(list(before.parameters()))


def test_the_gain_is_what_the_points_learned_and_their_teacher_is_the_one_asked_for(run, tmp_path):
    seen = trace(qd, run, {**QUICK, "quantize": "points", "point_steps": 2, "point_teacher": "teacher"}, watch=["losses", "accuracy"])
    first, last, shadow = (call.result for call in seen.calls("accuracy"))
    assert seen.metrics["gain"] == pytest.approx(last - first)
    assert seen.metrics["shadow_accuracy"] == shadow
    assert seen.metrics["accuracy"] == pytest.approx(last)
    rows = torch.cat([asked.result for asked in seen.calls("frozen 0")])
    for call in [call for call in seen.calls("losses") if call.stage == "run"]:
        assert (call.args[2][:, None] - rows[None]).abs().amax(2).amin(1).max() < 1e-4
    with Run(tmp_path / "plain", 0, engine=run.engine, store=run.store, plots=False) as other:
        seen = trace(
            qd, other, {**QUICK, "quantize": "points", "point_steps": 1, "kd_weight": 0.0, "teacher": qd.Config.teacher}, ["losses"]
        )
    assert [call.args[2] for call in seen.calls("losses")] == [None] * 5, "without the distillation term nobody is asked"


def test_the_trained_student_as_it_is(run, tmp_path):
    seen = traced(run, quantize="none")
    assert seen.metrics["bits_per_weight"] == 32
    assert seen.metrics["shadow_accuracy"] == pytest.approx(seen.metrics["accuracy"])
    assert (run.folder / "student" / "model.safetensors").exists()
    assert not any("Q" in str(call.args[1].keys()) for call in seen.calls("functional_call"))
    assert all(call.args[1] == {} for call in seen.calls("functional_call")), "no weight is replaced"


def test_training_in_half_precision_moves_the_student(tmp_path):
    with Run(tmp_path / "bf16", 0, engine=make("local", "cpu", "bf16"), store=Store(tmp_path / "store"), plots=False) as run:
        seen = traced(run)
        assert seen.moved("student")
        assert all(np.isfinite(value) for value in seen.metrics.values())


def test_bits_are_those_of_codes_and_ranges():
    codes = Coded(torch.tensor([0, 1, 1, 3] * 64), torch.linspace(0, 1, 4), torch.ones(1), torch.zeros(1), 256)
    found = qd.sizes({"w": codes})
    assert found["bits_per_weight"] == 2 + 64 / 256
    assert found["entropy_coded_bits"] == pytest.approx(1.5, abs=0.01)  # half of them are 1, a quarter each 0 and 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"point_steps": 7}, "--point-steps 7 has no effect with --quantize during"),
        ({"quantize": "none", "stochastic": True}, "--stochastic True has no effect with --quantize none"),
        ({"quantize": "points", "point_learning": False, "point_teacher": "teacher"}, "--point-teacher teacher has no effect"),
        ({"deal": "bits"}, "--deal bits has no effect with --quantize during"),
        ({"quantize": "after", "backward": "exact"}, "--backward exact has no effect with --quantize after"),
        ({"quantize": "none", "bits": 3}, "--bits 3 has no effect with --quantize none"),
        ({"quantize": "none", "vectors": False}, "--vectors False has no effect with --quantize none"),
        ({"kd_weight": 0.0, "temperature": 3.0}, "--temperature 3.0 has no effect with --kd-weight 0"),
        ({"kd_weight": 0.0, "teacher": "small:mlp"}, "--teacher small:mlp has no effect with --kd-weight 0"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(run, changes, message):
    with pytest.raises(UserError, match=message):
        qd.main(configs.override(qd.Config(), changes), run)


def test_which_parameters_are_quantized():
    net = load_classifier("small:convnet-w4", data=digits())
    names = [name for name, _ in net.named_parameters()]
    assert qd.quantized(net, qd.Config()) == names
    assert qd.quantized(net, qd.Config(ends=False)) == names[1:-1]
    assert qd.quantized(net, qd.Config(vectors=False)) == [n for n in names if net.get_parameter(n).ndim > 1]


def test_dealt_points_follow_the_gradients_within_their_budget():
    data = digits(0, labelled=64, transfer=0)
    net = load_classifier("small:convnet-w4", data=data)
    named, batches = dict(net.named_parameters()), Batches(data.train, 16, 0)
    sizes, norms = [p.numel() for p in named.values()], qd.gradient_norms(net, named, [batches(step) for step in range(5)])
    even, points, bits = (qd.deal(qd.Config(bits=3, deal=way), net, named, batches) for way in ("evenly", "points", "bits"))
    assert even == [8] * len(named)
    assert sum(points) == sum(even)
    assert points == quantizers.allocate(even, sizes, norms)
    assert [count.bit_length() - 1 for count in bits] == quantizers.allocate_bits(3, sizes, norms)


def test_gradient_norms_leave_the_net_alone():
    data = digits(0, labelled=64, transfer=0)
    net = load_classifier("small:convnet-w4", data=data).train()
    state = copy.deepcopy(net.state_dict())
    batch = data.train.take(torch.arange(32))
    norms = qd.gradient_norms(net, dict(net.named_parameters()), [batch, batch])
    assert all(torch.equal(a, b) for a, b in zip(state.values(), net.state_dict().values()))
    gradients = torch.autograd.grad(F.cross_entropy(net(batch.images), batch.labels), list(net.parameters()))
    torch.testing.assert_close(torch.tensor(norms), torch.stack([g.norm() for g in gradients]))


@pytest.mark.parametrize("arm", ["quantized distillation, 2 bits", "after, 4 bits", "points, 3 bits dealt"])
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
    theirs = next(row for row in run.rows if row["name"] == "teacher")["accuracy"]
    assert result["metrics"]["over_teacher"] == pytest.approx(result["metrics"]["accuracy"] - theirs)
    assert qd.accuracy(net, data) == pytest.approx(result["metrics"]["accuracy"], abs=2e-3)
    levels = max(len(p.unique()) for p in net.parameters() if p.numel() <= config.bucket)
    assert levels <= (2**config.bits if config.deal == "evenly" else 256)
    if run.plots:
        assert (tmp_path / "run" / "samples" / "weights before and after.svg").exists()
        assert [row["name"] for row in run.rows] == ["teacher", "full precision", "student"]


def test_functional_call_updates_batch_norm_in_place():
    net = load_classifier("small:convnet-w4", data=digits()).train()
    before = copy.deepcopy(dict(net.named_buffers()))
    functional_call(net, {name: p * 1 for name, p in net.named_parameters()}, (torch.rand(8, 1, 8, 8),))
    assert any(not torch.equal(b, before[name]) for name, b in net.named_buffers())


@pytest.mark.parametrize(("changes", "after"), [({}, 6), ({"quantize": "points"}, 10)])
def test_a_killed_run_ends_where_an_uninterrupted_one_ends(changes, after, tmp_path):
    assert_resumes("quantized-distillation", tmp_path, after, {**QUICK, "teacher_steps": 4, "stochastic": not changes, **changes})
