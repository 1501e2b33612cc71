"""The distillation task that every contender solves, and the protocol by which `bench.kd` asks its process to.

A contender reads one JSON request per line and answers each with one JSON line. All see the same images, initial weights, batches
in the same order, fused AdamW and loss; what differs is the library. Images are in memory and a batch is one slice of them, which is
generous to libraries whose users would go through a DataLoader that collates single samples.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from stillroom.data.batches import Batches
from stillroom.data.embedded import digits, shapes
from stillroom.data.images import ImageData
from stillroom.metrics.classification import evaluate
from stillroom.nets.build import build

LR, DECAY, TEMPERATURE, CE_WEIGHT, KD_WEIGHT = 2e-3, 1e-2, 4.0, 0.1, 0.9


@dataclass(frozen=True)
class Setting:
    data: Callable[[], ImageData]
    student: str
    teacher: str
    batch: int
    steps: int


SETTINGS = {
    "digits 8x8": Setting(lambda: digits(0, labelled=300, transfer=0), "convnet-w4", "convnet-w64", 50, 180),
    "CIFAR-shaped 32x32x3": Setting(lambda: shapes(0, count=600), "resnet8", "resnet20", 50, 12),
}


@dataclass
class Task:
    """One training of one student. teacher: frozen and in eval mode."""

    data: ImageData
    student: nn.Module
    teacher: nn.Module
    batch: int
    steps: int
    seed: int

    @classmethod
    def of(cls, setting: str, seed: int, teacher: str, steps: int | None = None) -> Task:
        s = SETTINGS[setting]
        data = s.data()
        net = network(s.teacher, data, seed)
        net.load_state_dict(load_file(teacher))
        return cls(data, network(s.student, data, seed), net.eval().requires_grad_(False), s.batch, steps or s.steps, seed)

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(index, image, label) of every step."""
        batches = Batches(self.data.train, self.batch, self.seed)
        return (batches(step) for step in range(self.steps))

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), LR, weight_decay=DECAY, fused=True)


class Pairs(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """A task's batches as the items of a dataset, for libraries that own their loop; `loader` gives them one by one."""

    def __init__(self, task: Task):
        self.task, self.batches = task, Batches(task.data.train, task.batch, task.seed)

    def __len__(self) -> int:
        return self.task.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        _, image, label = self.batches(step)
        return image, label

    def loader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(self, batch_size=None, shuffle=False)


def network(name: str, data: ImageData, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build(name, classes=len(data.classes), channels=data.channels, size=data.size, mean=data.mean, std=data.std)


def serve(train: Callable[..., float]) -> None:
    """Answer requests until the input ends. `train(task, **options)` trains task.student and returns the CPU seconds of its loop."""
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints goes to stderr
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        task = Task.of(request["setting"], request["seed"], request["teacher"], request.get("steps"))
        seconds = train(task, **request["options"])
        logits, labels = evaluate(task.student, task.data.test)
        answer = {
            "ms": 1e3 * seconds / task.steps,
            "accuracy": (logits.argmax(1) == labels).double().mean().item(),
            "nll": F.cross_entropy(logits.double(), labels).item(),
        }
        print(json.dumps(answer), file=answers, flush=True)


def declare_torchvision_operators() -> None:
    """torchvision's default wheel cannot load its compiled part beside a CPU-only torch, and its import then misses these operators."""
    global _declared
    _declared = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_declared: torch.library.Library
