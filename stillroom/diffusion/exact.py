"""Data whose denoiser is known in closed form: perfect teachers for 2-D work, and the yardstick of every test.

Both are used exactly like a `Denoiser`: `teacher(x, t, cond, process) -> Prediction`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Prediction
from stillroom.diffusion.processes import TINY, VP, Flow, Process, Time, along, as_time


class Gaussian(nn.Module):
    """Data N(mean, std^2 I), mean [D...]: D(x_t) = m + alpha s^2 / (alpha^2 s^2 + sigma^2) (x_t - alpha m)."""

    mean: Tensor

    def __init__(self, mean: Tensor, std: float, process: Process | None = None):
        super().__init__()
        self.register_buffer("mean", mean)
        self.std, self.process = std, process or Flow()

    def extra_repr(self) -> str:
        return f"std={self.std}, process={self.process}"  # the store tells teachers apart by this and their buffers

    def forward(self, x: Tensor, t: Time, cond: Any = None, process: Process | None = None) -> Prediction:
        process = process or self.process
        a, s = process.alpha(as_time(t, x)), process.sigma(as_time(t, x))
        total = (a**2 * self.std**2 + s**2).clamp_min(TINY**2)
        rest = x - along(a, x) * self.mean
        return Prediction(self.mean + along(a * self.std**2 / total, x) * rest, along(s / total, x) * rest)

    def flow_map(self, x: Tensor, t: Time, s: Time, process: Process | None = None) -> Tensor:
        """Where the probability-flow ODE carries x from time t to time s; s at the data end is the consistency function."""
        process = process or self.process

        def width(time: Time) -> Tensor:
            return (process.alpha(time) ** 2 * self.std**2 + process.sigma(time) ** 2).sqrt()

        t, s = as_time(t, x), as_time(s, x)
        rest = x - along(process.alpha(t), x) * self.mean
        return along(process.alpha(s), x) * self.mean + along(width(s) / width(t), x) * rest

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """[n, D...] data."""
        noise = torch.randn(n, *self.mean.shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + self.std * noise


class Mixture(nn.Module):
    """Data sum_k w_k N(centre_k, std^2 I), centres [K, D...]: the posterior-weighted mean of K Gaussian denoisers.

    labels: [K] class of each component. A condition is then labels [B], where -1 (`null`) means all classes.
    """

    centres: Tensor
    log_weights: Tensor
    labels: Tensor
    null = -1

    def __init__(
        self, centres: Tensor, std: float, weights: Tensor | None = None, labels: Tensor | None = None, process: Process | None = None
    ):
        super().__init__()
        weights = torch.ones(len(centres)) if weights is None else weights
        self.register_buffer("centres", centres)
        self.register_buffer("log_weights", (weights / weights.sum()).log().to(centres))
        self.register_buffer("labels", torch.zeros(len(centres), dtype=torch.long) if labels is None else labels)
        self.std, self.process = std, process or Flow()

    def extra_repr(self) -> str:
        return f"std={self.std}, process={self.process}"  # the store tells teachers apart by this and their buffers

    def posterior(self, x: Tensor, t: Time, cond: Tensor | None = None, process: Process | None = None) -> Tensor:
        """[B, K] probability of each component given x_t."""
        process = process or self.process
        a, s = process.alpha(as_time(t, x)), process.sigma(as_time(t, x))
        a, variance = (v.to(x.dtype).expand(len(x))[:, None] for v in (a, (a**2 * self.std**2 + s**2).clamp_min(TINY**2)))
        flat, centres = x.flatten(1), self.centres.flatten(1)
        # |x - a c|^2 without the [B, K, D] tensor; the part without c cancels in the softmax
        logits = (a * (flat @ centres.T) - a**2 * (centres**2).sum(1) / 2) / variance + self.log_weights
        if cond is not None:
            logits = logits.masked_fill((cond[:, None] >= 0) & (cond[:, None] != self.labels), -torch.inf)
        return logits.softmax(-1)

    def forward(self, x: Tensor, t: Time, cond: Tensor | None = None, process: Process | None = None) -> Prediction:
        process = process or self.process
        a, s = process.alpha(as_time(t, x)), process.sigma(as_time(t, x))
        total = (a**2 * self.std**2 + s**2).clamp_min(TINY**2)
        mean = (self.posterior(x, t, cond, process) @ self.centres.flatten(1)).reshape(x.shape)
        rest = x - along(a, x) * mean
        return Prediction(mean + along(a * self.std**2 / total, x) * rest, along(s / total, x) * rest)

    def sample(self, n: int, cond: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """[n, D...] data, of the classes `cond` [n] if given."""
        rng: dict[str, Any] = {"generator": generator}
        probability = self.log_weights.exp().expand(n, -1)
        if cond is not None:
            probability = probability.masked_fill((cond[:, None] >= 0) & (cond[:, None] != self.labels), 0.0)
            torch._assert_async((probability > 0).any(-1).all(), "a condition that no component has")  # the host does not wait for it
        # `torch.multinomial(probability, 1)` bit by bit, without its checks, for whose verdict the host would wait.
        centre = self.centres[(probability / torch.empty_like(probability).exponential_(**rng)).argmax(-1)]
        return centre + self.std * torch.randn(centre.shape, dtype=centre.dtype, device=centre.device, **rng)


def ring(modes: int = 8, radius: float = 1.5, std: float = 0.08) -> Mixture:
    """Modes on a circle."""
    angle = torch.arange(modes) * (2 * torch.pi / modes)
    return Mixture(radius * torch.stack([angle.cos(), angle.sin()], 1), std, labels=torch.arange(modes))


def grid(side: int = 5, spacing: float = 0.75, std: float = 0.08) -> Mixture:
    """side x side modes, centred."""
    axis = (torch.arange(side) - (side - 1) / 2) * spacing
    return Mixture(torch.cartesian_prod(axis, axis), std, labels=torch.arange(side * side))


def four_classes(std: float = 0.35) -> Mixture:
    """Four classes of two broad, overlapping modes each, on a circle of radius 1.5: guidance has something to sharpen."""
    angle = torch.arange(8) * (torch.pi / 4)
    return Mixture(1.5 * torch.stack([angle.cos(), angle.sin()], 1), std, labels=torch.arange(8) % 4, process=VP(time_scale=1e-3))
