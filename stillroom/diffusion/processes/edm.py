"""Variance exploding (Karras et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.diffusion.processes.base import TINY, Process, Time, as_time, shifted


@dataclass(frozen=True)
class EDM(Process):
    """Variance exploding: t is rho itself; the network sees ln(t) / 4. Times are placed on Karras's curve, the last jump is to 0."""

    noisy: float = 80.0
    least: float = 0.002
    clean = 0.0
    wronskian = 1.0

    def place(self, share: Time) -> Tensor:
        return self.karras(1 - as_time(share), low=self.least, high=self.noisy)

    def share(self, t: float) -> float:
        low, high = self.least ** (1 / 7), self.noisy ** (1 / 7)
        return max(0.0, (t ** (1 / 7) - low) / (high - low))

    def grid(self, steps: int, shift: float = 1.0) -> list[float]:
        levels = [shifted(1 - i / max(1, steps - 1), shift) for i in range(steps)]  # both ends of the curve are visited
        return [*(float(self.place(u)) for u in levels), self.clean]

    def alpha(self, t: Time) -> Tensor:
        return torch.ones_like(as_time(t))

    def sigma(self, t: Time) -> Tensor:
        return as_time(t)

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(as_time(t))
        return 0 * one, one

    def time(self, rho: Time) -> Tensor:
        return as_time(rho).clamp_min(0.0)

    def network_time(self, t: Time) -> Tensor:
        return as_time(t).clamp_min(TINY).log() / 4
