"""Cross-entropy and divergence straight from hidden states, without ever holding the tokens x vocabulary matrix.

The loss is the last operation, so its gradients are made in the forward pass: a chunk of rows gets its logits, its loss, the gradient
with respect to these logits and from it those of states and head; then the logits are dropped (Liger-Kernel's way, in plain torch).
Rows that no loss trains are left out altogether. Memory is a few times a chunk of logits. Cross-entropy and forward KL have their
gradients in closed form, q - p, made in place; every other divergence asks autograd for the chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stillroom.lm.output import OutputLayer
from stillroom.lm.signals import ClosedForm, Signal, Temperature
from stillroom.losses.tokens import IGNORE, Divergence, tempered

CHUNK_VALUES = 2**23


class Chunked(NamedTuple):
    """`loss` carries the gradient; `ce` and `kd` are the unweighted token means, for the log; `tokens` how many rows were trained."""

    loss: Tensor
    ce: Tensor
    kd: Tensor
    tokens: Tensor


def chunked_loss(
    hidden: Tensor,
    head: OutputLayer | Tensor,
    labels: Tensor,
    signal: Signal | None = None,
    *,
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    kind: Divergence = "forward_kl",
    temperature: Temperature = 1.0,
    times_t2: bool = False,
    row_weights: Tensor | None = None,
    count: Tensor | float | None = None,
    rows: int | None = None,
) -> Chunked:
    """Token mean of ce_weight * CE + kd_weight * divergence for aligned rows.

    hidden (N, d), head with a weight (V, d), or that weight alone, labels (N,) of the predicted token with -100 where nothing is trained;
    `signal` slices like the rows. The cross-entropy is always at temperature 1. `row_weights` (N,) multiply the loss of each row, in `ce`
    and `kd` too; the mean is still over the number of rows. `count`: kept tokens of the whole effective batch when this is a part of it.
    A tied head gets the gradient of both its uses, a frozen one costs nothing. No double backward.
    `rows`: positions per chunk; by default so many that a chunk's logits take 32 MB.
    """
    head = OutputLayer.of(head)
    rows = rows or max(1, CHUNK_VALUES // len(head.weight))
    kept = (labels != IGNORE).nonzero().squeeze(-1)
    total = torch.as_tensor(len(kept) if count is None else count, device=hidden.device).clamp(min=1)
    weights = (ce_weight, kd_weight if signal is not None else 0.0)
    shape = (head.scale, head.cap)
    loss, ce, kd = _ChunkedLoss.apply(
        hidden, head.weight, head.bias, shape, labels, signal, kept, weights, kind, temperature, times_t2, row_weights, total, rows
    )
    return Chunked(loss, ce, kd, torch.as_tensor(len(kept)))


def token_log_probs(hidden: Tensor, head: OutputLayer | Tensor, labels: Tensor, *, rows: int | None = None) -> Tensor:
    """log softmax(logits)[label]: hidden (N, d), head as for `chunked_loss`, labels (N,) -> (N,), for losses that join tokens.

    A chunk's logits are made again in the backward pass.
    """
    head = OutputLayer.of(head)

    def part(hidden: Tensor, layer: OutputLayer, labels: Tensor) -> Tensor:
        return tempered(layer.logits(hidden)).log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    rows = rows or max(1, CHUNK_VALUES // len(head.weight))
    chunks = ((states, head, wanted) for states, wanted in zip(hidden.split(rows), labels.split(rows)))
    return torch.cat([checkpoint(part, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks])


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: tuple[float, float], labels: Tensor, signal: Signal | None,
        kept: Tensor, weights: tuple[float, float], kind: Divergence, temperature: Temperature, times_t2: bool, row_weights: Tensor | None,
        total: Tensor, rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and wants_bias else None
        sums = torch.zeros(2, dtype=exact, device=hidden.device)
        ce_weight, kd_weight = weights
        (scale, cap), head = shape, OutputLayer(weight, bias, *shape)
        for chunk in kept.split(rows) if any(weights) else ():
            part = hidden[chunk].to(weight.dtype)
            logits = head.logits(part).to(exact)
            bend = scale * (1 - (logits / cap) ** 2) if cap else scale  # of the logits by the affine part
            share = None if row_weights is None else row_weights[chunk].to(exact)
            slope: Tensor | None = None
            if ce_weight:
                ce, slope = _cross_entropy(logits, labels[chunk])
                sums[0] += (ce if share is None else ce * share).sum()
                slope *= ce_weight / total
            if kd_weight and signal is not None:
                tau = temperature[chunk].to(exact) if isinstance(temperature, Tensor) else temperature
                values, kd_slope = _divergence(signal[chunk], logits, kind, tau)
                square = tau**2 if times_t2 else 1.0
                values = values * square
                sums[1] += (values if share is None else values * share).sum()
                factor = kd_weight / total * square
                kd_slope *= factor.unsqueeze(-1) if factor.dim() else factor
                slope = kd_slope if slope is None else slope.add_(kd_slope)
            if slope is None:
                continue
            if share is not None:
                slope *= share.unsqueeze(-1)
            if cap or scale != 1:
                slope *= bend
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
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("the gradients of a chunked loss were made with it and are used up: call it again")
        return (*(None if grad is None else grad.mul_(slopes[0]) for grad in grads), *[None] * 11)


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Values (n,), and the gradient q - onehot(y) (n, V) of their sum."""
    log_q, labels = logits.log_softmax(-1), labels.unsqueeze(-1)
    value = -log_q.gather(-1, labels).squeeze(-1)
    return value, log_q.exp_().scatter_add_(-1, labels, log_q.new_tensor(-1.0).expand(labels.shape))


def _divergence(signal: Signal, logits: Tensor, kind: Divergence, temperature: Temperature) -> tuple[Tensor, Tensor]:
    """Values (n,), and the gradient (n, V) of their sum. May overwrite the logits."""
    if kind != "forward_kl" or not isinstance(signal, ClosedForm):
        with torch.enable_grad():
            logits = logits.detach().requires_grad_()
            values = signal.divergence(logits, kind, temperature)
            (slope,) = torch.autograd.grad(values.sum(), logits)
        return values.detach(), slope.contiguous()
    values, slope = signal.forward_kl(logits, temperature)
    if isinstance(temperature, Tensor):
        slope /= temperature.unsqueeze(-1)
    elif temperature != 1:
        slope /= temperature
    return values, slope
