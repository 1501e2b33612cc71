"""KD: the loss against its closed form, who learns from which images, and runs end to end."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from stillroom import cli
from stillroom.core.config import check
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.data.batches import Batches
from stillroom.data.embedded import digits
from stillroom.data.images import join
from stillroom.recipes.classification import kd
from stillroom.testing import trace
from stillroom.vision import hub
from tests.recipes.common import assert_resumes

SGD = Optimizer("sgd", 0.1, momentum=0.0)


@pytest.mark.parametrize("augment", ["none", "shift"])
@pytest.mark.parametrize("labelled", [100, 40])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_loss_and_gradient_against_float64(augment, labelled, accumulate, tmp_path, monkeypatch) -> None:
    """All images labelled or some, the teacher looked up or asked, in one piece or two; one plain step tells the gradient."""
    data = digits(0, labelled=labelled, transfer=100 - labelled)
    monkeypatch.setattr(kd, "augmenter", lambda kind, size: lambda image: image.flip(-1) if kind == "shift" else image)
    changes = {"steps": 1, "temperature": 3.0, "ce_weight": 0.3, "kd_weight": 0.7, "batch_size": 100, "augment": augment, "optimizer": SGD}
    teacher, student = (hub.load_classifier(f"small:{name}", data=data, fresh=True) for name in ("convnet-w8", "mlp-16"))
    exact = copy.deepcopy(student).double().train()
    images, label = data.train.images(), data.train.labels
    if data.transfer is not None:
        images, label = torch.cat([images, data.transfer.images()]), torch.cat([label, data.transfer.labels])
    images = images.flip(-1) if augment == "shift" else images
    z_s, z_t = exact(images.double()), teacher.eval()(images).double().detach()
    has = label >= 0
    ce = 0.3 * -z_s[has].log_softmax(1)[torch.arange(int(has.sum())), label[has]].mean()
    p, q = (z_t / 3).softmax(1), (z_s / 3).softmax(1)
    kl = 0.7 * 9 * (p * (p.log() - q.log())).sum(1).mean()
    (ce + kl).backward()
    with Run(tmp_path / "r", 0, accumulate=accumulate, plots=False) as run:
        seen = trace(kd, run, changes, data=data, teacher=teacher, student=student)
    for name, wanted in (("ce", ce), ("kd", kl)):
        found = seen.losses("student", name)
        assert sum(found) / accumulate == pytest.approx(wanted.item(), rel=1e-4)
        assert len(found) == accumulate
    for own, other in zip(student.parameters(), exact.parameters(), strict=True):
        assert other.grad is not None
        torch.testing.assert_close(own.detach().double(), other.detach() - 0.1 * other.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("augment", ["none", "shift"])
def test_the_student_alone_learns_and_the_teacher_sees_its_view(augment: str, run: Run) -> None:
    data = digits(0, labelled=40, transfer=60)
    teacher = hub.load_classifier("small:convnet-w8", data=data, fresh=True)
    seen = trace(kd, run, {"augment": augment, "batch_size": 8}, data=data, teacher=teacher)
    assert seen.steps("student") == list(range(6))
    assert not seen.moved("frozen 0")
    asked = [call for call in seen.calls("frozen 0") if not call.training and len(call.args[0]) == 8]
    views = [call.args[0] for call in seen.calls("student") if call.training]
    assert len(views) == 6
    assert len(asked) == (6 if augment == "shift" else 0)  # as they are, images are asked for once
    assert all(torch.equal(call.args[0], view) and not call.grad for call, view in zip(asked, views))


def test_the_pool_and_the_labels(run: Run, tmp_path) -> None:
    """All images, labelled first, or those with labels; a plain student sees the latter alone and its teacher is not built."""
    data = digits(0, labelled=20, transfer=30)
    assert data.transfer is not None
    splits = {"all": join(data.train, data.transfer), "labelled": data.train}
    for pool, split in splits.items():
        with Run(tmp_path / pool, 0, plots=False) as run:
            seen = trace(kd, run, {"pool": pool, "steps": 2, "batch_size": 10}, data=data)
        views = [call.args[0] for call in seen.calls("student") if call.training]
        batches = Batches(split, 10, 0)
        assert all(torch.equal(view, batches(step).images) for step, view in enumerate(views))
    with Run(tmp_path / "plain", 0, plots=False) as run:
        seen = trace(kd, run, {**kd.ARMS["plain"], "steps": 3, "batch_size": 10, "ce_weight": 0.5, "optimizer": SGD}, data=data)
    assert list(seen.nets) == ["student"]
    calls, plain = [call for call in seen.calls("student") if call.training], Batches(data.train, 10, 0)
    for step, (call, loss) in enumerate(zip(calls, seen.losses("student", "ce"), strict=True)):
        assert loss == pytest.approx(0.5 * float(nn.functional.cross_entropy(call.result, plain(step).labels)))


def test_the_teacher_is_trained_first_and_measured(run: Run) -> None:
    seen = trace(kd, run, {"steps": 2, "teacher_steps": 3})
    assert seen.steps("teacher", "/teacher") == [0, 1, 2]
    assert seen.recorded[2].roles == ("teacher",)
    assert [row["name"] for row in run.rows] == ["teacher", "student"]
    assert seen.metrics["accuracy"] == run.rows[1]["accuracy"]
    check(kd.full())


def test_as_many_images_keep_their_labels_as_were_asked_for(run: Run) -> None:
    seen = trace(kd, run, {"labelled": 30, "pool": "labelled", "steps": 1, "batch_size": 30})
    view = next(call.args[0] for call in seen.calls("student") if call.training)
    wanted = kd.Config().load(run, labelled=30).train.images()
    assert torch.equal(torch.cdist(view.flatten(1), wanted.flatten(1)).min(1).values, torch.zeros(30))


def test_a_transformers_student_starts_from_fresh_weights(run: Run, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=10, **sizes)
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "vit")
    seen = trace(kd, run, {"kd_weight": 0.0, "ce_weight": 1.0, "steps": 1, "student": f"hf:{tmp_path / 'vit'}"})
    trained = model.classifier.weight
    assert not any(first.shape == trained.shape and torch.equal(first, trained) for first in seen.first["student"])


def test_killed_and_started_again(tmp_path) -> None:
    assert_resumes("kd", tmp_path, after=9)  # in the student's loop


def test_transformers_teacher_and_student_and_the_command(tmp_path, capsys) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=10, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    words = ["--teacher", f"hf:{tmp_path / 'vit'}", "--student", f"hf:{tmp_path / 'vit'}", "--steps", "6", "--quiet"]
    assert cli.main(["run", "kd", "--out", str(tmp_path / "r"), *words]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("teacher", "student: plain", "student: kd"))
    for name in ("config.json", "metrics.jsonl", "result.json", "report.html", "student/model.safetensors", "baseline/result.json"):
        assert (tmp_path / "r" / name).exists(), name
    student = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "r" / "student")
    assert student.config.num_labels == 10
    again = ["--teacher", f"run:{tmp_path / 'r'}", "--steps", "4", "--no-baseline", "--quiet"]  # a student teaches in turn
    assert cli.main(["run", "kd", "--out", str(tmp_path / "s"), *again]) == 0
    assert sum(p.numel() for p in hub.load_classifier(f"run:{tmp_path / 's'}", data=digits(0, 50)).parameters()) == 1702
