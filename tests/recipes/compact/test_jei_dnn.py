import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from stillroom.adapt.early_exit import EarlyExit, Gates, Heads
from stillroom.catalogue import cards
from stillroom.catalogue.execute import execute
from stillroom.core import config as configs
from stillroom.core.engine import make
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.core.store import Store
from stillroom.data.embedded import spiral
from stillroom.metrics import cost
from stillroom.recipes.compact import jei_dnn
from stillroom.recipes.compact.jei_dnn import WarmUp, gate_loss, level_losses, matched, positive_weights, warmup_loss
from stillroom.testing import assert_grads, trace
from stillroom.vision.hub import load_classifier
from tests.recipes.common import assert_resumes

SMALL = {"epochs": 3, "warmup_epochs": 1, "teacher_steps": 15, "teacher": "small:residual-mlp-w8-d3"}
SMALL |= {"validation": 200, "phase": 4, "tradeoffs": (0.1, 1.0)}


# -- the equations -----------------------------------------------------------------------------------------------------------------
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
    assert positive_weights(torch.tensor([0, 0, 0, 1]), 2).tolist() == [pytest.approx(1 / 3), 3.0]


def test_level_losses_price_compute():
    logits = torch.zeros(1, 3, 4)
    costs = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(level_losses(logits, torch.tensor([1]), costs, 2.0), torch.tensor([[0.5, 1.0, 2.0]]) + np.log(4.0))
    logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]]])
    expected = torch.log1p(torch.exp(torch.tensor([[2.0, -2.0, 0.0]])))  # of label 1
    torch.testing.assert_close(level_losses(logits, torch.tensor([1]), costs, 0.0), expected)


def test_early_exits_weigh_most_in_the_warm_up_and_resting_ones_nothing():
    flat, sure = torch.zeros(2, 4), torch.tensor([[9.0, 0, 0, 0], [0, 9.0, 0, 0]])
    label, worth = torch.tensor([0, 1]), np.log(4.0)
    small = -float(sure[0].log_softmax(0)[0])
    torch.testing.assert_close(warmup_loss([flat, sure, flat], label, [False] * 3), torch.full((2,), 4 * worth + 3 * small + 2 * worth))
    torch.testing.assert_close(warmup_loss([flat, sure, flat], label, [True, False, True]), torch.full((2,), 3 * small))


def test_undetached_the_ratio_undoes_the_weights():
    logits = torch.randn(6, 4, 5, dtype=torch.float64, requires_grad=True)
    label = torch.randint(5, (6,))
    p = torch.rand(6, 5, dtype=torch.float64)

    def loss(detach: bool | None) -> torch.Tensor:
        ce = -logits.log_softmax(-1).gather(2, label[:, None, None].expand(-1, 4, 1)).squeeze(2)
        return (ce if detach is None else matched(ce, p, detach)).sum(1).mean()

    plain, released, detached = (torch.autograd.grad(loss(detach), logits)[0] for detach in (None, False, True))
    torch.testing.assert_close(released, plain)
    assert (detached - plain).abs().max() > 1e-3
    torch.testing.assert_close(loss(True), loss(None))  # an image's total is unchanged either way
    torch.testing.assert_close(loss(False), loss(None))


def test_the_exits_loss_by_hand():
    ce, p = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.5, 0.25, 0.25]])
    torch.testing.assert_close(matched(ce, p, True), torch.tensor([[0.5, 0.75]]) * 4 / 1.25)


def test_the_guard_holds_when_all_mass_lies_on_the_final_exit():
    assert matched(torch.ones(2, 3), torch.tensor([[0.0, 0, 0, 1]]), True).tolist() == [[0, 0, 0]] * 2


