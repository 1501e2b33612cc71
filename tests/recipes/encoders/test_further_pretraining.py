import copy
import json
import math
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from stillroom.catalogue.execute import execute
from stillroom.core.config import override
from stillroom.core.engine import make
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.run import Interrupted, Run
from stillroom.core.store import Store
from stillroom.data.load import load_images
from stillroom.recipes.encoders import further_pretraining as recipe
from stillroom.testing import assert_grads
from stillroom.vision.masked import load_masked_images
from tests.adapt.test_masked import MAE, bert

SMALL = {
    "model": "small:vit-p4-w16-d1", "limit": 120, "checkpoint_steps": 5, "checkpoint_batch": 16, "labelled": 10, "batch_size": 5,
    "steps": 10, "finetune_steps": 4, "finetune_batch": 5,
}  # fmt: skip
SGD = Optimizer("sgd", 0.1)


def config(**changes):
    return override(recipe.Config(), SMALL | changes)


def start(folder, **settings) -> Run:
    return Run(folder, 0, engine=make("local", "cpu"), store=Store(folder.parent / "store"), **settings)


@pytest.fixture
def digits():
    return load_images("digits", seed=0, limit=30)


@pytest.fixture
def model(digits):
    torch.manual_seed(0)
    return load_masked_images("small:vit-p4-w16-d1", data=digits, ratio=0.75)


def test_distance_is_summed_over_dimensions_and_stops_at_the_teacher(model, digits, tmp_path):
    """One plain SGD step on the distillation term alone, against the gradient of (1/B) sum_b |h - h_T|^2 written out."""
    torch.manual_seed(1)
    teacher, images = copy.deepcopy(model), digits.train.images()
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    h, known = model.encoder.features(images), teacher.encoder.features(images)
    loss = sum((h[b, i] - known[b, i].detach()) ** 2 for b in range(len(images)) for i in range(16)) / len(images)
    assert_grads(loss, to=[model.encoder], not_to=[teacher, model.decoder])
    expected = torch.autograd.grad(loss, model.encoder.norm.weight)[0]
    with start(tmp_path / "run", plots=False) as run:
        plain = Optimizer("sgd", 0.1, momentum=0.0)
        after, _ = recipe.pretrain(run, (1, 100, plain, 0.0, 1.0), model, teacher, digits.train, digits.test)
    torch.testing.assert_close((model.encoder.norm.weight - after.encoder.norm.weight) / 0.1, expected, rtol=1e-3, atol=1e-5)


def test_both_losses_in_one_step_are_two_backward_calls(model, digits):
    images, known = digits.train.images(), torch.randn(30, 16)
    two = copy.deepcopy(model)
    for which in ("mae", "kd"):
        torch.manual_seed(5)
        values, hidden = two(images)
        (values.mean() if which == "mae" else (hidden - known).square().sum(-1).mean()).backward()
    torch.manual_seed(5)
    values, hidden = model(images)
    (values + (hidden - known).square().sum(-1)).mean().backward()
    for a, b in zip(model.parameters(), two.parameters()):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_students_restart_from_the_checkpoint_with_a_new_optimizer(tmp_path, monkeypatch):
    seen = []

    def watch(stage, settings, begin, teacher, train, test):
        seen.append((settings, begin, teacher))
        model = copy.deepcopy(begin)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01)
        return model, torch.zeros(recipe.POINTS)

    monkeypatch.setattr(recipe, "pretrain", watch)
    for begins, arm in (("checkpoint", {"rounds": 2}), ("teacher", {"rounds": 2, "start": "teacher"})):
        seen.clear()
        with start(tmp_path / begins, plots=False) as run:
            recipe.main(config(**arm), run)
        _, first, second, third = seen
        assert first[2] is None  # round 0 has no teacher
        weight = lambda net: net.encoder.embed.weight
        assert torch.equal(weight(second[1]), weight(first[1])) == (begins == "checkpoint")
        torch.testing.assert_close(weight(second[2]), weight(first[1]) + 0.01)  # the teacher is the previous round
        shift = 0.01 if begins == "checkpoint" else 0.02
        torch.testing.assert_close(weight(third[2]), weight(first[1]) + shift)


def test_a_student_of_its_own_start_has_nothing_to_distil(model, digits, tmp_path):
    with start(tmp_path / "run", plots=False) as run:
        after, _ = recipe.pretrain(run, (3, 10, SGD, 0.0, 1.0), model, model, digits.train, digits.test)
    assert recipe.distance(after, model) == 0.0


def test_only_matrices_decay():
    tensors = [torch.nn.Parameter(torch.ones(shape)) for shape in ((4, 3), (4,), (1, 1, 4), (1, 9, 4), (4, 1, 2, 2))]
    optimizer = Optimizer("adamw", 0.1, weight_decay=0.5, decay="matrices")(tensors)
    for p in tensors:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert [float(p.detach().flatten()[0]) != 1 for p in tensors] == [True, False, False, False, True]
    assert len(Optimizer("adamw", 0.1)(tensors).param_groups) == 1


