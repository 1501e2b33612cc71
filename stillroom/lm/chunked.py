"""Cross-entropy and divergence straight from hidden states, without ever holding the tokens x vocabulary matrix.

The loss is the last operation, so its gradients are made in the forward pass: a chunk of rows gets its logits, its loss, the gradient
with respect to these logits and from it those of states and head; then the logits are dropped (Liger-Kernel's way, in plain torch).
Rows that no loss trains are left out altogether. Memory is a few times a chunk of logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from stillroom.lm.signals import Signal, Temperature
from stillroom.losses.tokens import IGNORE, Divergence

CHUNK_VALUES = 2**23


class Chunked(NamedTuple):
    """`loss` carries the gradient; `ce` and `kd` are the unweighted token means, for the log; `tokens` how many rows were trained."""

    loss: Tensor
    ce: Tensor
    kd: Tensor
    tokens: Tensor


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    signal: Signal | None = None,
    *,
    bias: Tensor | None = None,
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    kind: Divergence = "forward_kl",
    temperature: Temperature = 1.0,
    times_t2: bool = False,
    count: Tensor | float | None = None,
    rows: int | None = None,
) -> Chunked:
    """Token mean of ce_weight * CE + kd_weight * divergence for aligned rows.

    hidden (N, d), weight (V, d), bias (V,), labels (N,) of the predicted token with -100 where nothing is trained; `signal` slices
    like the rows. The cross-entropy is always at temperature 1. `count`: kept tokens of the whole effective batch when this is
    a part of it. A tied head gets the gradient of both its uses, a frozen one costs nothing. No double backward.
    `rows`: positions per chunk; by default so many that a chunk's logits take 32 MB.
    """
    rows = rows or max(1, CHUNK_VALUES // len(weight))
    kept = (labels != IGNORE).nonzero().squeeze(-1)
    total = torch.as_tensor(len(kept) if count is None else count, device=hidden.device).clamp(min=1)
    weights = (ce_weight, kd_weight if signal is not None else 0.0)
    loss, ce, kd = _ChunkedLoss.apply(hidden, weight, bias, labels, signal, kept, weights, kind, temperature, times_t2, total, rows)
    return Chunked(loss, ce, kd, torch.as_tensor(len(kept)))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, signal: Signal | None, kept: Tensor,
        weights: tuple[float, float], kind: Divergence, temperature: Temperature, times_t2: bool, total: Tensor, rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and wants_bias else None
        sums = torch.zeros(2, dtype=exact, device=hidden.device)
        ce_weight, kd_weight = weights
        for chunk in kept.split(rows):
            part = hidden[chunk].to(weight.dtype)  # under autocast the states are bfloat16 and the head is not
            logits = linear(part, weight, bias).to(exact).requires_grad_()
            heat = temperature[chunk].to(exact) if isinstance(temperature, Tensor) else temperature
            with torch.enable_grad():
                scalar = logits.new_zeros(())
                if ce_weight:
                    ce = cross_entropy(logits, labels[chunk], reduction="sum")
                    scalar = scalar + ce_weight * ce
                    sums[0] += ce.detach()
                if kd_weight and signal is not None:
                    values = signal[chunk].divergence(logits, kind, heat)
                    kd = (values * heat**2 if times_t2 else values).sum()
                    scalar = scalar + kd_weight * kd
                    sums[1] += kd.detach()
                if not scalar.requires_grad or not any(ctx.needs_input_grad[:3]):
                    continue
                (slope,) = torch.autograd.grad(scalar, logits)
            slope /= total
            if grad_hidden is not None:
                grad_hidden[chunk] = (slope.to(weight.dtype) @ weight).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(slope.t(), part.to(exact))
            if grad_bias is not None:
                grad_bias += slope.sum(0)
        ctx.grads = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        ce, kd = sums / total
        ctx.mark_non_differentiable(ce, kd)
        return ce_weight * ce + kd_weight * kd, ce, kd

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        grads = tuple(None if grad is None else grad * slopes[0].to(grad.dtype) for grad in ctx.grads)
        return (*grads, *[None] * 9)
