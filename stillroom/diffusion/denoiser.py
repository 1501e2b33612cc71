"""A network with its process and prediction type, answering (x0, eps) at any time of any process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from stillroom.core.errors import UserError
from stillroom.diffusion.processes import TINY, Process, Time, along, as_time, blend

PredictionType = Literal["x0", "eps", "v", "velocity", "score", "edm"]


class Prediction(NamedTuple):
    """What a denoiser believes: the clean sample and the unit noise, both [B, ...]; the pair is the same in every process."""

    x0: Tensor
    eps: Tensor


def lerp(first: Prediction, second: Prediction, weight: Time) -> Prediction:
    """first + weight (second - first), `weight` a number or one per sample."""
    w = along(as_time(weight, first.x0), first.x0)
    return Prediction(first.x0 + w * (second.x0 - first.x0), first.eps + w * (second.eps - first.eps))


def translate(x: Tensor, t: Time, source: Process, target: Process) -> tuple[Tensor, Tensor]:
    """(x, t) of `source` as the same noise level of `target`: rho is kept and x is rescaled by the ratio of the norms."""
    there = target.time(source.rho(as_time(t, x)))
    return along(target.norm(there) / source.norm(as_time(t, x)), x) * x, there


class Denoiser(nn.Module):
    """`net(x, time, cond)` read as a prediction of `process`.

    prediction: what the raw output is. "velocity" is dx_t/dt of the process (flow, reversed flow and TrigFlow networks; in Trig the
    network is given x / sigma_data and answers F = velocity / sigma_data); "edm" is Karras preconditioning around F with `sigma_data`.
    cond: whatever the network takes: None, labels [B], or a dict of tensors [B, ...].
    """

    def __init__(self, net: nn.Module, process: Process, prediction: PredictionType = "velocity", sigma_data: float = 0.5):
        super().__init__()
        if prediction not in get_args(PredictionType):
            raise UserError(f"prediction type {prediction!r} is not one of {', '.join(get_args(PredictionType))}.")
        self.net, self.process, self.prediction, self.sigma_data = net, process, prediction, sigma_data

    def extra_repr(self) -> str:
        return f"process={self.process}, prediction={self.prediction}, sigma_data={self.sigma_data}"  # part of the store's key

    def raw(self, x: Tensor, t: Time, cond: Any = None) -> Tensor:
        """The network's own output at (x, t) of its own process."""
        t = as_time(t, x)
        clock = self.process.network_time(t)
        if self.prediction == "edm":
            rho = self.process.rho(t)
            x = along((rho**2 + self.sigma_data**2).rsqrt() / self.process.alpha(t), x) * x
            clock = rho.clamp_min(TINY).log() / 4
        elif (unit := getattr(self.process, "sigma_data", None)) is not None:
            x = x / unit
        return self.net(x, clock.to(x.dtype).expand(len(x)), cond)

    def target(self, x0: Tensor, eps: Tensor, t: Time) -> Tensor:
        """What `raw` should answer at mix(x0, eps, t): the regression target of training in the network's own parametrization."""
        process, t = self.process, as_time(t, x0)
        match self.prediction:
            case "x0":
                return x0
            case "eps":
                return eps
            case "score":
                return process.score(eps, t)
            case "v":
                return process.v(x0, eps, t)
            case "velocity":
                unit = getattr(process, "sigma_data", 1.0)
                velocity = process.velocity(x0, eps, t)
                return velocity if unit == 1 else velocity / unit
            case _:
                rho, sd = process.rho(t), self.sigma_data
                root = (rho**2 + sd**2).sqrt()
                return along(rho / (sd * root), x0) * x0 - along(sd / root, x0) * eps

    def read(self, raw: Tensor, x: Tensor, t: Time) -> Prediction:
        """The pair behind a raw output given for (x, t)."""
        kind = (self.process, self.prediction, self.sigma_data)
        if isinstance(t, Tensor):
            p, q, r, s = torch.stack(_affine(*kind, as_time(t, x))).to(x.dtype).reshape(4, -1, *[1] * (x.ndim - 1))
            return Prediction(torch.addcmul(p * x, q, raw), torch.addcmul(r * x, s, raw))
        a, b, c, d = _numbers(*kind, float(t))
        return Prediction(blend(a, x, b, raw), blend(c, x, d, raw))

    def forward(self, x: Tensor, t: Time, cond: Any = None, process: Process | None = None, *, read: bool = True) -> Any:
        """(x0, eps) at x [B, ...] and time t (a number or [B]) of `process`, the denoiser's own if not given; with `read` false the
        network's own output, for training against `target`."""
        if process is not None and process != self.process:
            x, t = translate(x, t, process, self.process)
        raw = self.raw(x, t, cond)
        return self.read(raw, x, t) if read else raw