def test_held_out_error_has_fixed_masks_and_draws_nothing_from_the_run(model, digits):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, second = (recipe.heldout(model, digits.test) for _ in range(2))
    assert first == second
    assert torch.equal(torch.rand(2), expected)
    assert model.training


def test_pictures_show_the_images_themselves(model, digits):
    grid = recipe.reconstructions(model, digits.test, 4)
    images = digits.test.images()[:4]
    assert grid.shape == (12, 1, 8, 8)
    torch.testing.assert_close(grid[:4], images)
    hidden = grid[4:8] == 0.5
    assert torch.equal(grid[8:][~hidden], images[~hidden])


@pytest.mark.parametrize("arm", recipe.ARMS)
def test_every_arm_runs(arm, tmp_path):
    changes = recipe.ARMS[arm] | ({"steps": 12} if recipe.ARMS[arm].get("steps") else {})
    with start(tmp_path / "run", plots=arm == "self-distillation") as run:
        result = execute("further-pretraining", config(**changes), run)
    assert set(result["metrics"]) == {"heldout", "distance", "accuracy"}
    assert all(map(math.isfinite, result["metrics"].values()))
    assert (result["metrics"]["distance"] == 0) == (arm == "fine-tuning")
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()
    if arm == "self-distillation":
        assert len(list((tmp_path / "run" / "samples").iterdir())) == 2


def test_a_stopped_run_ends_bitwise_like_a_straight_one(tmp_path, monkeypatch):
    def weights(folder):
        with start(folder, plots=False) as run:
            metrics = recipe.main(config(), run)
        return metrics, load_file(folder / "student" / "model.safetensors")

    straight, update, calls = weights(tmp_path / "a" / "run"), Run.update, iter(range(10**6))

    def stopping(self, *args, **parts):
        if next(calls) == 19:  # in round 1, after 5 and 10 steps of checkpoint and round 0
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, *args, **parts)

    monkeypatch.setattr(Run, "update", stopping)
    with pytest.raises(Interrupted):
        weights(tmp_path / "b" / "run")
    resumed = weights(tmp_path / "b" / "run")
    assert resumed[0] == straight[0]
    assert all(torch.equal(resumed[1][k], straight[1][k]) for k in straight[1])


def test_vit_mae_takes_the_real_path(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**MAE)).save_pretrained(tmp_path / "mae")
    processor = {"do_resize": True, "size": 8, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_processor_type": "ViTImageProcessor"}
    (tmp_path / "mae" / "preprocessor_config.json").write_text(json.dumps(processor))
    with start(tmp_path / "run") as run:
        metrics = recipe.main(config(model=f"hf:{tmp_path / 'mae'}", steps=4, finetune_dropout=0.1), run)
    assert all(map(math.isfinite, metrics.values()))
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "student")
    assert (model.config.model_type, model.config.num_labels) == ("vit", 10)


def test_masked_language_models_take_the_real_path(tmp_path):
    transformers = pytest.importorskip("transformers")
    for split, count in (("train", 12), ("test", 8)):
        lines = [json.dumps({"text": " ".join("abc" if i % 2 else "hij") + " d e", "label": i % 2}) for i in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    changes = {
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


def test_bad_input_is_named(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b"}')
    (tmp_path / "texts" / "test.jsonl").write_text("{")
    texts = {"kind": "texts", "model": f"hf:{bert(tmp_path / 'bert')}"}
    for changes, message in (
        ({"source_classes": 10}, "leaves no target"),
        ({"labelled": 500}, "more than the"),
        ({"model": "small:convnet"}, "needs patches"),
        ({"model": "small:vit-p3-w16-d1"}, "patches of 3"),
        ({**texts, "data": str(tmp_path / "none")}, "no training or no test texts"),
        ({**texts, "data": str(tmp_path / "texts")}, "row 2: text and label"),
        ({"kind": "texts", "model": "small:vit-p2-w32-d3"}, "names no model"),
    ):
        with start(tmp_path / "run", plots=False) as run, pytest.raises(UserError, match=message):
            recipe.main(config(**changes), run)


def test_teacher_answers_without_dropout_mask_or_gradient(model, digits, tmp_path):
    calls = []

    class Watched(type(model)):
        def forward(self, inputs, **which):
            calls.append((self.training, torch.is_grad_enabled(), which, any(p.requires_grad for p in self.parameters())))
            return super().forward(inputs, **which)

    teacher = copy.deepcopy(model)
    teacher.__class__ = Watched
    with start(tmp_path / "run", plots=False) as run:
        recipe.pretrain(run, (2, 10, SGD, 1.0, 1.0), model, teacher, digits.train, digits.test)
    assert calls == [(False, False, {"masked": False}, False)] * 2
    assert teacher.training  # the one that was given is left as it was
