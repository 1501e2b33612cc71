"""A teacher's answers for the images of a split: looked up where they can be, computed where they must be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stillroom.core.run import Run
from stillroom.data.images import Split
from stillroom.metrics.classification import evaluate

Signal = Callable[[Tensor, Tensor], Tensor]
Answers = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def logits(run: Run, teacher: nn.Module, images: Split, *, augmented: bool) -> Signal:
    """`signal(index, image)` gives the frozen teacher's logits (B, C) for a batch's rows and images, without gradient.

    When the student sees the images as they are, all logits are computed once and kept in the store; with augmentation the teacher
    answers online, for the very view that the student sees (Beyer et al. 2022, "consistent teaching").
    """
    if augmented:
        return lambda index, image: _answer(teacher, image)
    table = _kept(run, teacher, images)
    return lambda index, image: table[index]


def answers(run: Run, teacher: nn.Module, images: Split, temperature: float, weights: Tensor, *, augmented: bool) -> Answers:
    """`answers(index, image, label, every)` gives the two distributions that a student learns (2, B, C), without gradient: the labels,
    one-hot, and softmax(teacher logits / temperature), looked up or asked for as in `logits`, each times its weight of `weights` (2,).

    every: the labels of the whole batch, which the images may be one process's share of. Where only n of its N images have one (-1 is
    none), rows of labels are N / n times their weight, or zero, so that the mean of their cross-entropy over the batch is the mean over
    the labelled images; where none has one, all are zero.
    """
    partly = bool((images.labels < 0).any())

    def both(label: Tensor, logits: Tensor) -> Tensor:
        one_hot = label.unsqueeze(1) == torch.arange(logits.shape[1], device=logits.device)
        return torch.stack([one_hot.float(), (logits.float() / temperature).softmax(-1)]) * weights.view(2, 1, 1)

    table = None if augmented else both(images.labels.to(run.device), _kept(run, teacher, images))

    def signal(index: Tensor, image: Tensor, label: Tensor, every: Tensor) -> Tensor:
        found = both(label, _answer(teacher, image)) if table is None else table.index_select(1, index)
        if partly:
            found[0] *= len(every) / (every >= 0).sum().clamp_min(1)
        return found

    return signal


@torch.no_grad()
def _answer(teacher: nn.Module, image: Tensor) -> Tensor:
    return teacher(image)


def _kept(run: Run, teacher: nn.Module, images: Split) -> Tensor:
    return run.cached("teacher-logits", _table, teacher, images)["logits"]


def _table(teacher: nn.Module, images: Split) -> dict[str, Tensor]:
    return {"logits": evaluate(teacher, images)[0]}
