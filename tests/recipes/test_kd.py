"""KD: the loss against its closed form, what the teacher's cache may and may not do, and one run end to end."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from stillroom import cli, hub
from stillroom.config import override
from stillroom.data.embedded import digits
from stillroom.optim import Optimizer
from stillroom.recipes.classification import kd
from stillroom.run import Run
from stillroom.teachers import signals

TINY = dataclasses.replace(kd.Config(), steps=12, teacher_steps=12, batch_size=16)


class Spy(Run):
    """Keeps the parts of every update."""

    def update(self, optimizer, loss=None, **parts):
        self.__dict__.setdefault("parts", []).append({k: v.detach().clone() for k, v in parts.items()})
        return super().update(optimizer, loss, **parts)


def test_parts_against_float64(tmp_path) -> None:
    data = digits(0, labelled=40, transfer=60)
    cfg = override(TINY, {"steps": 1, "temperature": 3.0, "ce_weight": 0.3, "kd_weight": 0.7, "batch_size": 100})
    teacher, student = (hub.load_classifier(f"small:{name}", data=data, fresh=True) for name in ("convnet-w8", "convnet-w4"))
    before = {k: v.clone() for k, v in student.state_dict().items()}
    with Spy(tmp_path / "r", 0, plots=False) as run:
        kd.main(cfg, run, data=data, teacher=teacher, student=student)
    student.load_state_dict(before)
    index = torch.arange(100)
    images = torch.cat([data.train.images(), data.transfer.images()])  # type: ignore[union-attr]
    with torch.no_grad():
        z_s, z_t = student.train()(images).double(), teacher.eval()(images).double()
    ce = -z_s[:40].log_softmax(1)[torch.arange(40), data.train.labels].mean()
    p, q = (z_t / 3).softmax(1), (z_s / 3).softmax(1)
    expected = 0.7 * 9 * (p * (p.log() - q.log())).sum(1).mean()
    assert len(index) == 100
    torch.testing.assert_close(run.parts[0]["ce"].double(), 0.3 * ce, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run.parts[0]["kd"].double().mean(), expected, atol=1e-5, rtol=1e-5)


def test_cached_and_online_teacher_say_the_same(run: Run) -> None:
    data = digits(0, labelled=40, transfer=0)
    teacher = run.frozen(hub.load_classifier("small:convnet-w8", data=data, fresh=True))
    batch = data.train.take(torch.tensor([7, 3, 11]))
    cached, online = (signals.logits(run, teacher, data.train, augmented=a)(batch.index, batch.images) for a in (False, True))
    torch.testing.assert_close(cached, online, atol=1e-5, rtol=1e-5)
    soft = [signals.soft_targets(run, teacher, data.train, 3.0, augmented=a)(batch.index, batch.images) for a in (False, True)]
    for found in soft:
        torch.testing.assert_close(found, (online / 3).softmax(1), atol=1e-5, rtol=1e-5)
        assert not found.requires_grad
    assert not cached.requires_grad
    assert not online.requires_grad


def test_teacher_stays_as_it_was_and_gets_no_gradient(run: Run) -> None:
    data = digits(0, labelled=40, transfer=60)
    teacher = hub.load_classifier("small:convnet-w8", data=data, fresh=True)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    kd.main(dataclasses.replace(TINY, augment="shift"), run, data=data, teacher=teacher)
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_without_kd_weight_it_is_plain_training(run: Run) -> None:
    data = digits(0, labelled=48, transfer=60)
    cfg = override(TINY, {**kd.ARMS["plain"], "optimizer": Optimizer("sgd", 0.1)})
    student = hub.load_classifier("small:mlp-16", data=data, fresh=True)
    by_hand = hub.load_classifier("small:mlp-16", data=data, fresh=True)
    by_hand.load_state_dict(student.state_dict())
    kd.main(cfg, run, data=data, student=student)
    from stillroom.data.batches import Batches

    batches, optimizer = Batches(data.train, 16, 0), torch.optim.SGD(by_hand.parameters(), 0.1, momentum=0.9)
    for step in range(12):
        _, image, label = batches(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(by_hand(image), label).backward()
        optimizer.step()
    for a, b in zip(student.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_a_batch_without_labels_has_no_cross_entropy() -> None:
    logits, label = torch.tensor([[0.3, -1.0], [2.0, 0.5], [0.0, 1.0]], requires_grad=True), torch.tensor([1, -1, -1])
    none = kd.labelled_cross_entropy(logits, torch.full((3,), -1))
    none.backward()
    assert none == 0
    assert logits.grad is not None
    assert not logits.grad.any()
    torch.testing.assert_close(kd.labelled_cross_entropy(logits, label), -logits[0].log_softmax(-1)[1])
    every = torch.tensor([0, 1, 1])
    torch.testing.assert_close(kd.labelled_cross_entropy(logits, every), nn.functional.cross_entropy(logits, every))


def test_end_to_end(tmp_path, capsys) -> None:
    words = ["run", "kd", "--out", str(tmp_path / "r"), "--steps", "20", "--teacher-steps", "20", "--quiet"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "teacher" in shown
    assert "student: plain" in shown
    assert "student: kd" in shown
    for name in ("config.json", "metrics.jsonl", "result.json", "report.html", "student/model.safetensors", "baseline/result.json"):
        assert (tmp_path / "r" / name).exists(), name
    again = hub.load_classifier(f"run:{tmp_path / 'r'}", data=digits(0, 50))
    assert sum(p.numel() for p in again.parameters()) == 1702


def test_a_student_teaches_in_turn(tmp_path, capsys) -> None:
    tiny = ["--steps", "10", "--teacher-steps", "10", "--quiet"]
    assert cli.main(["run", "kd", "--out", str(tmp_path / "a"), *tiny]) == 0
    assert cli.main(["run", "kd", "--out", str(tmp_path / "b"), "--teacher", f"run:{tmp_path / 'a'}", "--no-baseline", *tiny]) == 0


def test_transformers_teacher_and_student(tmp_path, capsys) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=10, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    words = ["--teacher", f"hf:{tmp_path / 'vit'}", "--student", f"hf:{tmp_path / 'vit'}", "--steps", "6", "--no-baseline", "--quiet"]
    assert cli.main(["run", "kd", "--out", str(tmp_path / "r"), *words]) == 0
    student = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "r" / "student")
    assert student.config.num_labels == 10
