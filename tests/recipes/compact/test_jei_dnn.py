import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from stillroom.adapt.early_exit import EarlyExit, Gates, Heads
from stillroom.catalogue import cards
from stillroom.catalogue.execute import execute
from stillroom.core import config as configs
from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.core.store import Store
from stillroom.data.embedded import spiral
from stillroom.recipes.compact import jei_dnn
from stillroom.recipes.compact.jei_dnn import WarmUp, gate_loss, level_losses, matched, positive_weights
from stillroom.testing import assert_grads
from stillroom.vision.hub import load_classifier

SMALL = {"epochs": 3, "warmup_epochs": 1, "teacher_steps": 15, "teacher": "small:residual-mlp-w8-d3"}
SMALL |= {"validation": 200, "phase": 4, "tradeoffs": (0.1, 1.0)}


def test_the_gates_learn_to_leave_at_the_best_exit_and_at_all_later_ones():
    g = torch.randn(4, 3, dtype=torch.float64)
    best, rarity = torch.tensor([0, 1, 2, 3]), torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    target = torch.tensor([[1.0, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]], dtype=torch.float64)
    p = torch.sigmoid(g)
    expected = -target * p.log() * rarity - (1 - target) * (1 - p).log()  # the weight is on positives alone
    torch.testing.assert_close(gate_loss(g, best, rarity), expected)
    weighted = F.binary_cross_entropy_with_logits(g, target, weight=None, pos_weight=rarity, reduction="none")
    torch.testing.assert_close(gate_loss(g, best, rarity), weighted)


def test_positive_weights_count_the_best_exits_and_stop_at_five():
    best = torch.tensor([0] * 6 + [1] * 2 + [3] * 4)
    assert positive_weights(best, 3).tolist() == [1.0, 5.0, 5.0]


def test_level_losses_price_compute():
    logits = torch.zeros(1, 3, 4)
    costs = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(level_losses(logits, torch.tensor([1]), costs, 2.0), torch.tensor([[0.5, 1.0, 2.0]]) + np.log(4.0))


def test_undetached_the_ratio_undoes_the_weights():
    logits = torch.randn(6, 4, 5, dtype=torch.float64, requires_grad=True)
    label = torch.randint(5, (6,))
    p = torch.rand(6, 4, dtype=torch.float64)

    def loss(detach: bool | None) -> torch.Tensor:
        ce = -logits.log_softmax(-1).gather(2, label[:, None, None].expand(-1, 4, 1)).squeeze(2)
        return (ce if detach is None else matched(ce, p, detach)).sum(1).mean()

    plain, released, detached = (torch.autograd.grad(loss(detach), logits)[0] for detach in (None, False, True))
    torch.testing.assert_close(released, plain)
    assert (detached - plain).abs().max() > 1e-3
    torch.testing.assert_close(loss(True), loss(None))  # an image's total is unchanged either way
    torch.testing.assert_close(loss(False), loss(None))


def test_the_guard_holds_when_all_mass_lies_on_the_final_exit():
    assert matched(torch.ones(2, 3), torch.zeros(2, 3), True).isfinite().all()


def test_gradients_stay_in_their_phase():
    features = [torch.randn(5, 4) for _ in range(3)]
    heads, gates, label = Heads([4] * 3, 2), Gates(3), torch.randint(2, (5,))
    logits = torch.stack(heads(features), 1)
    assert_grads(gate_loss(gates(logits), torch.tensor([0, 1, 2, 3, 0]), torch.ones(3)).mean(), to=[gates], not_to=[heads])
    with torch.no_grad():
        p = torch.sigmoid(gates(logits))
    ce = F.cross_entropy(logits.flatten(0, 1), label.repeat_interleave(3), reduction="none").view(5, 3)
    assert_grads(matched(ce, p, True).mean(), to=[heads], not_to=[gates])


def test_a_head_rests_with_its_best_weights_after_two_epochs_without_gain():
    heads = Heads([2, 2], 2)
    warm = WarmUp(heads)
    labels = torch.tensor([0, 0, 1, 1])

    def epoch(first: int, second: int, step: int, last: bool = False) -> None:
        """End an epoch in which the exits have this many of four right, having moved their weights to `step`."""
        for layer in heads.layers:
            layer.weight.data.fill_(step)
        right = torch.stack([torch.arange(4) < first, torch.arange(4) < second, torch.ones(4, dtype=torch.bool)], 1)
        answer = torch.where(right, labels[:, None], 1 - labels[:, None])
        warm.end_epoch(F.one_hot(answer, 2).float(), labels, step, last, 2)

    epoch(2, 1, 1)
    epoch(2, 2, 2)
    epoch(1, 3, 3)
    assert warm.resting.tolist() == [True, False]
    assert warm.active
    assert (heads.layers[0].weight == 1).all()
    assert (heads.layers[1].weight == 3).all()
    resumed = WarmUp(Heads([2, 2], 2))
    resumed.load_state_dict(warm.state_dict())
    assert resumed.resting.tolist() == [True, False]
    epoch(4, 2, 4, last=True)
    assert int(warm.ended) == 4
    assert not warm.active


