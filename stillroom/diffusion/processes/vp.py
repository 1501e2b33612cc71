"""Variance preserving in discrete steps (DDPM, Stable Diffusion)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from stillroom.diffusion.processes.base import TINY, Process, Time, as_time


@lru_cache(maxsize=64)
def _ratios(betas: tuple[float, float], kind: str, steps: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """rho at k = -1, 0, ..., steps - 1; k = -1 is the clean image. Made once for each device, where it stays."""
    low, high = betas
    beta = torch.linspace(low, high, steps, dtype=torch.float64)
    if kind == "scaled_linear":
        beta = torch.linspace(math.sqrt(low), math.sqrt(high), steps, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - beta, 0)
    return torch.cat([torch.zeros(1, dtype=torch.float64), ((1 - kept) / kept).sqrt()]).to(device, dtype)


@dataclass(frozen=True)
class VP(Process):
    """Discrete variance preserving, k in 0..steps-1; between two steps ln rho is linear, and k = -1 is the clean image.

    At whole k it is exactly sqrt(abar_k), sqrt(1 - abar_k); a fractional k lets any noise level be converted and back without loss.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    kind: str = "scaled_linear"
    steps: int = 1000
    time_scale: float = 1.0
    clean = -1.0

    @property
    def noisy(self) -> float:  # type: ignore[override]
        return self.steps - 1.0

    def _table(self, like: Tensor) -> Tensor:
        return _ratios((self.beta_start, self.beta_end), self.kind, self.steps, like.device, like.dtype)

    def rho(self, t: Time) -> Tensor:
        t = as_time(t)
        table = self._table(t)
        k = t.clamp(-1.0, self.noisy)
        low = k.floor().long().clamp(max=self.steps - 2)
        part = k - low
        a, b = table[low + 1], table[low + 2]
        return torch.where(low < 0, part * b, a.clamp_min(TINY) ** (1 - part) * b**part)

    def alpha(self, t: Time) -> Tensor:
        return (1 + self.rho(t) ** 2).rsqrt()

    def sigma(self, t: Time) -> Tensor:
        rho = self.rho(t)
        return rho * (1 + rho**2).rsqrt()

    def start(self, z: Tensor) -> Tensor:
        return z  # as diffusers and few-step students do: the little signal left at the last step counts as noise

    def grid(self, steps: int, shift: float = 1.0) -> list[float]:
        return [float(round(t)) for t in super().grid(steps, shift)]  # the steps that the network was trained on

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        raise TypeError("a discrete VP process has no velocity in its own time; ask for eps, x0, v or score, or use another process")

    def time(self, rho: Time) -> Tensor:
        rho = as_time(rho)
        table = self._table(rho)
        rho = torch.minimum(rho.clamp_min(0.0), table[-1])
        low = (torch.searchsorted(table, rho.contiguous(), right=True) - 2).clamp(-1, self.steps - 2)
        a, b = table[low + 1], table[low + 2]
        part = torch.where(low < 0, rho / b, (rho.clamp_min(TINY) / a.clamp_min(TINY)).log() / (b / a.clamp_min(TINY)).log())
        return low + part

    def network_time(self, t: Time) -> Tensor:
        return as_time(t).clamp_min(0.0) * self.time_scale


def DDPM(time_scale: float = 1.0) -> VP:
    """The original linear betas, 1e-4 to 0.02."""
    return VP(1e-4, 0.02, "linear", time_scale=time_scale)