def _affine(process: Process, prediction: PredictionType, sigma_data: float, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(p, q, r, s) with x0 = p x + q raw and eps = r x + s raw: every parametrization is affine in every other."""
    a, s = process.alpha(t), process.sigma(t)
    match prediction:
        case "x0":
            over = 1 / s.clamp_min(TINY)
            return torch.zeros_like(a), torch.ones_like(a), over, -a * over
        case "eps":
            over = 1 / a.clamp_min(TINY)
            return over, -s * over, torch.zeros_like(a), torch.ones_like(a)
        case "score":
            over = 1 / a.clamp_min(TINY)
            return over, s**2 * over, torch.zeros_like(a), -s
        case "v":
            return a, -s, s, a
        case "velocity":
            (da, ds), scale = process.rates(t), 1 / process.wronskian
            unit = scale * getattr(process, "sigma_data", 1.0)
            return ds * scale, s * -unit, da * -scale, a * unit
        case _:
            rho, over = s / a.clamp_min(TINY), 1 / a.clamp_min(TINY)
            total = rho**2 + sigma_data**2
            return sigma_data**2 / total * over, rho * sigma_data / total.sqrt(), rho / total * over, -sigma_data / total.sqrt()


@lru_cache(maxsize=4096)
def _numbers(process: Process, prediction: PredictionType, sigma_data: float, t: float) -> tuple[float, ...]:
    """`_affine` at one time, which sampling and roll-outs ask for again and again."""
    return tuple(float(c) for c in _affine(process, prediction, sigma_data, as_time(t)))


class Guided(nn.Module):
    """Classifier-free guidance D_null + w (D_cond - D_null) around a denoiser; w = 1 is no guidance. One batch of 2B per call.

    null: the empty condition for one sample (a label, or a dict of tensors [1, ...]), repeated over the batch.
    """

    def __init__(self, denoiser: nn.Module, weight: Time, null: Any):
        super().__init__()
        self.denoiser, self.weight, self.null = denoiser, weight, null

    def extra_repr(self) -> str:
        return f"weight={self.weight}, null={self.null}"

    @property
    def process(self) -> Process:
        return self.denoiser.process  # type: ignore[return-value]  # torch types every attribute of a submodule as Tensor or Module

    def _both(self, ask: Any, x: Tensor, t: Time, cond: Any, **rest: Any) -> Any:
        twice = torch.cat([as_time(t, x).expand(len(x))] * 2)
        return ask(torch.cat([x, x]), twice, stack(repeat(self.null, len(x), x.device), cond), **rest)

    def raw(self, x: Tensor, t: Time, cond: Any) -> Tensor:
        """The guided raw output; guidance is the same in every parametrization since all are affine in each other."""
        null, conditional = self._both(self.denoiser.raw, x, t, cond).chunk(2)
        return null + along(as_time(self.weight, x), x) * (conditional - null)

    def forward(self, x: Tensor, t: Time, cond: Any, process: Process | None = None) -> Prediction:
        both = self._both(self.denoiser, x, t, cond, process=process)
        (null_x0, cond_x0), (null_eps, cond_eps) = (part.chunk(2) for part in both)
        return lerp(Prediction(null_x0, null_eps), Prediction(cond_x0, cond_eps), self.weight)


class Routed(nn.Module):
    """Several denoisers, each for its own stretch of noise: `experts[i]` answers down to time `ends[i]`, from the noise end on.

    One expert runs per call, so t must be one number for the batch. Used by phase experts, segments and hybrid samplers.
    """

    def __init__(self, experts: Sequence[nn.Module], ends: Sequence[float]):
        super().__init__()
        self.experts, self.ends = nn.ModuleList(experts), list(ends)

    @property
    def process(self) -> Process:
        return self.experts[0].process  # type: ignore[return-value]  # torch types every attribute of a submodule as Tensor or Module

    def expert(self, t: Time, process: Process | None = None) -> nn.Module:
        """The expert whose stretch holds t: strictly noisier than its end, or the last one."""
        process = process or self.process
        here = float(process.rho(t))
        for expert, end in zip(self.experts, self.ends):
            if here > float(process.rho(end)) + 1e-9:
                return expert
        return self.experts[-1]

    def forward(self, x: Tensor, t: Time, cond: Any = None, process: Process | None = None) -> Prediction:
        return self.expert(t, process)(x, t, cond, process)


def repeat(cond: Any, n: int, device: torch.device | None = None) -> Any:
    """One sample's condition for n samples."""
    if isinstance(cond, dict):
        return {name: repeat(value, n, device) for name, value in cond.items()}
    if cond is None:
        return None
    cond = cond.to(device) if isinstance(cond, Tensor) else torch.full((), cond, device=device)  # a number is filled in, not sent
    return cond.expand(n) if cond.ndim == 0 else cond.expand(n, *cond.shape[1:])


def stack(*conds: Any) -> Any:
    """Conditions of several batches as that of their concatenation."""
    if isinstance(conds[0], dict):
        return {name: stack(*(c[name] for c in conds)) for name in conds[0]}
    return None if conds[0] is None else torch.cat(conds)


def take(cond: Any, index: Any) -> Any:
    """Rows `index` of a condition."""
    if isinstance(cond, dict):
        return {name: take(value, index) for name, value in cond.items()}
    return None if cond is None else cond[index]
