"""TrigFlow (sCM, SANA-Sprint)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.diffusion.processes.base import Process, Time, as_time


@dataclass(frozen=True)
class Trig(Process):
    """TrigFlow: x_t = cos(t) x0 + sin(t) z with z ~ N(0, sigma_data^2 I); eps = z / sigma_data."""

    sigma_data: float = 0.5
    time_scale: float = 1.0
    clean = 0.0
    noisy = math.pi / 2

    @property
    def wronskian(self) -> float:  # type: ignore[override]
        return self.sigma_data

    def alpha(self, t: Time) -> Tensor:
        return as_time(t).cos()

    def sigma(self, t: Time) -> Tensor:
        return self.sigma_data * as_time(t).sin()

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        t = as_time(t)
        return -t.sin(), self.sigma_data * t.cos()

    def time(self, rho: Time) -> Tensor:
        return torch.atan(as_time(rho) / self.sigma_data)