def test_gradients_stay_in_their_phase():
    features = [torch.randn(5, 4) for _ in range(3)]
    heads, gates, label = Heads([4] * 3, 2), Gates(3), torch.randint(2, (5,))
    logits = torch.stack(heads(features), 1)
    assert_grads(gate_loss(gates(logits), torch.tensor([0, 1, 2, 3, 0]), torch.ones(3)).mean(), to=[gates], not_to=[heads])
    p = jei_dnn.exit_probabilities(torch.sigmoid(gates(logits)))
    ce = F.cross_entropy(logits.flatten(0, 1), label.repeat_interleave(3), reduction="none").view(5, 3)
    assert_grads(matched(ce, p, True).mean(), to=[heads], not_to=[gates])
    assert_grads(matched(ce, p, False).mean(), to=[heads], not_to=[gates])


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
    assert resumed.accuracy.tolist() == [0.5, 0.75]
    epoch(4, 2, 4, last=True)
    assert int(warm.ended) == 4
    assert not warm.active


# -- operating points --------------------------------------------------------------------------------------------------------------
def option(cost, accuracy, test_accuracy=0.0, ends=()):
    return jei_dnn.Option(
        None, None, [], {"cost": cost, "accuracy": accuracy}, {"cost": cost, "accuracy": test_accuracy or accuracy}, list(ends)
    )


def test_the_delivered_student_is_the_cheapest_of_the_good_ones_by_validation():
    few, some, many = option(0.2, 0.5, 0.9), option(0.4, 0.8, 0.1), option(0.9, 0.9, 0.2)
    assert jei_dnn.choose([many, few, some], 0.8) is some
    assert jei_dnn.choose([many, few, some], 0.95) is many  # none is good enough: the most accurate


def test_curves_join_operating_points_and_the_two_policies_that_ask_nobody():
    ends = [{"cost": 0.2, "accuracy": 0.3}, {"cost": 1.0, "accuracy": 1.0}]
    points = [option(0.75, 0.9, ends=ends), option(0.5, 0.8, 0.7, ends=ends)]
    assert jei_dnn.curve(points, "accuracy") == [(0.2, 0.3), (0.5, 0.7), (0.75, 0.9), (1.0, 1.0)]


def test_an_option_by_hand():
    """Two exits of one linear layer each; every figure from the definitions."""
    torch.manual_seed(0)
    data = spiral(0, count=200)
    net = load_classifier("small:residual-mlp-w8-d3", data=data, fresh=True)
    exits = jei_dnn.Exits(net, jei_dnn.find_exits(net))
    tables = [jei_dnn.Table(*exits(split.images()), split.labels) for split in (data.train, data.test)]
    task = jei_dnn.Task(exits, data, *tables)
    stem, block, head = 2 * 8, 2 * 8 * 32, 8 * 5
    work = [stem + (exit + 1) * (block + head) for exit in range(2)] + [stem + 3 * block + 3 * head]
    torch.testing.assert_close(task.costs, torch.tensor(work).double() / work[-1])
    heads = task.heads()
    gate = jei_dnn.Threshold("p_max", float(task.validation.logits(heads)[:, 0].softmax(-1).max(-1).values.median()))
    found = jei_dnn.option(jei_dnn.Config(conformal_alpha=0.3), task, heads, gate)
    for figures, part in ((found.validation, task.validation), (found.test, task.test)):
        logits = part.logits(heads)
        leaves = [int(next((e for e in range(2) if row[e].softmax(-1).max() >= gate.value), 2)) for row in logits]
        right = [bool(row[e].argmax() == label) for row, e, label in zip(logits, leaves, part.labels)]
        assert figures["accuracy"] == pytest.approx(np.mean(right))
        assert figures["cost"] == pytest.approx(np.mean([task.costs[e] for e in leaves]))
        assert 0.5 < figures["coverage"] < 0.9
    assert found.taken.tolist() == leaves
    first, never = found.ends
    assert first["cost"] == pytest.approx(float(task.costs[0]))
    assert never["cost"] == 1
    assert never["accuracy"] == pytest.approx(float((task.test.final.argmax(-1) == data.test.labels).float().mean()))
    assert all(0.55 < end["coverage"] < 0.88 for end in (first, never))  # by the thresholds of that policy


# -- the loop ----------------------------------------------------------------------------------------------------------------------
TRACED = {"teacher": "small:residual-mlp-w8-d3", "validation": 144, "epochs": 4, "warmup_epochs": 2, "patience": 3, "phase": 2}
"""Of 400 training images 256 are left: four batches an epoch."""
WATCHED = ["warmup_loss", "level_losses", "gate_loss", "positive_weights", "matched", "measured", "thresholds"]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jei")
    with Run(folder / "run", engine=make("local", "cpu"), store=Store(folder / "store"), plots=False) as run:
        return trace(jei_dnn, run, TRACED, WATCHED, data=spiral(0, count=400))


