"""Training objectives of denoisers: distances, discrete and continuous consistency. One value per sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.diffusion.processes import Time, along, as_time


def per_sample(values: Tensor) -> Tensor:
    """[B] mean over everything but the batch."""
    return values.flatten(1).mean(1)


def squared(a: Tensor, b: Tensor) -> Tensor:
    """[B] mean squared distance."""
    return per_sample((a - b) ** 2)


def pseudo_huber(a: Tensor, b: Tensor, scale: float = 0.00054, c: float | None = None) -> Tensor:
    """[B] sqrt(||a - b||^2 + c^2) - c with c = scale sqrt(dim) (improved consistency training), or c as given."""
    c = scale * math.sqrt(a[0].numel()) if c is None else c
    return ((a - b).flatten(1).pow(2).sum(1) + c * c).sqrt() - c


def consistent(
    student: nn.Module,
    target: nn.Module,
    upper: tuple[Tensor, Time],
    lower: tuple[Tensor, Time],
    cond: Any = None,
    *,
    end: Time | None = None,
    view: Callable[[Tensor], Tensor] = lambda x: x,
    distance: Callable[[Tensor, Tensor], Tensor] = squared,
) -> Tensor:
    """[B] d(view f(x_t, t), sg view f_target(x_s, s)): two neighbours on a path, upper = (x_t, t) and lower = (x_s, s), lead to the same.

    f is the clean prediction (Song et al. 2023), or with `end` the jump alpha_end x0 + sigma_end eps to that time (CTM, TCD), both in the
    process of the target. Gradient through f(x_t, t) only. The target answers first, so that its noise is drawn before the student's.
    """
    process: Any = target.process

    def arrived(net: nn.Module, x: Tensor, t: Time) -> Tensor:
        pair = net(x, t, cond)
        return view(pair.x0 if end is None else process.mix(*pair, end))

    with torch.no_grad():
        goal = arrived(target, *lower)
    return distance(arrived(student, *upper), goal)


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