def test_curves_join_operating_points_and_the_two_policies_that_ask_nobody():
    end = [{"cost": 0.2, "accuracy": 0.2}, {"cost": 1.0, "accuracy": 1.0}]
    point = lambda cost, accuracy: jei_dnn.Option(None, None, [], {}, {"cost": cost, "accuracy": accuracy}, end)  # type: ignore
    assert jei_dnn.curve([point(0.6, 0.6)], "accuracy") == pytest.approx(0.75)
    assert jei_dnn.curve([point(0.75, 1.0), point(0.5, 0.8)], "accuracy") == pytest.approx(0.95, abs=2e-3)


@pytest.mark.parametrize("arm", ["jei-dnn", "entropy"])
def test_end_to_end(arm, tmp_path):
    data = spiral(0, count=1200)
    config = configs.override(cards.config_of(jei_dnn, arm), SMALL)
    with Run(tmp_path / "run", store=Store(tmp_path / "cache"), plots=arm == "jei-dnn") as run:
        result = execute("jei-dnn", config, run, arm=arm, data=data)
    metrics = result["metrics"]
    assert 0 < metrics["cost"] <= 1
    assert metrics["coverage"] > 0.8
    net = load_classifier(f"run:{tmp_path}/run", data=data)  # the folder serves as a plain student as well
    student = EarlyExit.load(tmp_path / "run" / "student", net)
    logits, taken = student.infer(data.test.images())
    assert float((logits.argmax(1) == data.test.labels).float().mean()) == pytest.approx(metrics["accuracy"], abs=5e-3)
    assert int(taken.max()) <= 2
    if arm == "jei-dnn":
        assert {"accuracy-against-compute", "where-the-test-images-leave", "time-until-each-exit", "calibration-of-the-exits"} <= {
            file.stem.replace(" ", "-") for file in (tmp_path / "run" / "samples").glob("*.svg")
        }
        assert len(json.loads((tmp_path / "run" / "student" / "exits.json").read_text())["conformal_thresholds"]) == 3


def test_augmented_training_reads_features_online(tmp_path):
    from stillroom.data.load import load_images

    data = load_images("digits", seed=0, limit=200)
    changes = {"augment": "shift", "validation": 50, "teacher": "small:resnet8", "epochs": 2, "tradeoffs": (0.3,)}
    config = configs.override(jei_dnn.Config(), SMALL | changes)
    with Run(tmp_path / "run", store=Store(tmp_path / "cache"), plots=False) as run:
        assert 0 < execute("jei-dnn", config, run, data=data)["metrics"]["cost"] <= 1


def test_mistakes_are_named(tmp_path):
    run = Run(tmp_path / "run", store=Store(tmp_path / "cache"), plots=False)
    with pytest.raises(UserError, match="--validation 5000 leaves nothing"):
        jei_dnn.main(jei_dnn.Config(validation=5000), run, data=spiral(0, count=100))
    with pytest.raises(UserError, match="--tradeoffs"):
        jei_dnn.main(jei_dnn.Config(tradeoffs=()), run, data=spiral(0, count=100))
    with pytest.raises(UserError, match="--exits"):
        jei_dnn.main(
            jei_dnn.Config(**SMALL | {"exits": ("nowhere",)}),
            run,
            data=spiral(0, count=400),
        )


def test_a_transformers_model_from_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    from stillroom.data.embedded import shapes

    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 8, "patch_size": 4}
    transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, num_labels=6)).save_pretrained(tmp_path / "vit")
    data = shapes(0, count=90, size=8)
    changes = {"teacher": f"hf:{tmp_path}/vit", "exits": ("model.vit.layers.*",), "validation": 30, "epochs": 2, "tradeoffs": (0.5,)}
    config = configs.override(jei_dnn.Config(), SMALL | changes)
    with pytest.warns(UserWarning, match="preprocessor_config"), Run(tmp_path / "run", store=Store(tmp_path / "cache"), plots=False) as run:
        metrics = execute("jei-dnn", config, run, data=data)["metrics"]
    student = EarlyExit.load(tmp_path / "run" / "student", load_classifier(f"run:{tmp_path}/run", data=data))
    logits, _ = student.infer(data.test.images())
    assert float((logits.argmax(1) == data.test.labels).float().mean()) == pytest.approx(metrics["accuracy"], abs=1e-6)
    assert student.exits.paths == ["model.vit.layers.0", "model.vit.layers.1"]
    plain = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "student")
    assert plain.config.num_hidden_layers == 3


def test_a_stopped_run_ends_where_an_uninterrupted_one_ends(tmp_path, monkeypatch):
    """Stopped in the warm-up, in a gate phase and in an exit phase, with the state of each."""
    data = spiral(0, count=600)
    config = configs.override(jei_dnn.Config(), SMALL | {"tradeoffs": (0.1,)})

    def outcome(folder: str) -> dict[str, float]:
        with Run(tmp_path / folder, store=Store(tmp_path / f"cache-{folder}"), plots=False, save_seconds=0) as run:
            return jei_dnn.main(config, run, data=data)

    expected, update, left = outcome("straight"), Run.update, [0]

    def stopping(self, *args, **parts):
        left[0] -= 1
        if left[0] == 0:
            raise InterruptedError
        return update(self, *args, **parts)

    monkeypatch.setattr(Run, "update", stopping)
    for left[0] in (34, 5, 4):
        with pytest.raises(InterruptedError):
            outcome("stopped")
    assert outcome("stopped") == expected