def test_gate_and_exit_phases_alternate_after_the_warm_up_gates_first(seen):
    stage = "lambda 1"
    assert seen.steps("gates", stage) == [8, 9, 12, 13]
    assert seen.steps("heads", stage) == [*range(8), 10, 11, 14, 15]
    assert [set(u.parts) for u in seen.updates("heads", stage)] == [{"warmup"}] * 8 + [{"exits"}] * 4
    for update in seen.updates(stage=stage):
        assert update.moved == set(update.roles)  # nothing of the resting phase moves
        assert len(update.parts) == 1
    rest = seen.updates("gates", stage)[0].rates[0]
    assert rest == jei_dnn.Config().gate_optimizer.rate(8, 16)


def test_the_rivals_heads_learn_the_plain_sum_for_as_many_steps_and_no_gate(seen):
    stage = "plain heads"
    assert seen.steps("heads", stage) == list(range(16))
    assert seen.steps("gates", stage) == []
    assert [set(u.parts) for u in seen.updates("heads", stage)] == [{"warmup"}] * 8 + [{"exits"}] * 8
    assert not [c for c in seen.calls("matched") if c.stage.endswith(stage)]
    logits = torch.stack(seen.calls("heads", stage, 9)[0].result, 1)
    heads = seen.updates("heads", stage)[9]
    assert heads.parts["exits"].shape == logits.shape[:2]
    labels = seen.calls("level_losses", stage)[0].args[1]
    assert len(labels) == 144  # weights of the gates are taken on the validation images
    assert seen.calls("thresholds")[0].args[3] == "p_max"


def test_the_warm_up_reads_the_batch_and_what_rests(seen):
    first = seen.calls("warmup_loss", "lambda 1", 0)[0]
    assert [tuple(u.shape) for u in first.args[0]] == [(64, 5)] * 2
    assert first.args[2] == [False, False]
    torch.testing.assert_close(first.result, seen.updates("heads", "lambda 1")[0].parts["warmup"])


def test_the_gates_learn_from_the_best_exit_of_the_batch_under_the_price(seen):
    stage, levels, loss = "lambda 1", *(seen.calls(name, "lambda 1", 8)[0] for name in ("level_losses", "gate_loss"))
    logits, label, costs, price = levels.args
    assert logits.shape == (64, 3, 5)
    assert price == 1.0
    assert costs[-1] == 1
    heads, teacher = seen.calls("heads'", stage, 8)[0], seen.nets["frozen 0"]
    torch.testing.assert_close(logits[:, :2], torch.stack(heads.result, 1))
    finals = teacher(torch.cat([spiral(0, count=400).train.images(), spiral(0, count=400).test.images()]))
    assert all(torch.isclose(row, finals, atol=1e-5).all(1).any() for row in logits[:8, 2])  # the net's own head is the last
    torch.testing.assert_close(loss.args[1], (-logits.log_softmax(-1)[torch.arange(64), :, label] + costs.float()).argmin(1))
    assert not heads.grad  # the heads only answer
    torch.testing.assert_close(loss.result, seen.updates("gates", stage)[0].parts["gate"])


def test_rarity_is_that_of_the_last_epochs_validation_pass(seen):
    refreshed = seen.calls("positive_weights", "lambda 1")
    assert [call.step for call in refreshed] == [3, 7, 11, 15]
    assert all(len(call.args[0]) == 144 for call in refreshed)
    for step, epoch in ((8, 1), (12, 2)):
        torch.testing.assert_close(seen.calls("gate_loss", "lambda 1", step)[0].args[2], refreshed[epoch].result)
    levels = seen.calls("level_losses", "lambda 1", 7)[-1]
    assert torch.equal(levels.result.argmin(1), refreshed[1].args[0])
    assert levels.args[3] == 1.0


