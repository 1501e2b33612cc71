"""A teacher's answers for the images of a split: looked up where they can be, computed where they must be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stillroom.core.run import Run
from stillroom.data.batches import Batches
from stillroom.data.images import Split
from stillroom.losses.divergences import soft_cross_entropies
from stillroom.metrics.classification import evaluate

Signal = Callable[[Tensor, Tensor], Tensor]
Terms = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def logits(run: Run, teacher: nn.Module, images: Split, *, augmented: bool) -> Signal:
    """`signal(index, image)` gives the frozen teacher's logits (B, C) for a batch's rows and images, without gradient.

    When the student sees the images as they are, all logits are computed once and kept in the store; with augmentation the teacher
    answers online, for the very view that the student sees (Beyer et al. 2022, "consistent teaching").
    """
    if augmented:
        return lambda index, image: _answer(teacher, image)
    table = _kept(run, teacher, images)
    return lambda index, image: table[index]


def labels_and_teacher(
    run: Run, teacher: nn.Module, batches: Batches, temperature: float, *, ce_weight: float, kd_weight: float, augmented: bool
) -> Terms:
    """`terms(logits, index, image, label, every)` gives, for a student's logits (B, C) on a batch's rows, the two scalars

        ce_weight CE(logits, labels)    and    kd_weight KL( softmax(teacher logits / T) || softmax(logits / T) ),

    the mean over the images that have a label (-1 is none; 0 where none has one) and the mean over all. The teacher is looked up or asked
    as in `logits`. every: the labels of the whole batch, which the images may be one process's share of.

    Fast beside a network of a millisecond: both targets lie in one table, weights included, and meet the student under one softmax. The
    entropy of the teacher's answer, which has no gradient, is taken off the second term where it is logged.
    """
    images, rows = batches.split, batches.size // (run.world * run.accumulate)
    weights = torch.tensor([ce_weight, kd_weight], device=run.device).view(2, 1, 1) / rows
    temperatures = torch.tensor([1.0, temperature], device=run.device).view(2, 1, 1)
    partly = bool((images.labels < 0).any())

    def both(label: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The labels, one-hot, and the teacher's softmax (2, B, C), and the latter's entropy (B,), times their weights."""
        one_hot = label.unsqueeze(1) == torch.arange(logits.shape[1], device=logits.device)
        p = (logits.float() / temperature).softmax(-1)
        return torch.stack([one_hot.float(), p]) * weights, torch.special.entr(p).sum(-1) * weights[1, 0]

    table = None if augmented else both(images.labels.to(run.device), _kept(run, teacher, images))

    def terms(logits: Tensor, index: Tensor, image: Tensor, label: Tensor, every: Tensor) -> tuple[Tensor, Tensor]:
        if table is None:
            targets, entropy = both(label, _answer(teacher, image))
        else:
            targets, entropy = table[0].index_select(1, index), table[1]
        if partly:
            targets[0] *= len(every) / (every >= 0).sum().clamp_min(1)
        ce, kd = soft_cross_entropies(logits, targets, temperatures)
        if run.log_now:
            kd = kd - (entropy if table is None else entropy.index_select(0, index)).sum()
        return ce, kd

    return terms


@torch.no_grad()
def _answer(teacher: nn.Module, image: Tensor) -> Tensor:
    return teacher(image)


def _kept(run: Run, teacher: nn.Module, images: Split) -> Tensor:
    return run.cached("teacher-logits", _table, teacher, images)["logits"]


def _table(teacher: nn.Module, images: Split) -> dict[str, Tensor]:
    return {"logits": evaluate(teacher, images)[0]}
