"""SlimFlow: a small one-step generator by annealing reflow and flow-guided distillation (Zhu et al. 2024, arXiv 2407.12718).

A smaller student cannot inherit the teacher's weights, and training its own 1-rectified flow before reflow is slow. Stage 1 trains the
small flow v once, while its coupling of noise and images moves from independent to the teacher's deterministic one (bank pairs z, x):

    z_b = sqrt(1 - b^2) z + b z',  z' fresh,  b from 1 to 0;   L = mean (v(x_t, t) - (x - z_b))^2,  x_t = t x + (1 - t) z_b

with z_b and x flipped together half of the time (the teacher must commute with the flip). Stage 2 distils it into one step v', with
the frozen EMA of v as a guide on fresh noise:

    L = d(z + v'(z), x)  +  d(z + v'(z), sg[x_t + (1 - t) v(x_t, t)]),   x_t = z + t sg v'(z),  t ~ U[0.2, 0.8]

Times run as in the authors' code: noise at t = 0, image at t = 1, the noise end evaluated at eps = 1e-3.

Exact: both losses, schedule, stop-gradients, EMA guide without dropout, student from the raw weights.
Shrunk: an exact teacher of 8x8 mirrored digits, a small U-Net; EMA, steps and pairs.
Ours: d is l2 (the paper's best results use LPIPS, which needs a downloaded network). The small network predicts what keeps x - z bounded at
the noise end, whatever the teacher predicts: the velocity, v in a discrete VP pipeline (which plain diffusers samples), EDM's F. The flow
that starts from scratch is given as many updates as both stages together.
Left out: LPIPS, pairs made anew by the small flow, the (1 - t)^2 weight.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom.catalogue import idle
from stillroom.catalogue.claims import Claim
from stillroom.core.config import Count, Share
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.diffusion.denoiser import Denoiser, Prediction, PredictionType, take
from stillroom.diffusion.objectives import squared
from stillroom.diffusion.pairs import Pairs
from stillroom.diffusion.processes import EDM, VP, Process, ReversedFlow, along
from stillroom.diffusion.sampling import Point, pairs, path
from stillroom.diffusion.setting import Setting
from stillroom.diffusion.teachers import TeacherConfig
from stillroom.metrics.cost import parameters
from stillroom.metrics.generation import straightness

FLOW = ReversedFlow()
EPS = 1e-3


@dataclass(frozen=True)
class Reflow:
    """Stage 1: all that decides the small flow, given network and pairs."""

    annealing: Literal["linear", "exp", "cos", "none"] = "linear"
    """Schedule of b; none is plain reflow from scratch."""
    anneal_share: Share = 0.375
    """Share of stage 1 after which b is 0 (300k of 800k)."""
    flip: bool = True
    """Mirror noise and image together, half of the time."""
    steps: Count = 500
    batch: Count = 64
    ema: Share = 0.995
    """Decay of the guide's average (the paper's .999999 needs about a million steps)."""
    optimizer: Optimizer = Optimizer(kind="adam", lr=1e-3, schedule="cosine", clip=1.0)


@dataclass(frozen=True)
class Distil:
    """Stage 2: the one-step student."""

    steps: Count = 300
    start: Literal["flow", "scratch"] = "flow"
    """Where the student starts: at the small flow, or with fresh weights."""
    two_step: bool = True
    """Use the guide's two-step target."""
    batch: Count = 64
    ema: Share = 0.995
    """Decay of the student's average, which is what is judged."""
    optimizer: Optimizer = Optimizer(kind="adam", lr=1e-3, schedule="cosine", clip=1.0)


