"""Divergences between categorical distributions and cross-entropies: the last dimension holds the classes, any leading shape.

Every function sums over classes and returns one value per sample, of the leading shape; the recipe reduces. Teacher logits and
target probabilities are constants by contract: the caller computes them without gradient (`run.frozen`, `no_grad`, `detach`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label]: logits (..., C), labels (...) int64 -> (...)."""
    if logits.dim() == 2:  # without views, whose backward costs as much as the loss itself of a small batch
        return F.cross_entropy(logits, labels, reduction="none")
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.flatten(), reduction="none").view(labels.shape)


def soft_cross_entropy(logits: Tensor, target_probs: Tensor) -> Tensor:
    """-sum_c target_c log softmax(logits)_c. Differs from the KL divergence by the target's entropy only: equal gradients."""
    return -(target_probs * logits.log_softmax(-1)).sum(-1)


def soft_cross_entropies(logits: Tensor, targets: Tensor, temperatures: Tensor) -> Tensor:
    """-sum_c target_c log softmax(logits / T)_c for K targets at K temperatures, summed over the rows too: logits (B, C), targets
    (K, B, C), temperatures (K, 1, 1) -> (K,).

    `soft_cross_entropy` under one softmax: beside a small network a second softmax and sum would cost a twentieth of the step.
    """
    return (targets * (logits / temperatures).log_softmax(-1)).sum((1, 2)).neg()


def kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0, *, times_t2: bool = False) -> Tensor:
    """KL(p || q) with teacher p and student q, both softmax(logits / temperature) (Hinton et al. 2015, arXiv 1503.02531).

    The gradient shrinks as 1/T^2: for large T, T^2 KL tends to the squared distance of the centred logits over 2C. `times_t2`
    multiplies by T^2, so that the weight beside a cross-entropy keeps its meaning when T changes.
    """
    log_p, log_q = (teacher_logits / temperature).log_softmax(-1), (student_logits / temperature).log_softmax(-1)
    value = _kl(log_p, log_q)
    return value * temperature**2 if times_t2 else value


def reverse_kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0, *, times_t2: bool = False) -> Tensor:
    """KL(q || p) with teacher p and student q: the student is punished for mass where the teacher has none. See `kl`."""
    return kl(student_logits, teacher_logits, temperature, times_t2=times_t2)


def jsd(teacher_logits: Tensor, student_logits: Tensor, beta: float, temperature: float = 1.0, *, times_t2: bool = False) -> Tensor:
    """Generalised Jensen-Shannon divergence, beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q
    (Agarwal et al. 2024, arXiv 2306.13649, eq. 1).

    It vanishes at beta = 0 and 1; divided by beta (1 - beta) it tends there to `kl` and `reverse_kl`. These are not returned under
    beta = 0 or 1, as some libraries do: ValueError unless 0 < beta < 1; call them by name.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta must lie between 0 and 1, not {beta}: the limits are called `kl` and `reverse_kl`")
    log_p, log_q = (teacher_logits / temperature).log_softmax(-1), (student_logits / temperature).log_softmax(-1)
    least = torch.finfo(log_p.dtype).min  # of two -inf, logaddexp has no gradient
    log_m = torch.logaddexp(log_p.clamp_min(least) + math.log(beta), log_q.clamp_min(least) + math.log(1 - beta))
    value = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    return value * temperature**2 if times_t2 else value


def jeffreys(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Half the symmetrised KL, (KL(p || q) + KL(q || p)) / 2 = 1/2 sum_c (p_c - q_c) (log p_c - log q_c), in float32 at least.

    What the released code of SSLD (arXiv 2103.05959) calls JS. It is unbounded, and near p = q four times the Jensen-Shannon divergence
    `jsd(..., 0.5)`, which stays below log 2. Infinite where one side alone has no mass; a class that both lack (logits of -inf) adds
    nothing.
    """
    precise = torch.promote_types(student_logits.dtype, torch.float32)
    log_p, log_q = teacher_logits.to(precise).log_softmax(-1), student_logits.to(precise).log_softmax(-1)
    return (_kl(log_p, log_q) + _kl(log_q, log_p)) / 2


def mse_probs(logits: Tensor, target_probs: Tensor) -> Tensor:
    """Squared distance of softmax(logits) from the target: a sum over classes, C times the mean that some papers use."""
    return (logits.softmax(-1) - target_probs).square().sum(-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_c p_c (log p_c - log q_c). A class with p_c = 0 (a logit of -inf) adds nothing, and no NaN to the gradient of either side."""
    ratio = (log_p - log_q).masked_fill(log_p == -math.inf, 0.0)
    return (log_p.exp() * ratio).sum(-1)
