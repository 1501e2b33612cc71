"""Divergences between next-token distributions, on rows that the caller has already aligned.

Position t of the logits predicts token t+1: call `align` once, then everything here takes rows (N, V) and labels (N,). One value per
row comes back, and `token_mean` divides by the kept tokens of the whole effective batch. To the general `divergences` this adds, with
teacher p and student q (Ko et al. 2024, DistiLLM, from memory),

    skew_kl          KL(p || a p + (1-a) q)          skew_reverse_kl  KL(q || (1-a) q + a p)          total_variation  1/2 sum |p - q|

A word that one side excludes with a logit of -inf (padded vocabularies) costs nothing where its own probability is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import log
from typing import Literal

import torch
from torch import Tensor

from stillroom.losses.divergences import jsd, kl, reverse_kl

IGNORE = -100
"""Label of a position that neither the hard nor the soft loss trains."""

Name = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation"]
Divergence = Name | Callable[[Tensor, Tensor], Tensor]
"""A name, or any function of teacher and student logits such as partial(jsd, beta=0.1), one value per row."""


def align(states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (B*(L-1), D) of states (B, L, D), hidden or logits, beside the labels (B*(L-1),) of the token each one predicts."""
    return states[:, :-1].reshape(-1, states.shape[-1]), labels[:, 1:].reshape(-1)


def _mix(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b); words that both exclude stay at -inf without a NaN gradient."""
    empty = (log_a == -torch.inf) & (log_b == -torch.inf)
    mixed = torch.logaddexp(log_a.masked_fill(empty, 0.0) + log(share), log_b.masked_fill(empty, 0.0) + log(1 - share))
    return mixed.masked_fill(empty, -torch.inf)


def skew_kl(teacher: Tensor, student: Tensor, skew: float = 0.1) -> Tensor:
    """KL(p || skew p + (1 - skew) q) from logits (N, V) -> (N,)."""
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return kl(log_p, _mix(log_p, log_q, skew))


def skew_reverse_kl(teacher: Tensor, student: Tensor, skew: float = 0.1) -> Tensor:
    """KL(q || skew p + (1 - skew) q) from logits (N, V) -> (N,)."""
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return kl(log_q, _mix(log_p, log_q, skew))


def total_variation(teacher: Tensor, student: Tensor) -> Tensor:
    """Half the L1 distance of the distributions, from logits (N, V) -> (N,)."""
    return 0.5 * (teacher.softmax(-1) - student.softmax(-1)).abs().sum(-1)


BY_NAME: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": kl,
    "reverse_kl": reverse_kl,
    "jsd": partial(jsd, beta=0.5),
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
}


def tempered(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Logits / temperature in float32 (float64 stays); a temperature of shape (N,) is one per row."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if isinstance(temperature, Tensor):
        temperature = temperature.to(logits).unsqueeze(-1)
    return logits if isinstance(temperature, float) and temperature == 1 else logits / temperature


def divergence(
    teacher: Tensor, student: Tensor, kind: Divergence = "forward_kl", temperature: float | Tensor = 1.0, *, times_t2: bool = False
) -> Tensor:
    """One divergence per row from the logits (N, V) of both; no gradient reaches the teacher.

    `times_t2` multiplies by temperature^2, which keeps the gradient's size when the temperature changes (classical KD does, language
    model libraries do not).
    """
    measure = BY_NAME[kind] if isinstance(kind, str) else kind
    values = measure(tempered(teacher.detach(), temperature), tempered(student, temperature))
    return values * temperature**2 if times_t2 else values


def reduce(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(sum over the kept tokens, their number) of values (N,) under labels (N,)."""
    kept = labels != IGNORE
    return values.masked_fill(~kept, 0.0).sum(), kept.sum()


def token_mean(values: Tensor, labels: Tensor, count: Tensor | float | None = None) -> Tensor:
    """Mean over the kept tokens; zero, with zero gradient, when there is none.

    With gradient accumulation or several processes `count` is the number of kept tokens of the whole effective batch: a mean per
    micro-batch would give the tokens of short micro-batches more weight.
    """
    total, kept = reduce(values, labels)
    return total / torch.as_tensor(kept if count is None else count).clamp(min=1)


def sequence_mean(values: Tensor, labels: Tensor) -> Tensor:
    """Mean over sequences of each one's token mean; values, labels: (B, L). Sequences without a kept token do not count."""
    kept = labels != IGNORE
    lengths = kept.sum(-1)
    means = values.masked_fill(~kept, 0.0).sum(-1) / lengths.clamp(min=1)
    return means.sum() / (lengths > 0).sum().clamp(min=1)