@dataclass(frozen=True)
class Config(TeacherConfig):
    """Laptop defaults; `full()` holds the paper's."""

    teacher: str = "digits"
    """digits, ring, grid, classes (exact), run:FOLDER (an earlier student of one of these), or diffusers:FOLDER-OR-ID."""
    shrink: Count = 2
    """How many times fewer channels the small network has."""
    dropout: Share = 0.0
    """Of the small network, in both stages."""
    pairs: Count = 2000
    """Noise-image pairs in the bank."""
    pair_steps: Count = 20
    """Heun steps of the teacher for each pair."""
    reflow: Reflow = Reflow()
    distil: Distil = Distil()
    evaluate: Count = 1000
    """Samples for the metrics."""


def full() -> Config:
    """The paper's CIFAR-10 run: 50k pairs, 800k + 400k iterations, batch 128, Adam 2e-4 (5000 steps of warm-up in stage 1 alone), dropout
    .15, EMA .999999."""
    adam = Optimizer(kind="adam", lr=2e-4, clip=1.0)
    return Config(
        teacher="diffusers:google/ddpm-cifar10-32",
        dropout=0.15,
        pairs=50_000,
        pair_steps=35,
        reflow=Reflow(steps=800_000, batch=128, ema=0.999999, optimizer=replace(adam, warmup=5000)),
        distil=Distil(steps=400_000, batch=128, ema=0.999999, optimizer=adam),
        evaluate=50_000,
    )


TINY = {"pairs": 64, "pair_steps": 4, "reflow.steps": 4, "distil.steps": 4, "evaluate": 64}
FSDP2 = "frechet"
ARMS = {
    "slimflow": {},
    "plain-distillation": {"distil.two_step": False},
    "reflow-from-scratch": {"reflow.annealing": "none"},
    "no-flip": {"reflow.flip": False},
    "neither": {"reflow.annealing": "none", "reflow.flip": False},
    "distil-from-scratch": {"distil.start": "scratch", "distil.two_step": False, "distil.steps": 800},
}
CLAIMS = [
    Claim(
        "the two-step target improves the one-step student",
        metric="frechet",
        arm="slimflow",
        versus="plain-distillation",
        better="lower",
        paper="FID 6.43 -> 5.81 (LPIPS), 7.90 -> 7.30 (l2)",
    ),
    Claim(
        "annealing beats reflow from scratch at equal updates",
        metric="flow_frechet",
        arm="slimflow",
        versus="reflow-from-scratch",
        better="lower",
        paper="FID 5.06 -> 4.51 with flip",
    ),
    Claim(
        "flipping pairs helps the small flow", metric="flow_frechet", arm="slimflow", versus="no-flip", better="lower", paper="5.46 -> 4.51"
    ),
    Claim("both help together", metric="flow_frechet", arm="slimflow", versus="neither", better="lower", paper="5.84 -> 4.51"),
    Claim(
        "the two-step target brings endpoints nearer to the teacher's",
        metric="endpoint_error",
        arm="slimflow",
        versus="plain-distillation",
        better="lower",
    ),
    Claim(
        "500 updates of the small flow and 300 of distillation beat 800 of distillation from scratch",
        metric="frechet",
        arm="plain-distillation",
        versus="distil-from-scratch",
        better="lower",
        paper="12.09 without init, LPIPS and 2-RF pairs",
    ),
]


def parametrization(process: Process) -> PredictionType:
    """What the small network predicts in this process, so that x - z stays bounded at the noise end, where 1 / alpha does not."""
    return "v" if isinstance(process, VP) else "edm" if isinstance(process, EDM) else "velocity"


def coupling(annealing: str, done: float) -> float:
    """b when the share `done` of the annealing is over: 1 is independent coupling (a 1-RF on teacher samples), 0 plain reflow."""
    match annealing:
        case "linear":
            return 1 - min(1.0, done)
        case "exp":
            return math.exp(-6 * done)
        case "cos":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        case _:
            return 0.0


def coupled(z: Tensor, fresh: Tensor, b: float) -> Tensor:
    """z_b = sqrt(1 - b^2) z + b z', of unit variance."""
    return math.sqrt(1 - b * b) * z + b * fresh


