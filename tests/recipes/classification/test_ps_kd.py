"""PS-KD's sharp edges: targets by sample index from the epoch before, the ramp, smoothing, the first epoch, and a_T = 0."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from stillroom import cli
from stillroom.core.config import check
from stillroom.core.run import Run
from stillroom.data.batches import Batches
from stillroom.data.embedded import digits
from stillroom.recipes.classification import ps_kd
from stillroom.testing import Trace, trace
from tests.recipes.common import assert_resumes

DATA = digits(0, labelled=40, transfer=0)  # 15 does not divide 40: some samples are not visited in epoch 1
SMALL = {"epochs": 4, "batch_size": 15, "student": "small:mlp-32"}


def test_equations() -> None:
    labels, past = torch.tensor([[0.0, 1.0, 0.0, 0.0]]), torch.tensor([[0.5, 0.25, 0.25, 0.0]])
    torch.testing.assert_close(ps_kd.softened(labels, past, 0.8), torch.tensor([[0.4, 0.4, 0.2, 0.0]]))
    torch.testing.assert_close(ps_kd.smoothed(labels, 0.2), torch.tensor([[0.05, 0.85, 0.05, 0.05]]))
    cfg = ps_kd.Config(epochs=5, past_weight=0.8)
    assert [ps_kd.weight_of(cfg, epoch) for epoch in (1, 3, 5)] == pytest.approx([0.16, 0.48, 0.8])
    assert {ps_kd.weight_of(dataclasses.replace(cfg, ramp="constant"), epoch) for epoch in (1, 3, 5)} == {0.8}


def visits(run: Run, changes: dict) -> tuple[Trace, list[tuple[Tensor, Tensor]]]:
    """A trace, and of every step the rows and the student's logits on them."""
    seen = trace(ps_kd, run, {**SMALL, **changes}, watch=["soft_cross_entropy"], data=DATA)
    batches = Batches(DATA.train, 15, 0)
    calls = [call for call in seen.calls("student") if call.training]
    assert len(calls) == 8  # two batches an epoch
    assert all(torch.equal(call.args[0], batches(step).images) for step, call in enumerate(calls))
    return seen, [(batches(step).index, call.result) for step, call in enumerate(calls)]


@pytest.mark.parametrize("changes", [{}, {"ramp": "constant"}, {"past_weight": 0.0}, {"smoothing": 0.3}, {"past_weight": 0.5}], ids=str)
def test_every_target_is_the_label_and_the_last_prediction_for_this_sample(changes: dict, run: Run) -> None:
    """A dict of past predictions by sample, as the reference keeps it, from the very logits of the trace."""
    seen, visited = visits(run, changes)
    memory: dict[int, Tensor] = {}
    smoothing, top = changes.get("smoothing", 0.0), changes.get("past_weight", 0.8)
    for step, (index, logits) in enumerate(visited):
        alpha = top if "ramp" in changes else top * (step // 2 + 1) / 4
        hard = torch.full((15, 10), smoothing / 10)
        hard[torch.arange(15), DATA.train.labels[index]] += 1 - smoothing
        soft = torch.stack([memory.get(int(i), hard[k]) for k, i in enumerate(index)])
        given, target = seen.calls("soft_cross_entropy")[step].args
        assert torch.equal(given, logits)
        torch.testing.assert_close(target, (1 - alpha) * hard + alpha * soft)
        loss = -(target.double() * logits.double().log_softmax(1)).sum(1)
        torch.testing.assert_close(seen.updates("student")[step].parts["loss"].double(), loss, atol=1e-5, rtol=1e-5)
        memory |= {int(i): p for i, p in zip(index, logits.softmax(-1), strict=True)}
        assert seen.logged[step]["past_weight"] == pytest.approx(alpha)
    past = run._tracked["past"]
    assert len(memory) > 30
    for i, p in memory.items():
        torch.testing.assert_close(past[i], p)
    torch.testing.assert_close(past.sum(1), torch.ones(40))
    assert all(update.moved == {"student"} for update in seen.updates())


def test_labels_noise_and_augmentation(run: Run, tmp_path) -> None:
    """A share of the labels of the images used is replaced; the student sees augmented views."""
    found = []
    for noise in (0.0, 1.0):
        with Run(tmp_path / str(noise), 0, plots=False) as run:
            seen = trace(ps_kd, run, {"labelled": 32, "noise": noise, "augment": "shift"}, watch=["soft_cross_entropy"])
        assert len(seen.steps("student")) == 2
        found.append(seen)
    first, noisy = (seen.calls("soft_cross_entropy")[0].args[1].argmax(1) for seen in found)
    assert 0 < (first == noisy).sum() < 10
    views = [call.args[0] for call in found[0].calls("student") if call.training]
    plain = digits(0, labelled=32, transfer=0).train
    assert not torch.equal(views[0], Batches(plain, 32, 0)(0).images)
    assert [row["name"] for row in run.rows] == ["student"]
    assert (run.folder / "student" / "model.safetensors").is_file()


def test_the_memory_survives_a_kill(tmp_path) -> None:
    assert_resumes("ps-kd", tmp_path, after=10)
    check(ps_kd.full())


def test_the_command(tmp_path, capsys) -> None:
    assert cli.main(["run", "ps-kd", "--out", str(tmp_path / "r"), "--epochs", "1", "--labelled", "32", "--quiet"]) == 0
    assert "student: ps-kd" in capsys.readouterr().out
    assert cli.main(["run", "ps-kd", "--past-weight", "1.2"]) == 2
    assert "--past-weight 1.2 is out of range" in capsys.readouterr().err
