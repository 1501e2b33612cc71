"""Helpers for tests of recipes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from stillroom.engine import parameters


def assert_grads(loss: torch.Tensor, *, to: Iterable[nn.Module | torch.Tensor], not_to: Iterable[nn.Module | torch.Tensor] = ()) -> None:
    """AssertionError unless `loss` sends gradient to every network in `to` and to none in `not_to`.

    A network is reached when any of its parameters gets a gradient that is not zero; frozen parameters count as not reached.
    """
    to, not_to = list(to), list(not_to)

    def reached(item: nn.Module | torch.Tensor) -> bool:
        leaves = [p for p in parameters(item) if p.requires_grad]
        if not leaves or not loss.requires_grad:
            return False
        found = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        return any(g is not None and bool(g.count_nonzero()) for g in found)

    for i, item in enumerate(to):
        assert reached(item), f"no gradient reaches item {i} of `to` ({type(item).__name__})"
    for i, item in enumerate(not_to):
        assert not reached(item), f"gradient reaches item {i} of `not_to` ({type(item).__name__})"
