"""Noise processes x_t = alpha(t) x0 + sigma(t) eps with eps ~ N(0, I), each with its own time convention.

Direction and scale of time live here and nowhere else. Two numbers do not depend on the convention: the noise-to-signal ratio
rho = sigma / alpha and the pair (x0, eps) that a network predicts. So a teacher of one process answers in any other through rho, and
every recipe is written with (x0, eps).

| process | alpha, sigma | data end -> noise end | source |
|---|---|---|---|
| EDM | 1, t | 0 -> 80 | Karras et al. 2022 |
| VP | sqrt(abar_k), sqrt(1 - abar_k), k may be fractional | -1 (no noise) -> 999 | DDPM, Stable Diffusion |
| Flow | 1 - t, t | 0 -> 1 | rectified flow, SD3, Flux, Wan |
| ReversedFlow | t, 1 - t | 1 -> 0 | SlimFlow's code, Proteina |
| Trig | cos t, sigma_data sin t | 0 -> pi/2 | sCM, SANA-Sprint |

Times are floats or tensors [B]; coefficients come back in float64 (float32 where the device has no float64), since 1 - t and
sqrt(1 - abar) lose the small end in half precision, and are cast only when they multiply an image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

Time = float | Tensor
TINY = 1e-6


def as_time(t: Time, like: Tensor | None = None) -> Tensor:
    """A time as a float64 tensor, on the device of `like`."""
    device = like.device if like is not None else t.device if isinstance(t, Tensor) else None
    wide = torch.float32 if device is not None and device.type == "mps" else torch.float64
    return torch.as_tensor(t, device=device, dtype=wide)  # a Python float must not pass through float32


def along(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient [] or [B] shaped and cast to multiply x [B, ...]."""
    coefficient = coefficient.to(device=x.device, dtype=x.dtype)
    return coefficient if coefficient.ndim == 0 else coefficient.reshape(-1, *[1] * (x.ndim - 1))


def blend(a: float, x: Tensor, b: float, y: Tensor) -> Tensor:
    """a x + b y for numbers a and b, without the passes over x and y that change nothing; x itself when a = 1 and b = 0."""
    x = x if a == 1 else a * x
    return torch.add(x, y, alpha=b) if b else x


def shifted(u: Any, shift: float) -> Any:
    """The flow shift m u / (1 + (m - 1) u) of a share u of the way from data to noise."""
    return u if shift == 1 else shift * u / (1 + (shift - 1) * u)


