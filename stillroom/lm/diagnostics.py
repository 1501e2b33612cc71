"""What attention does with its probability: first-token share, gate sparsity, massive activations, loss spikes (Qiu et al. 2025)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.metrics.modes import eval_mode
from stillroom.nets.decoder import Attention, Block, Gate
from stillroom.nets.hooks import hooked


@torch.no_grad()
def attention_maps(net: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Probabilities (B, H, n, n) of every Attention in one forward pass, recomputed from its inputs."""
    return _seen(net, Attention, lambda module, given, out: module.weights(*given), inputs)


@torch.no_grad()
def gate_scores(net: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Activated scores of every Gate in one forward pass, (B, n, H, c or 1)."""
    return _seen(net, Gate, lambda module, given, out: module.scores(given[0]).expand(*given[0].shape[:2], -1, -1), inputs)


@torch.no_grad()
def massive_activation(net: nn.Module, *inputs: Tensor) -> float:
    """Largest absolute value of the hidden state after each Block, averaged over blocks."""
    peaks = _seen(net, Block, lambda module, given, out: out.abs().max().item(), inputs)
    return sum(peaks) / len(peaks)


def first_token_share(weights: Tensor, queries: Tensor | slice = slice(4, None)) -> Tensor:
    """Mean probability (B, H, n, n) on the first token over batch, heads and the queries given (n,) or (B, n); the first few are left
    out by default, as their share is large by necessity."""
    share = weights[..., 0]
    if isinstance(queries, slice):
        return share[..., queries].mean()
    return share.mean(1)[queries.expand(share.shape[0], -1)].mean()


def spikes(losses: Sequence[float], decay: float = 0.95, jump: float = 0.3) -> int:
    """Steps whose loss exceeds the moving average of those before by `jump`."""
    average, count = losses[0], 0
    for loss in losses[1:]:
        count += not loss <= average + jump
        average = decay * average + (1 - decay) * loss
    return count


def _seen(net: nn.Module, kind: type[nn.Module], note: Callable[[Any, tuple, Any], Any], inputs: tuple[Tensor, ...]) -> list[Any]:
    """`note(module, inputs, output)` of every module of a kind in one forward pass in evaluation mode."""
    modules, found = [module for module in net.modules() if isinstance(module, kind)], []
    with hooked(modules, lambda place, given, out: found.append(note(modules[place], given, out))), eval_mode(net):
        net(*inputs)
    return found
