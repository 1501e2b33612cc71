"""Further pre-training's sharp edges: students that restart from the checkpoint, what is distilled and from where, what is measured."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from stillroom.adapt.masked import patchify
from stillroom.core.config import override
from stillroom.core.engine import make
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.core.store import Store
from stillroom.data.batches import Batches
from stillroom.data.load import load_images
from stillroom.metrics.classification import evaluate
from stillroom.recipes.encoders import further_pretraining as recipe
from stillroom.testing import assert_grads, trace
from stillroom.vision.masked import load_masked_images
from tests.adapt.test_masked import MAE, bert
from tests.recipes.common import assert_resumes

SMALL = {
    "model": "small:vit-p4-w16-d1", "limit": 120, "checkpoint_steps": 3, "checkpoint_batch": 16, "labelled": 10, "batch_size": 5,
    "steps": 12, "finetune_steps": 4, "finetune_batch": 5,
}  # fmt: skip
MADE = {"checkpoint_steps": 600, "checkpoint_batch": 64}
"""As the defaults have it: a checkpoint that is not made here leaves no choice."""


def config(**changes):
    return override(recipe.Config(), SMALL | changes)


def start(folder, **settings) -> Run:
    return Run(folder, 0, engine=make("local", "cpu"), store=Store(folder.parent / "store"), plots=False, **settings)


def traced(run, changes=None, **keywords):
    return trace(recipe, run, SMALL | (changes or {}), ["losses", "pretrain", "heldout", "task_of"], **keywords)


@pytest.fixture
def digits():
    return load_images("digits", seed=0, limit=100)


class Perfect:
    """Predicts every patch's normalised pixels, `scale` times too strongly, with the left half hidden."""

    def __init__(self, scale: float):
        self.scale = nn.Parameter(torch.tensor(scale))

    def eval(self):
        return self

    def reconstruct(self, images):
        pixels = patchify(images, 4)
        normalised = (pixels - pixels.mean(-1, keepdim=True)) / pixels.std(-1, keepdim=True)
        return self.scale * normalised, normalised, torch.tensor([1.0, 0, 1, 0]).expand(len(images), -1)


@pytest.fixture
def model(digits):
    torch.manual_seed(0)
    return load_masked_images("small:vit-p4-w16-d1", data=digits, ratio=0.75)


def weights(net) -> list[torch.Tensor]:
    return [t.detach() for t in [*net.parameters(), *net.buffers()]]


