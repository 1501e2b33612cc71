"""KD: the loss against its closed form, what the teacher's cache may and may not do, and one run end to end."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from stillroom import cli
from stillroom.core.config import override
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.data.embedded import digits
from stillroom.data.images import join
from stillroom.recipes.classification import kd
from stillroom.vision import hub, signals

TINY = dataclasses.replace(kd.Config(), steps=12, teacher_steps=12, batch_size=16)


class Heard(Run):
    """Keeps what every update minimises and what is logged."""

    def update(self, optimizer, loss=None, **parts):
        self.loss = loss.detach().clone()
        return super().update(optimizer, loss, **parts)

    def log(self, **values):
        self.logged = {k: v.detach().clone() for k, v in values.items()}
        super().log(**values)


@pytest.mark.parametrize("augment", ["none", "shift"])
@pytest.mark.parametrize("labelled", [100, 40])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_loss_and_gradient_against_float64(augment, labelled, accumulate, tmp_path, monkeypatch) -> None:
    """All images labelled or some, the teacher looked up or asked, in one piece or two; one plain step tells the gradient."""
    data = digits(0, labelled=labelled, transfer=100 - labelled)
    monkeypatch.setattr(kd, "augmenter", lambda kind, size: lambda image: image)  # so that the view is known; the teacher is asked anyway
    values = {"steps": 1, "temperature": 3.0, "ce_weight": 0.3, "kd_weight": 0.7, "batch_size": 100, "augment": augment}
    cfg = override(TINY, {**values, "optimizer": Optimizer("sgd", 0.1, momentum=0.0)})
    teacher, student = (hub.load_classifier(f"small:{name}", data=data, fresh=True) for name in ("convnet-w8", "mlp-16"))
    exact = copy.deepcopy(student).double().train()
    images, label = data.train.images(), data.train.labels
    if data.transfer is not None:
        images, label = torch.cat([images, data.transfer.images()]), torch.cat([label, data.transfer.labels])
    z_s, z_t = exact(images.double()), teacher.eval()(images).double().detach()
    has = label >= 0
    ce = 0.3 * -z_s[has].log_softmax(1)[torch.arange(int(has.sum())), label[has]].mean()
    p, q = (z_t / 3).softmax(1), (z_s / 3).softmax(1)
    (ce + 0.7 * 9 * (p * (p.log() - q.log())).sum(1).mean()).backward()
    entropy = 0.7 * 9 * -(p * p.log()).sum(1).mean()
    with Heard(tmp_path / "r", 0, accumulate=accumulate, plots=False) as run:
        kd.main(cfg, run, data=data, teacher=teacher, student=student)
    if accumulate == 1:
        kd_term = 0.7 * 9 * (p * (p.log() - q.log())).sum(1).mean() + entropy
        torch.testing.assert_close(run.logged["student/ce"].double(), ce.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(run.logged["student/kd"].double(), kd_term.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(run.loss.double(), (ce + kd_term).detach(), atol=1e-5, rtol=1e-5)
    for mine, other in zip(student.parameters(), exact.parameters(), strict=True):
        assert other.grad is not None
        torch.testing.assert_close(mine.detach().double(), other.detach() - 0.1 * other.grad, atol=1e-6, rtol=1e-5)


def test_cached_and_online_teacher_say_the_same(run: Run) -> None:
    data = digits(0, labelled=40, transfer=0)
    teacher = run.frozen(hub.load_classifier("small:convnet-w8", data=data, fresh=True))
    batch = data.train.take(torch.tensor([7, 3, 11]))
    cached, online = (signals.logits(run, teacher, data.train, augmented=a)(batch.index, batch.images) for a in (False, True))
    torch.testing.assert_close(cached, online, atol=1e-5, rtol=1e-5)
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


@pytest.mark.parametrize("augmented", [False, True])
def test_the_answers_of_a_batch(augmented: bool, run: Run) -> None:
    data = digits(0, labelled=40, transfer=60)
    assert data.transfer is not None
    images = join(data.train, data.transfer)
    teacher = run.frozen(hub.load_classifier("small:convnet-w8", data=data, fresh=True))
    answers = signals.answers(run, teacher, images, 3.0, torch.tensor([1.0, 0.5]), augmented=augmented)
    index, image, label = images.take(torch.tensor([50, 3, 99, 11]))
    one_hot, soft = answers(index, image, label, label)
    assert not one_hot.requires_grad
    assert not soft.requires_grad
    torch.testing.assert_close(soft, 0.5 * (teacher(image) / 3).softmax(1), atol=1e-5, rtol=1e-5)
    assert not one_hot[[0, 2]].any()
    torch.testing.assert_close(one_hot[[1, 3]], 2 * nn.functional.one_hot(label[[1, 3]], 10).float())  # 4 images, 2 labels
    again, _ = answers(index, image, label, label)
    assert torch.equal(again, one_hot)  # what was looked up was not changed in place
    index, image, label = images.take(torch.tensor([50, 99]))
    none, _ = answers(index, image, label, label)
    assert not none.any()


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