def test_the_exits_are_weighted_by_the_gates_of_this_very_batch(seen):
    ce, p, detach = seen.calls("matched", "lambda 1", 10)[0].args
    assert detach
    gates, heads = seen.calls("gates'", "lambda 1", 10)[0], seen.calls("heads'", "lambda 1", 10)[0]
    torch.testing.assert_close(gates.args[0], torch.stack(heads.result, 1))
    g = torch.sigmoid(gates.result)
    torch.testing.assert_close(p[:, 0], g[:, 0])
    torch.testing.assert_close(p[:, 1], torch.minimum(g[:, 1], 1 - g[:, 0]))
    part = seen.updates("heads", "lambda 1")[8].parts["exits"]
    torch.testing.assert_close(part, seen.calls("matched", "lambda 1", 10)[0].result)
    torch.testing.assert_close(part.sum(1), ce.sum(1))


def test_the_net_is_only_asked(seen):
    assert not seen.moved("frozen 0")
    calls = seen.calls("frozen 0")  # those of its own training first
    assert [call.grad for call in calls] == [call.training for call in calls] == [True] * 6 + [False] * (len(calls) - 6)


def test_the_figures_are_those_of_test_images_and_gains_are_over_the_rival(seen):
    assert {len(call.args[0]) for call in seen.calls("measured")} == {100, 144}
    assert len(seen.calls("measured")) == 4 * (41 + 1)
    assert {"accuracy_gain", "ece_gain", "set_size_gain", "accuracy_curve", "ece_curve", "set_size_curve"} <= set(seen.metrics)


def test_a_threshold_is_swept_over_the_validation_scores(tmp_path):
    changes = {**TRACED, "gate": "entropy", "tradeoffs": jei_dnn.Config().tradeoffs, "phase": 20, "epochs": 3}
    with Run(tmp_path / "run", engine=make("local", "cpu"), store=Store(tmp_path / "store"), plots=False) as run:
        found = trace(jei_dnn, run, changes, ["thresholds", "option"], data=spiral(0, count=400))
    assert [call.args[3] for call in found.calls("thresholds")] == ["p_max", "entropy"]
    rival, own = (call.result for call in found.calls("thresholds"))
    values = [call.args[3].value for call in found.calls("option")]
    assert len(rival) == len(own) == 41
    assert all(0 < value <= 1 for value in values[:41])
    assert values[:41] == sorted(values[:41])
    assert all(-np.log(5) - 1e-5 <= value <= 0 for value in values[41:])  # entropies are negated
    assert values[41] < values[-1]
    assert max(o.test["cost"] for o in own) > 0.9  # the largest threshold keeps nearly everybody
    assert min(o.test["cost"] for o in own) == pytest.approx(own[0].ends[0]["cost"])
    assert found.steps("gates") == []


@pytest.mark.parametrize("gate", ["learned", "margin"])
def test_in_half_precision_all_that_learns_moves(gate, tmp_path):
    changes = {**TRACED, "gate": gate, "tradeoffs": jei_dnn.Config().tradeoffs[-1:] if gate == "learned" else jei_dnn.Config().tradeoffs}
    if gate != "learned":
        del changes["phase"]
    with Run(tmp_path / "run", engine=make("local", "cpu", "bf16"), store=Store(tmp_path / "store"), plots=False) as run:
        found = trace(jei_dnn, run, changes, ["gate_loss"], data=spiral(0, count=400))
        assert found.moved("heads")
        assert found.moved("gates'" if gate == "learned" else "gates") == (gate == "learned")
        assert all(np.isfinite(value) for value in found.metrics.values())
        assert all(call.result.dtype == torch.float32 for call in found.calls("gate_loss"))
    student = EarlyExit.load(tmp_path / "run" / "student", found.nets["frozen 0"])
    logits, _ = student.infer(spiral(0, count=400).test.images())  # the exits are read inside of autocast
    assert float((logits.argmax(1) == spiral(0, count=400).test.labels).float().mean()) == pytest.approx(
        found.metrics["accuracy"], abs=0.05
    )


