"""Training objectives of denoisers: denoising with the usual weights, discrete and continuous consistency. One value per sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from stillroom.diffusion.processes import TINY, Process, Time, along, as_time

Weight = Literal["x0", "eps", "v", "velocity", "edm"]


def weight(kind: Weight, process: Process, t: Time, sigma_data: float = 0.5) -> Tensor:
    """Weight of ||D - x0||^2 that makes it the squared error of the named parametrization (`Denoiser.target`), float64 like t.

    eps: alpha^2 / sigma^2; v: 1 / sigma^2 (unit norm); velocity: (alpha sigma' - alpha' sigma)^2 / sigma^2, which is 1 / t^2 in Flow;
    edm: 1 / rho^2 + 1 / sigma_data^2 (DMD2's "karras").
    """
    a, s = process.alpha(t), process.sigma(t).clamp_min(TINY)
    match kind:
        case "x0":
            return torch.ones_like(s)
        case "eps":
            return (a / s) ** 2
        case "v":
            return (a**2 + s**2) ** 2 / s**2
        case "velocity":
            da, ds = process.rates(t)
            return ((a * ds - da * s) / s) ** 2
        case "edm":
            return process.rho(t).clamp_min(TINY) ** -2 + sigma_data**-2


def per_sample(values: Tensor) -> Tensor:
    """[B] mean over everything but the batch."""
    return values.flatten(1).mean(1)


def squared(a: Tensor, b: Tensor) -> Tensor:
    """[B] mean squared distance."""
    return per_sample((a - b) ** 2)


def pseudo_huber(a: Tensor, b: Tensor, scale: float = 0.00054) -> Tensor:
    """[B] sqrt(||a - b||^2 + c^2) - c with c = scale sqrt(dim) (improved consistency training)."""
    c = scale * math.sqrt(a[0].numel())
    return ((a - b).flatten(1).pow(2).sum(1) + c * c).sqrt() - c


def cm_scalings(rho: Time, sigma_data: float = 0.5, low: float = 0.002) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) of consistency models, for f = c_skip x_E + c_out F; the identity at rho = low."""
    rho = as_time(rho)
    return sigma_data**2 / ((rho - low) ** 2 + sigma_data**2), sigma_data * (rho - low) / (rho**2 + sigma_data**2).sqrt()


def lcm_scalings(k: Time, sigma_data: float = 0.5, scale: float = 10.0) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) of latent consistency models, for f = c_skip x_t + c_out x0hat at the whole timestep k."""
    k = scale * as_time(k)
    return sigma_data**2 / (k**2 + sigma_data**2), k / (k**2 + sigma_data**2).sqrt()


def scm_tangent(
    net: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    t: Tensor,
    velocity: Tensor,
    sigma_data: float = 0.5,
    ramp: float = 1.0,
    settle: float | None = 0.1,
) -> tuple[Tensor, Tensor]:
    """(F, g): the network's output with gradient, and the detached tangent whose target is F - sg(F) - g (sCM, TBCM).

    net(x / sigma_data, t) -> F, t [B] in TrigFlow time; velocity = dx/dt of the teacher (guidance applied there).
    g = -cos^2 t (sd F - dx/dt) - r (cos t sin t x + sd dF), dF the Jacobian-vector product along cos t sin t (dx/dt / sd, 1); then
    g / (||g|| + settle) per sample unless settle is None. With r = 1, g is cos t df/dt of f = cos t x - sin t sd F.
    """
    cos, sin = along(t.cos(), x), along(t.sin(), x)
    with torch.no_grad():
        speed = (t.cos() * t.sin()).to(x.dtype)
        # torch leaves jvp's result untyped: a pair without `has_aux`.
        frozen, change = torch.func.jvp(net, (x / sigma_data, t.to(x.dtype)), (along(speed, x) * velocity / sigma_data, speed))  # type: ignore[misc]
        g = -(cos**2) * (sigma_data * frozen - velocity) - ramp * (cos * sin * x + sigma_data * change)
        if settle is not None:
            g = g / (along(g.flatten(1).norm(dim=1), g) + settle)
    return net(x / sigma_data, t.to(x.dtype)), g.detach()
