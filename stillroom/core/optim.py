"""How a role learns: optimizer, learning-rate schedule and clipping as one config that every recipe embeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Interval
from torch import nn

from stillroom.core.config import Natural, NonNegative, Positive
from stillroom.core.errors import UserError

Memory = Annotated[float, Interval(ge=0.0, lt=1.0)]
BuildOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Optimizer:
    """Optimizer of one role. Call it with parameters to get the torch optimizer (after placement, so that sharding works)."""

    kind: Literal["sgd", "adam", "adamw"] = "adamw"
    lr: Positive = 1e-3
    """Peak learning rate."""
    momentum: Memory = 0.9
    """SGD's momentum; Adam's first beta."""
    beta2: Memory = 0.999
    """Adam's second beta."""
    nesterov: bool = False
    weight_decay: NonNegative = 0.0
    decay: Literal["all", "matrices"] = "all"
    """Parameters that decay: all, or not biases, norms, class tokens and position tables (one dimension, or a leading one of size 1)."""
    schedule: Literal["constant", "cosine", "linear", "step"] = "constant"
    """Shape of the learning rate over the run; cosine and linear end at `end`."""
    end: NonNegative = 0.0
    """Learning rate that the cosine and linear schedules end at."""
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
        exempt = [self.decay == "matrices" and (p.ndim < 2 or p.shape[0] == 1) for p in parameters]
        groups: Any = parameters
        if any(exempt):
            decaying, others = ([p for p, free in zip(parameters, exempt) if free == which] for which in (False, True))
            groups = [{"params": decaying}, {"params": others, "weight_decay": 0.0}]
        if self.kind == "sgd":
            if self.nesterov and not self.momentum:
                raise UserError("an optimizer with nesterov needs a momentum greater than 0.", code=2)
            return torch.optim.SGD(groups, self.lr, self.momentum, nesterov=self.nesterov, weight_decay=self.weight_decay, fused=fused)
        adam = torch.optim.AdamW if self.kind == "adamw" else torch.optim.Adam
        return adam(groups, self.lr, (self.momentum, self.beta2), weight_decay=self.weight_decay, fused=fused)

    def rate(self, step: int, total: int) -> float:
        """Learning rate of step 0 <= step < total: a pure function, so that a resumed run needs no scheduler state."""
        if step < self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, total - self.warmup)
        match self.schedule:
            case "cosine":
                return self.end + (self.lr - self.end) * 0.5 * (1 + math.cos(math.pi * done))
            case "linear":
                return self.end + (self.lr - self.end) * (1 - done)
            case "step":
                return self.lr * self.drop_factor ** sum(step >= round(share * total) for share in self.drops)
            case _:
                return self.lr
