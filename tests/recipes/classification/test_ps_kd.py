"""PS-KD's sharp edges: targets by sample index from the epoch before, the ramp, the first epoch, and alpha = 0."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.functional import cross_entropy

from stillroom import cli
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.data.batches import Batches
from stillroom.data.embedded import digits
from stillroom.recipes.classification import ps_kd
from stillroom.vision import hub

SGD = Optimizer("sgd", 0.1)
TINY = dataclasses.replace(ps_kd.Config(), epochs=4, batch_size=15, optimizer=SGD)


def by_hand(data, student, epochs: int, past_weight: float, batch: int = 15) -> tuple[torch.nn.Module, dict[int, torch.Tensor]]:
    """The reference's loop in its own terms: a dict of past predictions by sample, alpha recomputed per epoch from 1."""
    batches, optimizer = Batches(data.train, batch, 0), torch.optim.SGD(student.parameters(), 0.1, momentum=0.9)
    memory: dict[int, torch.Tensor] = {}
    for epoch in range(1, epochs + 1):
        alpha = past_weight * epoch / epochs
        for step in range((epoch - 1) * batches.steps_per_epoch, epoch * batches.steps_per_epoch):
            index, image, label = batches(step)
            hard = torch.eye(10)[label]
            soft = torch.stack([memory.get(int(i), hard[k]) for k, i in enumerate(index)])
            logits = student(image)
            loss = cross_entropy(logits, (1 - alpha) * hard + alpha * soft)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            memory |= {int(i): p for i, p in zip(index, logits.detach().softmax(-1), strict=True)}
    return student, memory


@pytest.mark.parametrize("past_weight", [0.8, 0.0])
def test_equals_the_loop_by_hand(past_weight: float, run: Run) -> None:
    data = digits(0, labelled=40, transfer=0)  # 15 does not divide 40: some samples are not visited in epoch 1
    student, other = (hub.load_classifier("small:mlp-32", data=data, fresh=True) for _ in range(2))
    other.load_state_dict(student.state_dict())
    ps_kd.main(dataclasses.replace(TINY, past_weight=past_weight), run, data=data, student=student)
    expected, memory = by_hand(data, other, 4, past_weight)
    for a, b in zip(student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    past = run._tracked["past"]
    for i, p in memory.items():
        torch.testing.assert_close(past[i], p, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(past.sum(1), torch.ones(40))


def test_weight_zero_is_plain_training_bit_for_bit(tmp_path) -> None:
    ends = []
    for name, changes in {"a": {"past_weight": 0.0}, "b": {"past_weight": 0.0, "ramp": "constant"}}.items():
        with Run(tmp_path / name, 0, plots=False) as run:
            data = digits(0, labelled=40, transfer=0)
            student = hub.load_classifier("small:mlp-32", data=data, fresh=True)
            ps_kd.main(dataclasses.replace(TINY, **changes), run, data=data, student=student)
        ends.append([p.detach() for p in student.parameters()])
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_the_memory_survives_a_kill(tmp_path) -> None:
    class Stopping(Run):
        dies = False

        def update(self, *args, **parts):
            if self.dies and self.finite.step == 5:
                raise RuntimeError("killed")
            return super().update(*args, **parts)

    def train(name: str, dies: bool = False) -> torch.Tensor:
        with Stopping(tmp_path / name, 0, plots=False, save_seconds=0.0) as run:
            run.dies = dies
            ps_kd.main(dataclasses.replace(TINY, labelled=40), run)
            return run._tracked["past"]

    with pytest.raises(RuntimeError, match="killed"):
        train("killed", dies=True)
    assert torch.equal(train("killed"), train("straight"))


def test_end_to_end(tmp_path, capsys) -> None:
    assert cli.main(["run", "ps-kd", "--out", str(tmp_path / "r"), "--epochs", "3", "--quiet"]) == 0
    assert "student: ps-kd" in capsys.readouterr().out
    assert cli.main(["run", "ps-kd", "--past-weight", "1.2"]) == 2
    assert "--past-weight 1.2 is out of range" in capsys.readouterr().err
