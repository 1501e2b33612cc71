"""How a role learns: optimizer, learning-rate schedule and clipping as one config that every recipe embeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from stillroom.config import Natural, NonNegative, Positive, Share

BuildOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Optimizer:
    """Optimizer of one role. Call it with parameters to get the torch optimizer (after placement, so that sharding works)."""

    kind: Literal["sgd", "adam", "adamw"] = "adamw"
    lr: Positive = 1e-3
    """Peak learning rate."""
    momentum: Share = 0.9
    """SGD's momentum; Adam's first beta."""
    beta2: Share = 0.999
    """Adam's second beta."""
    nesterov: bool = False
    weight_decay: NonNegative = 0.0
    schedule: Literal["constant", "cosine", "linear", "step"] = "constant"
    """Shape of the learning rate over the run; cosine and linear end at zero."""
    drops: tuple[float, ...] = (0.5, 0.75)
    """Shares of the run at which the "step" schedule multiplies the rate by drop_factor."""
    drop_factor: Positive = 0.1
    warmup: Natural = 0
    """Steps of linear warm-up from zero."""
    clip: NonNegative = 0.0
    """Largest gradient norm of the role; 0 does not clip."""

    def __call__(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        parameters = list(parameters)
        # The fused kernels do the same arithmetic in one pass over all tensors; plain strided float tensors only.
        fused = all(type(p) in (nn.Parameter, torch.Tensor) and p.is_floating_point() for p in parameters) or None
        if self.kind == "sgd":
            return torch.optim.SGD(parameters, self.lr, self.momentum, nesterov=self.nesterov, weight_decay=self.weight_decay, fused=fused)
        adam = torch.optim.AdamW if self.kind == "adamw" else torch.optim.Adam
        return adam(parameters, self.lr, (self.momentum, self.beta2), weight_decay=self.weight_decay, fused=fused)

    def rate(self, step: int, total: int) -> float:
        """Learning rate of step 0 <= step < total: a pure function, so that a resumed run needs no scheduler state."""
        if step < self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, total - self.warmup)
        match self.schedule:
            case "cosine":
                return self.lr * 0.5 * (1 + math.cos(math.pi * done))
            case "linear":
                return self.lr * (1 - done)
            case "step":
                return self.lr * self.drop_factor ** sum(step >= share * total for share in self.drops)
            case _:
                return self.lr