def mirrored(z: Tensor, x: Tensor, coin: Tensor) -> tuple[Tensor, Tensor]:
    """Noise and image, mirrored together where the coin [B] in [0, 1) is below a half."""
    turn = coin.reshape(-1, *[1] * (z.ndim - 1)) < 0.5
    return torch.where(turn, z.flip(-1), z), torch.where(turn, x.flip(-1), x)


def velocity(net: nn.Module, x: Tensor, t: Tensor | float, cond: Any) -> Tensor:
    """x0 - eps of the network at reversed-flow time t."""
    pair: Prediction = net(x, t, cond, FLOW)
    return FLOW.velocity(*pair, t)


def flow_loss(net: nn.Module, z: Tensor, x: Tensor, u: Tensor, cond: Any) -> Tensor:
    """[B] (v(x_t, t) - (x - z))^2 at t = eps + (1 - eps) u, u in [0, 1)."""
    t = EPS + (1 - EPS) * u
    return squared(velocity(net, FLOW.mix(x, z, t), t, cond), x - z)


def pair_loss(student: nn.Module, z: Tensor, x: Tensor, cond: Any) -> Tensor:
    """[B] d(z + v'(x_eps, eps), x), at the noise end of the pair's path."""
    return squared(z + velocity(student, FLOW.mix(x, z, EPS), EPS, cond), x)


def two_step_loss(student: nn.Module, guide: nn.Module, z: Tensor, u: Tensor, cond: Any) -> Tensor:
    """[B] d(z + v'(z), sg two-step target) at t = .2 + .6 u, on fresh noise z."""
    v = velocity(student, z, EPS, cond)
    return squared(z + v, two_step_target(guide, z, v.detach(), 0.2 + 0.6 * u, cond))


def two_step_target(guide: nn.Module, z: Tensor, v: Tensor, t: Tensor, cond: Any) -> Tensor:
    """Where the guide says the student's own path ends: x_t + (1 - t) guide(x_t, t), x_t = z + t sg v. No gradient."""
    with torch.no_grad():
        x = z + along(t, z) * v
        return x + along(1 - t, z) * velocity(guide, x, t, cond)


def shares(like: Tensor) -> Tensor:
    """[B] uniform in [0, 1)."""
    return torch.rand(len(like), device=like.device)


def reflow(cfg: Reflow, run: Run, small: Denoiser, bank: Pairs) -> tuple[Denoiser, nn.Module]:
    """Stage 1: (raw weights, EMA) of the small flow."""
    net, optimizer = run.trainable("flow", small, cfg.optimizer)
    ema = run.ema("ema", net, cfg.ema)
    for step in run.steps(cfg.steps):
        z, x, cond = bank.draw(run, cfg.batch)
        b = coupling(cfg.annealing, step / (cfg.anneal_share * cfg.steps) if cfg.anneal_share else math.inf)
        z = coupled(z, bank.setting.noise_like(z, cond), b)
        if cfg.flip:
            z, x = mirrored(z, x, shares(z))
        run.update(optimizer, flow_loss(net, z, x, shares(z).double(), cond))
        ema.update()
        run.log(b=b)
    return run.unwrap(net), ema.net


def distil(cfg: Distil, run: Run, start: Denoiser, guide: nn.Module, bank: Pairs, flip: bool) -> nn.Module:
    """Stage 2: the one-step student."""
    student, optimizer = run.trainable("student", start, cfg.optimizer)
    ema = run.ema("ema", student, cfg.ema)
    for _ in run.steps(cfg.steps):
        z, x, cond = bank.draw(run, cfg.batch)
        if flip:
            z, x = mirrored(z, x, shares(z))
        parts = {"pairs": pair_loss(student, z, x, cond)}
        if cfg.two_step:
            parts["two_step"] = two_step_loss(student, guide, bank.setting.noise_like(z, cond), shares(z).double(), cond)
        run.update(optimizer, **parts)
        ema.update()
    return ema.net