class Process:
    """What the five conventions share, written once in alpha and sigma."""

    clean: ClassVar[float]
    """The time of the data."""
    noisy: float
    """The time of the most noise."""
    time_scale: float = 1.0
    """What times are multiplied by for the network."""
    wronskian: float
    """alpha sigma' - alpha' sigma, the same number at every time in each process that has a velocity."""

    def alpha(self, t: Time) -> Tensor:
        raise NotImplementedError

    def sigma(self, t: Time) -> Tensor:
        raise NotImplementedError

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        """(alpha'(t), sigma'(t)). TypeError for a discrete process."""
        raise NotImplementedError

    def time(self, rho: Time) -> Tensor:
        """The inverse of `rho`; ratios outside the process are clamped to its ends."""
        raise NotImplementedError

    def network_time(self, t: Time) -> Tensor:
        """What a network of this process is given as its time input."""
        return as_time(t) * self.time_scale

    def rho(self, t: Time) -> Tensor:
        """Noise-to-signal ratio sigma / alpha, the EDM noise level."""
        return self.sigma(t) / self.alpha(t).clamp_min(TINY)

    def norm(self, t: Time) -> Tensor:
        """sqrt(alpha^2 + sigma^2): two processes at one rho differ by the ratio of their norms, finite at both ends."""
        return torch.sqrt(self.alpha(t) ** 2 + self.sigma(t) ** 2)

    def mix(self, x0: Tensor, eps: Tensor, t: Time) -> Tensor:
        """alpha_t x0 + sigma_t eps: noising, and with a predicted pair the deterministic (DDIM) jump to time t."""
        if not isinstance(t, Tensor):
            alpha, sigma = _coefficients(self, float(t))
            return blend(alpha, x0, sigma, eps)
        return torch.addcmul(along(self.alpha(t), x0) * x0, along(self.sigma(t), x0), eps)

    def start(self, z: Tensor) -> Tensor:
        """Unit noise z as the state at the noise end."""
        sigma = _coefficients(self, self.noisy)[1]
        return z if sigma == 1 else sigma * z

    def kernel(self, s: Time, t: Time) -> tuple[Tensor, Tensor]:
        """(alpha_{t|s}, sigma_{t|s}) of x_t | x_s ~ N(alpha_{t|s} x_s, sigma_{t|s}^2 I), t noisier than s."""
        ratio = self.alpha(t) / self.alpha(s).clamp_min(TINY)
        return ratio, (self.sigma(t) ** 2 - ratio**2 * self.sigma(s) ** 2).clamp_min(0.0).sqrt()

    def renoise(self, x: Tensor, s: Time, t: Time, eps: Tensor) -> Tensor:
        """A sample at time s carried to the noisier time t by fresh noise, so that marginals are kept."""
        ratio, spread = self.kernel(s, t)
        return torch.addcmul(along(ratio, x) * x, along(spread, x), eps)

    def score(self, eps: Tensor, t: Time) -> Tensor:
        """grad log p_t = -eps / sigma."""
        return -eps / along(self.sigma(t).clamp_min(TINY), eps)

    def velocity(self, x0: Tensor, eps: Tensor, t: Time) -> Tensor:
        """dx_t/dt = alpha' x0 + sigma' eps along the process's own time. TypeError for a discrete process."""
        da, ds = self.rates(t)
        return torch.addcmul(along(da, x0) * x0, along(ds, x0), eps)

    def v(self, x0: Tensor, eps: Tensor, t: Time) -> Tensor:
        """alpha eps - sigma x0 (Salimans and Ho), meant for processes of unit norm."""
        return along(self.alpha(t), x0) * eps - along(self.sigma(t), x0) * x0

    def place(self, share: Time) -> Tensor:
        """The time that lies `share` of the way from data to noise."""
        return self.clean + (self.noisy - self.clean) * as_time(share)

    def share(self, t: float) -> float:
        """The inverse of `place`."""
        return (t - self.clean) / (self.noisy - self.clean)

    def grid(self, steps: int, shift: float = 1.0) -> list[float]:
        """steps + 1 times from the noise end to the data end, evenly placed, then shifted towards noise.

        The shift is the flow one, u <- m u / (1 + (m - 1) u) on the share u of the way from data to noise.
        """
        return [*(float(self.place(shifted(1 - i / steps, shift))) for i in range(steps)), self.clean]

    def uniform(self, n: int, low: float = 0.0, high: float = 1.0, shift: float = 1.0, device: torch.device | None = None) -> Tensor:
        """n random times, uniform in the share [low, high] of the way from data to noise, shifted within it; float64 [n]."""
        return self.place(low + (high - low) * shifted(torch.rand(n, device=device).double(), shift))

    def lognormal(self, n: int, mean: float = -1.2, std: float = 1.2, device: torch.device | None = None) -> Tensor:
        """n random times with ln rho ~ N(mean, std^2): EDM's training law, sCM's in Trig time, logit-normal in flow time."""
        return self.time((mean + std * torch.randn(n, device=device).double()).exp())

    def karras(self, index: Tensor, exponent: float = 7.0, low: float = 0.002, high: float = 80.0) -> Tensor:
        """Times of Karras noise levels; `index` in [0, 1] counts from the largest level."""
        a, b = high ** (1 / exponent), low ** (1 / exponent)
        return self.time((a + as_time(index) * (b - a)) ** exponent)


@lru_cache(maxsize=4096)
def _coefficients(process: Process, t: float) -> tuple[float, float]:
    """(alpha, sigma) at one time: the times of a grid come again in every step, and numbers need no copy to the device."""
    return float(process.alpha(t)), float(process.sigma(t))


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


@lru_cache(maxsize=16)
def _ratios(betas: tuple[float, float], kind: str, steps: int) -> Tensor:
    """rho at k = -1, 0, ..., steps - 1; k = -1 is the clean image."""
    low, high = betas
    beta = torch.linspace(low, high, steps, dtype=torch.float64)
    if kind == "scaled_linear":
        beta = torch.linspace(math.sqrt(low), math.sqrt(high), steps, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - beta, 0)
    return torch.cat([torch.zeros(1, dtype=torch.float64), ((1 - kept) / kept).sqrt()])


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
        return _ratios((self.beta_start, self.beta_end), self.kind, self.steps).to(like)

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
        rho = rho.clamp(0.0, float(table[-1]))
        low = (torch.searchsorted(table, rho.contiguous(), right=True) - 2).clamp(-1, self.steps - 2)
        a, b = table[low + 1], table[low + 2]
        part = torch.where(low < 0, rho / b, (rho.clamp_min(TINY) / a.clamp_min(TINY)).log() / (b / a.clamp_min(TINY)).log())
        return low + part

    def network_time(self, t: Time) -> Tensor:
        return as_time(t).clamp_min(0.0) * self.time_scale


def DDPM(time_scale: float = 1.0) -> VP:
    """The original linear betas, 1e-4 to 0.02."""
    return VP(1e-4, 0.02, "linear", time_scale=time_scale)


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
