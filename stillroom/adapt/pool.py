"""A pool of networks at different ages of the same training, from which a bilevel method draws its inner solution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillroom.core.optim import BuildOptimizer


class Pool:
    """`count` networks, each with its own optimizer and age; one that has reached `lifetime` steps starts anew at age 0.

    Fresh weights depend on (seed, slot, birth) alone, so that all processes of a run hold the same pool. Track it:
    `run.track(pool=pool)`.
    """

    def __init__(
        self, fresh: Callable[[], nn.Module], optimizer: BuildOptimizer, count: int, lifetime: int, seed: int, device: torch.device | str
    ):
        self.fresh, self.optimizer, self.lifetime, self.seed = fresh, optimizer, lifetime, seed
        self.ages, self.births = [0] * count, [0] * count
        self.nets: list[Any] = [self._born(slot).to(device) for slot in range(count)]
        self.optimizers = [optimizer(net.parameters()) for net in self.nets]

    def _born(self, slot: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.default_rng([self.seed, slot, self.births[slot]]).integers(2**62)))
            return self.fresh()

    def frozen(self, slot: int) -> Any:
        """The network in eval mode (its running statistics), its weights without gradient."""
        return self.nets[slot].eval().requires_grad_(False)

    def advance(self, slot: int, inputs: Tensor, targets: Tensor) -> None:
        """One step of the mean squared error on the whole set, in train mode; or, at the end of the lifetime, a new network instead."""
        if self.ages[slot] >= self.lifetime:
            self.ages[slot], self.births[slot] = 0, self.births[slot] + 1
            self.nets[slot].load_state_dict(self._born(slot).state_dict())
            self.optimizers[slot] = self.optimizer(self.nets[slot].parameters())
            return
        net = self.nets[slot].train().requires_grad_(True)
        loss = F.mse_loss(net(inputs), targets)
        self.optimizers[slot].zero_grad()
        loss.backward()
        self.optimizers[slot].step()
        self.ages[slot] += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "ages": list(self.ages),
            "births": list(self.births),
            "nets": [net.state_dict() for net in self.nets],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ages, self.births = list(state["ages"]), list(state["births"])
        for mine, saved in zip([*self.nets, *self.optimizers], [*state["nets"], *state["optimizers"]], strict=True):
            mine.load_state_dict(saved)
