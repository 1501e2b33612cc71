"""A teacher's answers for the images of a split: looked up where they can be, computed where they must be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stillroom.data.images import Split
from stillroom.metrics.classification import evaluate
from stillroom.run import Run

Signal = Callable[[Tensor, Tensor], Tensor]


def logits(run: Run, teacher: nn.Module, images: Split, *, augmented: bool) -> Signal:
    """`signal(index, image)` gives the frozen teacher's logits (B, C) for a batch's rows and images, without gradient.

    When the student sees the images as they are, all logits are computed once and kept in the store; with augmentation the teacher
    answers online, for the very view that the student sees (Beyer et al. 2022, "consistent teaching").
    """
    if augmented:
        return lambda index, image: _answer(teacher, image)
    table = _kept(run, teacher, images)
    return lambda index, image: table[index]


def soft_targets(run: Run, teacher: nn.Module, images: Split, temperature: float, *, augmented: bool) -> Signal:
    """`signal(index, image)` gives softmax(teacher logits / temperature) (B, C); see `logits`. Looked-up targets are softened once."""
    if augmented:
        return lambda index, image: (_answer(teacher, image) / temperature).softmax(-1)
    table = (_kept(run, teacher, images) / temperature).softmax(-1)
    return lambda index, image: table[index]


@torch.no_grad()
def _answer(teacher: nn.Module, image: Tensor) -> Tensor:
    return teacher(image)


def _kept(run: Run, teacher: nn.Module, images: Split) -> Tensor:
    return run.cached("teacher-logits", _table, run.unwrap(teacher), images)["logits"]


def _table(teacher: nn.Module, images: Split) -> dict[str, Tensor]:
    return {"logits": evaluate(teacher, images)[0]}
