"""From noise to samples: single steps, whole paths, roll-outs with one differentiable step, and banks of noise-sample pairs.

A step is any `step(denoiser, x, t, s, cond, process) -> (x at time s, prediction at x)`; `ddim` and `heun` also take times [B].
The deterministic jump `ddim` is Euler in EDM coordinates, Euler on the velocity in flow coordinates and the rotation in TrigFlow, so it
is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from stillroom.core.errors import UserError
from stillroom.diffusion.denoiser import Prediction, take
from stillroom.diffusion.processes import VP, Process, Time, along, as_time


class Step(Protocol):
    def __call__(self, denoiser: nn.Module, x: Tensor, t: float, s: float, cond: Any, process: Process) -> tuple[Tensor, Prediction]: ...


class Noise(Protocol):
    """Fresh unit noise like x for samples with these conditions (`Setting.noise_like`): some data live in a subspace."""

    def __call__(self, x: Tensor, cond: Any = None) -> Tensor: ...


def plain_noise(x: Tensor, cond: Any = None) -> Tensor:
    return torch.randn_like(x)


def ddim(denoiser: nn.Module, x: Tensor, t: Time, s: Time, cond: Any, process: Process) -> tuple[Tensor, Prediction]:
    """The deterministic jump x_s = alpha_s x0 + sigma_s eps, first order."""
    pair: Prediction = denoiser(x, t, cond, process)
    return process.mix(*pair, s), pair


def heun(denoiser: nn.Module, x: Tensor, t: Time, s: Time, cond: Any, process: Process) -> tuple[Tensor, Prediction]:
    """Second order: the slope dx/dt is averaged over both ends (in rho for VP, where dx/drho = eps); one call into the data end."""
    guess, pair = ddim(denoiser, x, t, s, cond, process)
    if not isinstance(s, Tensor) and s == process.clean:
        return guess, pair
    arrived = process.rho(as_time(s, x)) == 0
    after: Prediction = denoiser(guess, s, cond, process)
    here, there = as_time(t, x), as_time(s, x)
    if isinstance(process, VP):
        mean_eps = (pair.eps + after.eps) / 2
        x_e = x / along(process.alpha(here), x) + along(process.rho(there) - process.rho(here), x) * mean_eps
        better = along(process.alpha(there), x) * x_e
    else:
        better = x + along((there - here) / 2, x) * (process.velocity(*pair, t) + process.velocity(*after, s))
    return torch.where(along(arrived.to(x.dtype), x) > 0, guess, better), pair


def gamma_step(
    denoiser: nn.Module,
    x: Tensor,
    t: float,
    s: float,
    cond: Any,
    process: Process,
    gamma: float = 1.0,
    scale: float = 1.0,
    noise: Noise = plain_noise,
) -> tuple[Tensor, Prediction]:
    """TCD: jump to s' = (1 - gamma) of the way from data to s, then noise back to s. 0 is `ddim`, 1 is consistency multistep.

    scale: factor on the fresh noise (below 1: low temperature). No noise on the step that lands on the data.
    """
    pair: Prediction = denoiser(x, t, cond, process)
    if s == process.clean:
        return pair.x0, pair
    lower = process.clean + (1 - gamma) * (s - process.clean)
    eps = noise(x, cond) if scale == 1 else scale * noise(x, cond)
    if lower == process.clean:
        return process.mix(pair.x0, eps, s), pair
    return process.renoise(process.mix(*pair, lower), lower, s, eps), pair


consistency = partial(gamma_step, gamma=1.0)
"""x0, then fresh noise to the next time."""


def sde_step(
    denoiser: nn.Module,
    x: Tensor,
    t: float,
    s: float,
    cond: Any,
    process: Process,
    strength: float | Callable[[float], float] = 1.0,
    temperature: float = 1.0,
    noise: Noise = plain_noise,
) -> tuple[Tensor, Prediction]:
    """Euler-Maruyama on dx = (velocity + g score) dt + sqrt(2 g eta) dw towards the data, eta = temperature (Proteina).

    strength: g, a number or a function of t. eta = 1 keeps the marginals. The step into the data end is the deterministic jump.
    """
    guess, pair = ddim(denoiser, x, t, s, cond, process)
    g = strength(t) if callable(strength) else strength
    if s == process.clean or g == 0:
        return guess, pair
    span = abs(s - t)
    drift = (s - t) * process.velocity(*pair, t) + span * g * process.score(pair.eps, t)
    return x + drift + (2 * g * temperature * span) ** 0.5 * noise(x, cond), pair


class Point(NamedTuple):
    """One visited state of a path: its time, x, and the prediction made there (a preview of the end)."""

    t: float
    x: Tensor
    prediction: Prediction


def path(
    denoiser: nn.Module, x: Tensor, times: Sequence[float], cond: Any = None, *, process: Process | None = None, step: Step = ddim
) -> Iterator[Point | Tensor]:
    """Every visited `Point` from times[0] on, then the last x alone."""
    process = process or denoiser.process  # type: ignore[assignment]
    assert process is not None
    for t, s in pairwise(times):
        here = x
        x, pair = step(denoiser, here, t, s, cond, process)
        yield Point(t, here, pair)
    yield x


@torch.no_grad()
def sample(
    denoiser: nn.Module, x: Tensor, times: Sequence[float], cond: Any = None, *, process: Process | None = None, step: Step = ddim
) -> Tensor:
    """x at times[0] carried to times[-1], without gradient. UserError if the result is not finite."""
    for point in path(denoiser, x, times, cond, process=process, step=step):
        last = point
    assert isinstance(last, Tensor)
    if not last.isfinite().all():
        raise UserError(f"sampling gave {int((~last.isfinite()).sum())} non-finite values: the network diverged (NaN scores).")
    return last


def rollout(
    denoiser: nn.Module,
    x: Tensor,
    times: Sequence[float],
    at: int,
    end: float | None = None,
    cond: Any = None,
    *,
    process: Process | None = None,
    step: Step = ddim,
) -> tuple[Tensor, Prediction]:
    """Steps 0..at-1 without gradient, then one differentiable call at times[at] that jumps to `end` (default times[-1]).

    With `ddim` this is stochastic gradient truncation (Self-Forcing, Phased DMD), with `consistency` DMD2's backward simulation.
    """
    process = process or denoiser.process  # type: ignore[assignment]
    assert process is not None
    with torch.no_grad():
        for t, s in pairwise(times[: at + 1]):
            x, _ = step(denoiser, x, t, s, cond, process)
    pair: Prediction = denoiser(x, times[at], cond, process)
    return process.mix(*pair, times[-1] if end is None else end), pair


def pairs(
    denoiser: nn.Module,
    noise: Tensor,
    times: Sequence[float],
    cond: Any = None,
    *,
    process: Process | None = None,
    step: Step = heun,
    batch: int = 512,
) -> dict[str, Tensor]:
    """A bank {"z", "x"} of unit noise and where the teacher's ODE carries it from the noise end times[0], both [N, ...]."""
    process = process or denoiser.process  # type: ignore[assignment]
    assert process is not None
    ends = []
    for at in range(0, len(noise), batch):
        z = noise[at : at + batch]
        ends.append(sample(denoiser, process.start(z), times, take(cond, slice(at, at + batch)), process=process, step=step))
    return {"z": noise, "x": torch.cat(ends)}
