"""What all noise processes share, written once in alpha and sigma, and the handling of times and coefficients."""

from __future__ import annotations

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
    if isinstance(t, Tensor):
        return t.to(device, wide)
    # Filled in where it is needed: `as_tensor` would send the number, for which the host waits. It must not pass through float32 either.
    return torch.full((), t, dtype=wide, device=device)


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
        """n random times, uniform in the share [low, high] of the way from data to noise, then shifted as a grid is; float64 [n]."""
        return self.place(shifted(low + (high - low) * torch.rand(n, device=device).double(), shift))

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
