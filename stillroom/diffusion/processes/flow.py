"""Rectified flow, in both directions of time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.diffusion.processes.base import Process, Time, as_time, shifted


@dataclass(frozen=True)
class Flow(Process):
    """Rectified flow with the noise at t = 1; velocity eps - x0. SD3 networks see 1000 t, Flux networks t.

    Times are placed with `shift` (1: evenly), which moves them towards noise as the schedulers of SD3 and Flux do.
    """

    time_scale: float = 1.0
    shift: float = 1.0
    clean = 0.0
    wronskian = 1.0
    noisy = 1.0

    def place(self, share: Time) -> Tensor:
        return shifted(as_time(share), self.shift)

    def share(self, t: float) -> float:
        return shifted(t, 1 / self.shift)

    def alpha(self, t: Time) -> Tensor:
        return 1 - as_time(t)

    def sigma(self, t: Time) -> Tensor:
        return as_time(t)

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(as_time(t))
        return -one, one

    def velocity(self, x0: Tensor, eps: Tensor, t: Time) -> Tensor:
        return eps - x0

    def time(self, rho: Time) -> Tensor:
        rho = as_time(rho)
        return torch.where(rho.isinf(), torch.ones_like(rho), rho / (1 + rho))


@dataclass(frozen=True)
class ReversedFlow(Process):
    """Rectified flow with the data at t = 1; velocity x0 - eps. SlimFlow's networks see 999 t."""

    time_scale: float = 1.0
    clean = 1.0
    wronskian = -1.0
    noisy = 0.0

    def alpha(self, t: Time) -> Tensor:
        return as_time(t)

    def sigma(self, t: Time) -> Tensor:
        return 1 - as_time(t)

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(as_time(t))
        return one, -one

    def velocity(self, x0: Tensor, eps: Tensor, t: Time) -> Tensor:
        return x0 - eps

    def time(self, rho: Time) -> Tensor:
        return 1 / (1 + as_time(rho))
