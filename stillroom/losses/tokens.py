"""Divergences between next-token distributions, on rows that the caller has already aligned.

Position t of the logits predicts token t+1: call `align` once, then everything here takes rows (N, V) and labels (N,). Sums run
over the vocabulary, one value per row comes back, and `token_mean` divides by the kept tokens of the whole effective batch.

    forward_kl  sum p (log p - log q)          reverse_kl  sum q (log q - log p)
    jsd         b KL(p|m) + (1-b) KL(q|m), m = b p + (1-b) q; b = 0 and b = 1 name forward and reverse KL (Agarwal et al. 2023)
    skew_kl     KL(p | a p + (1-a) q)          skew_reverse_kl  KL(q | (1-a) q + a p)      (Ko et al. 2024, from memory)
    total_variation  1/2 sum |p - q|

A word that one side excludes with a logit of -inf (padded vocabularies) costs nothing where its own probability is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Literal

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that neither the hard nor the soft loss trains."""

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation"]


def align(states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (B*(L-1), D) of states (B, L, D), hidden or logits, beside the labels (B*(L-1),) of the token each one predicts."""
    return states[:, :-1].reshape(-1, states.shape[-1]), labels[:, 1:].reshape(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) per row from log-probabilities (N, V) -> (N,)."""
    gap = (log_p - log_q).masked_fill(log_p == -torch.inf, 0.0)
    return (log_p.exp() * gap).sum(-1)


def _mix(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b); rows where both are zero stay -inf without a NaN gradient."""
    empty = (log_a == -torch.inf) & (log_b == -torch.inf)
    mixed = torch.logaddexp(log_a.masked_fill(empty, 0.0) + log(share), log_b.masked_fill(empty, 0.0) + log(1 - share))
    return mixed.masked_fill(empty, -torch.inf)


def jsd(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    """Generalized Jensen-Shannon divergence. Its value shrinks with beta (1 - beta) inside and jumps at the named end points."""
    if beta in (0.0, 1.0):
        return kl(log_p, log_q) if beta == 0.0 else kl(log_q, log_p)
    middle = _mix(log_p, log_q, beta)
    return beta * kl(log_p, middle) + (1 - beta) * kl(log_q, middle)


def skew_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """KL(p || skew p + (1 - skew) q)."""
    return kl(log_p, _mix(log_p, log_q, skew))


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """KL(q || skew p + (1 - skew) q)."""
    return kl(log_q, _mix(log_p, log_q, skew))


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Half the L1 distance."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


BY_NAME: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": kl,
    "reverse_kl": lambda log_p, log_q: kl(log_q, log_p),
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
}


def tempered(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Log-probabilities in float32 (float64 stays) of logits / temperature; a temperature of shape (N,) is one per row."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if isinstance(temperature, Tensor):
        temperature = temperature.to(logits).unsqueeze(-1)
    return (logits / temperature).log_softmax(-1)


def divergence(
    teacher: Tensor, student: Tensor, kind: Divergence = "forward_kl", temperature: float | Tensor = 1.0, *, times_t2: bool = False
) -> Tensor:
    """One divergence per row from the logits (N, V) of both; no gradient reaches the teacher.

    `times_t2` multiplies by temperature^2, which keeps the gradient's size when the temperature changes (classical KD does, language
    model libraries do not).
    """
    values = BY_NAME[kind](tempered(teacher.detach(), temperature), tempered(student, temperature))
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