@torch.no_grad()
def one_step(student: nn.Module, z: Tensor, cond: Any) -> Tensor:
    """x = z + (1 - eps) v'(z, eps)."""
    return z + (1 - EPS) * velocity(student, z, EPS, cond)


@torch.no_grad()
def many_steps(flow: nn.Module, z: Tensor, cond: Any, steps: int = 20) -> tuple[Tensor, float]:
    """Euler endpoint of the small flow, and the straightness of its paths."""
    times = [EPS + (1 - EPS) * i / steps for i in range(steps + 1)]
    *points, x = path(flow, z, times, cond, process=FLOW)
    assert isinstance(x, Tensor)
    speeds = [FLOW.velocity(*point.prediction, point.t) for point in points if isinstance(point, Point)]
    return x, straightness(torch.stack(speeds), (x - z) / (1 - EPS))


def main(cfg: Config, run: Run, *, setting: Setting | None = None) -> dict[str, float]:
    """setting: your own teacher in place of `cfg.teacher`. UserError for annealing flags that would do nothing."""
    if cfg.reflow.annealing == "none" and cfg.reflow.anneal_share != Reflow.anneal_share:
        idle.refuse("--reflow.anneal-share needs a schedule: --reflow.annealing none has none.")
    setting = setting or cfg.setting()
    teacher = run.frozen(setting.guided(cfg.guidance))
    times = setting.process.grid(cfg.pair_steps)
    bank = Pairs(run, setting, teacher, times, cfg.pairs)

    def small() -> Denoiser:
        return setting.small(cfg.shrink, prediction=parametrization(setting.process), dropout=cfg.dropout)

    decides = (reflow, cfg.reflow, setting.name, repr(small()), bank.bank, bank.cond)
    with run.stage("reflow", shared=decides) as stage:
        flow, guide = reflow(cfg.reflow, stage, small(), bank)
    with run.stage("distil") as stage:
        start = copy.deepcopy(flow).requires_grad_(True) if cfg.distil.start == "flow" else small()
        student = run.unwrap(distil(cfg.distil, stage, start, guide, bank, cfg.reflow.flip))
    return judge(cfg, run, setting, teacher, times, run.unwrap(guide), student)


def judge(
    cfg: Config, run: Run, setting: Setting, teacher: nn.Module, times: list[float], guide: nn.Module, student: nn.Module
) -> dict[str, float]:
    """Fresh noise, the same for all: quality against the data, and distance to where the teacher's ODE ends."""
    real, cond = setting.reference(cfg.evaluate, cfg.guidance, cfg.pair_steps, run.device)
    z = setting.noise(len(real), run.device, cond)
    parts, bends = [], []
    for at in range(0, len(z), min(setting.at_once, 1000)):
        some = slice(at, at + min(setting.at_once, 1000))
        here, words = z[some], take(cond, some)
        curved, bend = many_steps(guide, here, words)
        ends = pairs(teacher, here, times, words, batch=len(here))["x"]
        parts.append((ends, curved, one_step(guide, here, words), one_step(student, here, words)))
        bends.append(bend * len(here))
    names = ("teacher, all steps", "small flow, 20 steps", "small flow, 1 step", "student")
    rows = dict(zip(names, map(torch.cat, zip(*parts)), strict=True))
    ends = rows["teacher, all steps"]
    found = {
        name: {**setting.evaluate(run, samples, real), "endpoint_error": float(squared(samples, ends).mean())}
        for name, samples in rows.items()
    }
    for name, metrics in found.items():
        run.row(name, **metrics)
    setting.show(run, "samples", rows)
    run.save_student(student, lambda net, folder: setting.save(net, folder, setting.process.grid(1), fresh_noise=False))
    flow = {f"flow_{name}": value for name, value in found["small flow, 20 steps"].items()}
    size = float(parameters(student))
    return found["student"] | flow | {"straightness": sum(bends) / len(z), "parameters": size}