# -- flags -------------------------------------------------------------------------------------------------------------------------
def test_mistakes_are_named():
    with pytest.raises(UserError, match="--validation"):
        jei_dnn.main(jei_dnn.Config(validation=5000), Stub(), data=spiral(0, count=100))
    with pytest.raises(UserError, match="--tradeoffs needs"):
        jei_dnn.check(jei_dnn.Config(tradeoffs=()))
    with pytest.raises(UserError, match="--warmup-epochs 3 leaves no epoch of 3 for the gates"):
        jei_dnn.check(jei_dnn.Config(warmup_epochs=3, epochs=3))
    jei_dnn.check(jei_dnn.Config(warmup_epochs=2, epochs=3))


class Stub:
    """What is read of a run before anything is trained."""

    device, seed = torch.device("cpu"), 0


@pytest.mark.parametrize(
    ("flag", "value"),
    [("tradeoffs", (0.2,)), ("detach_ratio", False), ("phase", 3), ("gate_optimizer", Optimizer("sgd", 0.3))],
)
def test_a_threshold_refuses_what_only_learned_gates_read(flag, value):
    jei_dnn.check(replace(jei_dnn.Config(), **{flag: value}))
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')}.* has no effect with --gate margin"):
        jei_dnn.check(replace(jei_dnn.Config(gate="margin"), **{flag: value}))
    for preset in (jei_dnn.full(), configs.override(jei_dnn.Config(), jei_dnn.TINY)):
        jei_dnn.check(replace(preset, gate="margin"))


# -- from end to end ---------------------------------------------------------------------------------------------------------------
def test_a_killed_run_ends_where_an_undisturbed_one_does(tmp_path):
    """In a gate phase; the warm-up's and the rarities' states are read again."""
    changes = {**TRACED, "teacher_steps": 4}
    assert_resumes("jei-dnn", tmp_path, 4 + 16 + 10, changes, data=spiral(0, count=400))


def test_a_student_reads_its_folder_again(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "SECONDS", 0)
    data = spiral(0, count=600)
    config = configs.override(cards.config_of(jei_dnn, "jei-dnn"), SMALL)
    with Run(tmp_path / "run", store=Store(tmp_path / "cache"), plots=True) as run:
        result = execute("jei-dnn", config, run, arm="jei-dnn", data=data)
    metrics = result["metrics"]
    assert 0 < metrics["cost"] <= 1
    assert metrics["coverage"] > 0.8
    net = load_classifier(f"run:{tmp_path}/run", data=data)  # the folder serves as a plain student as well
    student = EarlyExit.load(tmp_path / "run" / "student", net)
    logits, taken = student.infer(data.test.images())
    assert float((logits.argmax(1) == data.test.labels).float().mean()) == pytest.approx(metrics["accuracy"], abs=5e-3)
    assert int(taken.max()) <= 2
    rows = {row["name"]: row for row in result["rows"]}
    assert rows["student"]["compute"] == metrics["cost"]
    assert rows["whole net"]["compute"] == 1
    assert {"accuracy-against-compute", "where-the-test-images-leave", "time-until-each-exit", "calibration-of-the-exits"} <= {
        file.stem.replace(" ", "-") for file in (tmp_path / "run" / "samples").glob("*.svg")
    }
    facts = json.loads((tmp_path / "run" / "student" / "exits.json").read_text())
    assert len(facts["conformal_thresholds"]) == 3
    assert facts["conformal_alpha"] == 0.05


def test_augmented_training_reads_features_online(tmp_path):
    changes = {**TRACED, "augment": "flip", "epochs": 3}
    with Run(tmp_path / "run", store=Store(tmp_path / "cache"), plots=False) as run:
        found = trace(jei_dnn, run, changes, data=spiral(0, count=400))
    assert 0 < found.metrics["cost"] <= 1
    assert found.steps("gates", "lambda 1") == [8, 9]
    views = [call.args[0] for call in found.calls("frozen 0", "lambda 1") if len(call.args[0]) == 64]
    assert len(views) == 12  # of every batch, seen as it is trained on


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
    with pytest.raises(UserError, match="--exits"), Run(tmp_path / "other", store=Store(tmp_path / "cache"), plots=False) as run:
        jei_dnn.main(replace(config, exits=("nowhere",)), run, data=data)