def equal(one, two) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# -- equations ---------------------------------------------------------------------------------------------------------------------
def test_distance_of_hidden_states_is_summed_over_dimensions_and_stops_at_the_teacher():
    hidden, known = (torch.randn(3, 4, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
    hidden, known, errors = (nn.Parameter(x) for x in (hidden, known, torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)))
    parts = recipe.losses(errors, hidden, known, 0.5, 3.0)
    assert parts["mae"].tolist() == [0.5, 1.0, 2.0]
    for b in range(3):
        assert float(parts["kd"][b].detach()) == pytest.approx(3 * sum(float((hidden - known)[b, i].detach()) ** 2 for i in range(4)))
    assert_grads(parts["kd"].sum(), to=[hidden], not_to=[known, errors])
    assert_grads(parts["mae"].sum(), to=[errors], not_to=[hidden, known])
    assert set(recipe.losses(errors, None, None, 1.0, 1.0)) == {"mae"}
    assert set(recipe.losses(None, hidden, known, 1.0, 1.0)) == {"kd"}


def test_distance_of_weights_is_that_of_the_encoders(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.encoder.norm.weight[0] += 3
        other.encoder.norm.bias[1] -= 4
        other.decoder.norm.bias += 100
    assert recipe.distance(other, model) == pytest.approx(5.0)


def test_a_round_is_measured_at_ten_even_points_and_at_its_end():
    assert recipe.marks(1200) == {120 * (i + 1) - 1: i for i in range(10)}
    assert list(recipe.marks(25)) == [2, 4, 7, 9, 12, 14, 17, 19, 22, 24]  # the first step at or after each tenth
    assert recipe.marks(4) == {0: 1, 1: 4, 2: 6, 3: 9}


def test_held_out_error_has_fixed_masks_and_draws_nothing_from_the_run(model, digits):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, second = (recipe.heldout(model, digits.test) for _ in range(2))
    assert first == second
    assert torch.equal(torch.rand(2), expected)
    assert model.training


def test_held_out_error_is_the_mean_over_inputs_in_eval_mode(digits):
    class Model(nn.Module):
        def forward(self, images, *, hidden):
            assert not self.training
            assert not hidden
            assert not torch.is_grad_enabled()
            return images.flatten(1).mean(1), None

    means = digits.test.images().flatten(1).mean(1)
    net = Model().eval()
    torch.testing.assert_close(recipe.heldout(net, digits.test), means.mean())
    torch.testing.assert_close(recipe.heldout(net, digits.test, most=70), means[:70].mean())
    assert not net.training


def test_a_perfect_prediction_reconstructs_the_image(digits):
    images = digits.test.images()[:4]
    assert not recipe.reconstructions(Perfect(1.0), digits.test, 4).requires_grad
    torch.testing.assert_close(recipe.reconstructions(Perfect(1.0), digits.test, 4)[8:], images)
    strong = recipe.reconstructions(Perfect(9.0), digits.test, 4)[8:]
    assert (float(strong.min()), float(strong.max())) == (0.0, 1.0)
    assert torch.equal(strong[..., 4:], images[..., 4:])  # what was shown is shown again


# -- the rounds --------------------------------------------------------------------------------------------------------------------
def test_students_restart_from_the_checkpoint_and_learn_from_the_round_before(run):
    seen = traced(run, {"rounds": 2, "mae_weight": 0.5, "kd_weight": 2.0})
    source, target = (call.result for call in seen.calls("task_of"))
    made, *rounds = (seen.nets["model" + "'" * t] for t in range(4))
    teachers = [None, seen.nets["frozen 0"], seen.nets["frozen 1"]]
    assert "frozen 2" not in seen.nets
    for t, teacher in enumerate(teachers):
        stage = f"round-{t}"
        assert equal(seen.first["model" + "'" * (t + 1)], weights(made))
        updates, learning = seen.updates("model", stage), [c for c in seen.calls("model" + "'" * (t + 1), stage) if c.training]
        assert [update.step for update in updates] == list(range(12))
        assert [update.rates[0] for update in updates] == pytest.approx([1e-3 * (1 - i / 12) for i in range(12)])
        batches = Batches(target.train, 5, run.seed)
        assert len(target.train) == 10
        for step, call in enumerate(learning):
            assert torch.equal(call.args[0], batches(step).images)
            assert call.keywords == {"masked": True, "hidden": t > 0}
        for update, call, loss in zip(updates, learning, seen.calls("losses", stage), strict=True):
            assert torch.equal(loss.args[0], call.result[0])
            assert loss.args[3:] == ((0.5, 2.0) if t else (1.0, 0.0))
            assert update.parts.keys() == ({"mae", "kd"} if t else {"mae"})
            assert all(torch.equal(update.parts[part], loss.result[part]) for part in update.parts)
        if teacher is None:
            assert all(loss.args[1] is None and loss.args[2] is None for loss in seen.calls("losses", stage))
            continue
        name = f"frozen {t - 1}"
        assert equal(seen.first[name], weights(rounds[t - 1]))
        assert not seen.moved(name)
        for loss, mine, theirs in zip(seen.calls("losses", stage), learning, seen.calls(name), strict=True):
            assert (theirs.grad, theirs.training, theirs.keywords) == (False, False, {"masked": False})
            assert torch.equal(theirs.args[0], mine.args[0])
            assert torch.equal(loss.args[1], mine.result[1])
            assert torch.equal(loss.args[2], theirs.result[1])

    assert seen.metrics["heldout"] == recipe.heldout(rounds[2], target.test)
    assert seen.metrics["distance"] == pytest.approx(recipe.distance(rounds[2], made))
    assert [row["heldout"] for row in run.rows[:3]] == pytest.approx([float(recipe.heldout(net, target.test)) for net in rounds])
    assert [row["distance"] for row in run.rows[:3]] == pytest.approx([recipe.distance(net, made) for net in rounds])
    assert (source.classes, target.classes) == (tuple("01234"), tuple("56789"))


def test_the_held_out_error_is_measured_as_a_round_goes(run):
    seen = traced(run, {"rounds": 0})
    curve, measured = seen.calls("pretrain")[-1].result[1], seen.calls("heldout", "round-0")[:10]
    torch.testing.assert_close(curve, torch.stack([call.result for call in measured]))
    assert [call.step for call in measured] == list(recipe.marks(12))
    assert not curve.isnan().any()
    assert float(curve[-1]) == pytest.approx(seen.metrics["heldout"])
    with Run(run.folder.with_name("again"), 0, engine=run.engine, store=run.store, plots=False) as other:
        again = traced(other, {"rounds": 0})
    assert not again.updates("model")
    assert torch.equal(again.calls("pretrain")[-1].result[1], curve)  # it is kept with the round


def test_the_checkpoint_is_made_of_the_source_by_its_own_settings(run):
    seen = traced(run, {"steps": 0, "rounds": 0, "checkpoint_steps": 4, "checkpoint_batch": 16, "checkpoint_optimizer.lr": 0.01})
    source, target = (call.result for call in seen.calls("task_of"))
    assert seen.moved("model")
    updates, calls = seen.updates("model", "checkpoint"), [c for c in seen.calls("model", "checkpoint") if c.training]
    assert [update.rates[0] for update in updates] == pytest.approx([0.01 * (1 - i / 4) for i in range(4)])
    assert all(torch.equal(call.args[0], Batches(source.train, 16, run.seed)(step).images) for step, call in enumerate(calls))
    assert seen.nets["model"].ratio == 0.75
    # without a round, it is what is measured and fine-tuned
    assert "model'" not in seen.nets
    assert seen.metrics["distance"] == 0.0
    assert seen.metrics["heldout"] == recipe.heldout(seen.nets["model"], target.test)
    assert len(source.train) > len(target.train) == 10


def test_a_student_may_start_from_its_teacher(run):
    seen = traced(run, {"rounds": 2, "start": "teacher"})
    made, *rounds = (seen.nets["model" + "'" * t] for t in range(4))
    for t, before in enumerate((made, rounds[0], rounds[1])):
        assert equal(seen.first["model" + "'" * (t + 1)], weights(before))
    assert seen.metrics["distance"] == pytest.approx(recipe.distance(rounds[2], made))


def test_a_student_can_distil_alone_after_a_round_of_reconstruction(run):
    seen = traced(run, {"mae_weight": 0.0})
    assert {tuple(update.parts) for update in seen.updates("model", "round-0")} == {("mae",)}
    assert {tuple(update.parts) for update in seen.updates("model", "round-1")} == {("kd",)}
    assert all(not call.keywords["masked"] for call in seen.calls("model''", "round-1") if call.training)
    decoder = seen.nets["model''"].decoder
    assert equal(weights(decoder), weights(seen.nets["model"].decoder))


def test_a_student_of_its_own_start_has_nothing_to_distil(model, digits, run):
    settings = recipe.Round(3, 10, Optimizer("sgd", 0.1), 0.0, 1.0)
    after, _ = recipe.pretrain(run, settings, model, model, digits.train, digits.test)
    assert recipe.distance(after, model) == 0.0
    assert after is not model


def test_the_last_rounds_encoder_is_fine_tuned_on_the_labels_of_the_same_images(run):
    seen = traced(run, {"finetune_dropout": 0.2, "finetune_optimizer.warmup": 1})
    target, student, last = seen.calls("task_of")[1].result, seen.nets["student"], seen.nets["model''"]
    assert {m.p for m in student.modules() if isinstance(m, nn.Dropout)} == {0.2}
    names = [name for name, _ in [*student.named_parameters(), *student.named_buffers()]]
    kept = dict([*last.encoder.named_parameters(), *last.encoder.named_buffers()])
    assert all(
        name.startswith("head") or torch.equal(before, kept[name]) for name, before in zip(names, seen.first["student"], strict=True)
    )
    assert seen.steps("student") == [0, 1, 2, 3]
    assert [update.rates[0] for update in seen.updates("student")] == pytest.approx([5e-4, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
    batches = Batches(target.train, 5, run.seed)
    for step, call in enumerate([c for c in seen.calls("student") if c.training]):
        _, images, labels = batches(step)
        assert torch.equal(call.args[0], images)
        expected = nn.functional.cross_entropy(call.result, labels, reduction="none")
        torch.testing.assert_close(seen.updates("student")[step].parts["ce"], expected)
    right = evaluate(student, target.test)[0].argmax(1) == target.test.labels
    assert seen.metrics["accuracy"] == pytest.approx(float(right.float().mean()))


def test_fine_tuning_sees_augmented_images(run):
    seen = traced(run, {"rounds": 0, "steps": 0, "finetune_augment": "shift", "finetune_steps": 1})
    target = seen.calls("task_of")[1].result
    assert not torch.equal(next(c for c in seen.calls("student") if c.training).args[0], Batches(target.train, 5, run.seed)(0).images)


def test_a_target_has_few_balanced_images_and_a_source_all(run):
    data = load_images("digits", seed=0)
    cfg = config(labelled=10)
    source, target = recipe.task_of(cfg, run, data, 0, 5), recipe.task_of(cfg, run, data, 5, 10)
    assert len(source.train) == int((data.train.labels < 5).sum())
    assert target.train.labels.bincount().tolist() == [2] * 5
    assert torch.equal(target.test.labels, data.test.labels[data.test.labels >= 5] - 5)
    assert len(recipe.task_of(config(labelled=0), run, data, 5, 10).train) == int((data.train.labels >= 5).sum())
    every = int((data.train.labels >= 5).sum())
    assert len(recipe.task_of(config(labelled=every), run, data, 5, 10).train) == every


def test_half_precision_trains_all_that_should_learn(tmp_path):
    with Run(tmp_path / "run", 0, engine=make("local", "cpu", "bf16"), store=Store(tmp_path / "store"), plots=False) as run:
        seen = traced(run, {"rounds": 1})
    assert all(map(math.isfinite, seen.metrics.values()))
    for name in ("model", "model'", "model''", "student"):
        names = [name for name, _ in seen.nets[name].named_parameters()]
        still = {n for n, before, after in zip(names, seen.first[name], weights(seen.nets[name])) if torch.equal(before, after)}
        assert still <= {"encoder.head.weight", "encoder.head.bias"}  # nothing looks at the head before fine-tuning


def test_pictures_show_the_images_themselves(model, digits):
    grid = recipe.reconstructions(model, digits.test, 4)
    images = digits.test.images()[:4]
    assert grid.shape == (12, 1, 8, 8)
    torch.testing.assert_close(grid[:4], images)
    hidden = grid[4:8] == 0.5
    assert torch.equal(grid[8:][~hidden], images[~hidden])


def test_vit_mae_takes_the_real_path(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**MAE)).save_pretrained(tmp_path / "mae")
    processor = {"do_resize": True, "size": 8, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_processor_type": "ViTImageProcessor"}
    (tmp_path / "mae" / "preprocessor_config.json").write_text(json.dumps(processor))
    with start(tmp_path / "run") as run:
        metrics = recipe.main(config(**MADE, model=f"hf:{tmp_path / 'mae'}", steps=4, finetune_dropout=0.1), run)
    assert all(map(math.isfinite, metrics.values()))
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "student")
    assert (model.config.model_type, model.config.num_labels) == ("vit", 10)


def test_masked_language_models_take_the_real_path(tmp_path):
    transformers = pytest.importorskip("transformers")
    for split, count in (("train", 12), ("test", 8)):
        lines = [json.dumps({"text": " ".join("abc" if i % 2 else "hij") + " d e", "label": i % 2}) for i in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    changes = {
        **MADE,
        "kind": "texts",
        "data": str(tmp_path),
        "model": f"hf:{bert(tmp_path / 'bert')}",
        "mask_ratio": 0.3,
        "labelled": 8,
        "steps": 4,
    }
    with start(tmp_path / "run") as run:
        metrics = recipe.main(config(**changes), run)
    assert all(map(math.isfinite, metrics.values()))
    assert transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student").config.num_labels == 2
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "student").mask_token == "[MASK]"


def test_bad_input_is_named(tmp_path, digits, model):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b"}')
    (tmp_path / "texts" / "test.jsonl").write_text("{")
    texts = {"kind": "texts", "model": f"hf:{bert(tmp_path / 'bert')}", **MADE}
    for changes, message in (
        ({"source_classes": 10}, "leaves no target"),
        ({"labelled": 500}, "more than the"),
        ({"model": "small:convnet"}, "needs patches"),
        ({"model": "small:vit-p3-w16-d1"}, "patches of 3"),
        ({"mae_weight": 0.0, "kd_weight": 0.0}, "nothing to learn"),
        ({"text_length": 9}, "--text-length 9 has no effect on images"),
        ({**MADE, "model": f"hf:{tmp_path / 'none'}", "source_classes": 3}, "--source-classes 3 has no effect on a checkpoint"),
        ({"model": f"hf:{tmp_path / 'none'}"}, "--checkpoint-steps 3 has no effect on a checkpoint"),
        ({**MADE, "model": f"hf:{tmp_path / 'none'}"}, "could not be loaded"),
        ({**texts, "data": str(tmp_path / "none")}, "no training or no test texts"),
        ({**texts, "data": str(tmp_path / "texts")}, "row 2: text and label"),
        ({**texts, "model": "small:vit-p2-w32-d3"}, "names no model"),
        ({**texts, "image_size": 9}, "--image-size 9 has no effect on texts"),
        ({**texts, "skip_bad": True}, "--skip-bad True has no effect on texts"),
        ({**texts, "finetune_augment": "shift"}, "--finetune-augment shift has no effect on texts"),
        ({**texts, "checkpoint_batch": 7}, "--checkpoint-batch 7 has no effect on texts"),
    ):
        with start(tmp_path / "run") as run, pytest.raises(UserError, match=message):
            recipe.main(config(**changes), run)
    with start(tmp_path / "run") as run, pytest.raises(UserError, match="has no effect on a checkpoint"):
        recipe.main(config(), run, data=digits, student=model)


def test_a_given_model_is_the_checkpoint_and_given_data_the_target(run, digits, model):
    before = [t.clone() for t in weights(model)]
    seen = traced(run, {**MADE, "rounds": 0, "steps": 1}, data=digits, student=model)
    assert equal(seen.first["model"], before)
    assert equal(weights(model), before)
    assert seen.calls("task_of")[0].result.classes == digits.classes
    assert seen.nets["student"].head.out_features == 10


def test_claims_speak_of_arms_that_are_there(run):
    assert {arm for claim in recipe.CLAIMS for arm in (claim.arm, claim.versus)} == recipe.ARMS.keys()
    assert {claim.metric for claim in recipe.CLAIMS} == {"heldout", "distance", "accuracy"}
    assert recipe.ARMS["twice as long"]["steps"] == 2 * recipe.Config().steps


def test_a_stopped_run_ends_bitwise_like_a_straight_one(tmp_path):
    result = assert_resumes("further-pretraining", tmp_path, 20, SMALL)  # in round 1, after the checkpoint and round 0
    assert set(result["metrics"]) == {"heldout", "distance", "accuracy"}
