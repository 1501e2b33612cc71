"""SlimFlow: a small one-step generator by annealing reflow and flow-guided distillation (Zhu et al. 2024, arXiv 2407.12718).

A smaller student cannot inherit the teacher's weights, and training its own 1-rectified flow before reflow is slow. Stage 1 trains the
small flow v once, while its coupling of noise and images moves from independent to the teacher's deterministic one (bank pairs z, x):

    z_b = sqrt(1 - b^2) z + b z',  z' fresh,  b from 1 to 0;   L = mean (v(x_t, t) - (x - z_b))^2,  x_t = t x + (1 - t) z_b

with z_b and x flipped together half of the time (the teacher must commute with the flip). Stage 2 distils it into one step v', with
the frozen EMA of v as a guide on fresh noise:

    L = d(z + v'(z), x)  +  d(z + v'(z), sg[x_t + (1 - t) v(x_t, t)]),   x_t = z + t sg v'(z),  t ~ U[0.2, 0.8]

Times run as in the authors' code: noise at t = 0, image at t = 1, the noise end evaluated at eps = 1e-3.
Exact: both losses, schedule, stop-gradients, EMA guide, student from the raw weights. Shrunk: an exact teacher of 8x8 mirrored digits, a
small U-Net; d is l2 (the paper's best results use LPIPS, which needs a downloaded network).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom.catalogue.claims import Claim
from stillroom.core.config import Count, Share
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.diffusion import settings
from stillroom.diffusion.denoiser import Denoiser, Prediction, take
from stillroom.diffusion.objectives import squared
from stillroom.diffusion.processes import ReversedFlow, along
from stillroom.diffusion.sampling import Point, pairs, path
from stillroom.diffusion.settings import Setting, TeacherConfig
from stillroom.metrics.generation import straightness

FLOW = ReversedFlow()
EPS = 1e-3


@dataclass(frozen=True)
class Config(TeacherConfig):
    """Laptop defaults; `full()` holds the paper's."""

    teacher: str = "digits"
    """ring, grid, digits (exact, nothing to train), or diffusers:FOLDER-OR-ID."""
    shrink: Count = 2
    """How many times fewer channels the small network has."""
    pairs: Count = 2000
    """Noise-image pairs in the bank."""
    pair_steps: Count = 20
    """Heun steps of the teacher for each pair."""
    annealing: Literal["linear", "exp", "cos", "none"] = "linear"
    """Schedule of b; none is plain reflow from scratch."""
    anneal_share: Share = 0.375
    """Share of stage 1 after which b is 0 (300k of 800k)."""
    flip: bool = True
    """Mirror noise and image together, half of the time."""
    reflow_steps: Count = 500
    distil_steps: Count = 300
    start: Literal["flow", "scratch"] = "flow"
    """Where the one-step student starts."""
    two_step: bool = True
    """Use the guide's two-step target."""
    batch: Count = 64
    ema: Share = 0.995
    """Decay of the guide's average (the paper's .999999 needs about a million steps)."""
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(kind="adam", lr=1e-3, schedule="cosine", clip=1.0))
    evaluate: Count = 1000
    """Samples for the metrics."""


def full() -> Config:
    """The paper's CIFAR-10 run: 50k pairs, 800k + 400k iterations, batch 128, Adam 2e-4 with 5000 steps of warm-up, EMA .999999."""
    return Config(
        teacher="diffusers:google/ddpm-cifar10-32",
        pairs=50_000,
        pair_steps=35,
        reflow_steps=800_000,
        distil_steps=400_000,
        batch=128,
        ema=0.999999,
        optimizer=Optimizer(kind="adam", lr=2e-4, warmup=5000, clip=1.0),
        evaluate=50_000,
    )


TINY = {"pairs": 64, "pair_steps": 4, "reflow_steps": 4, "distil_steps": 4, "evaluate": 64}
FSDP2 = "frechet"
ARMS = {
    "slimflow": {},
    "plain-distillation": {"two_step": False},
    "reflow-from-scratch": {"annealing": "none"},
    "no-flip": {"flip": False},
    "neither": {"annealing": "none", "flip": False},
    "distil-from-scratch": {"start": "scratch", "two_step": False},
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
        "starting from the small flow beats distilling from scratch",
        metric="frechet",
        arm="plain-distillation",
        versus="distil-from-scratch",
        better="lower",
        paper="12.09 without init, LPIPS and 2-RF pairs",
    ),
]


def coupling(cfg: Config, step: int) -> float:
    """b at a step of stage 1: 1 is independent coupling (a 1-RF on teacher samples), 0 plain reflow."""
    done = step / (cfg.anneal_share * cfg.reflow_steps) if cfg.anneal_share else math.inf
    match cfg.annealing:
        case "linear":
            return 1 - min(1.0, done)
        case "exp":
            return math.exp(-6 * done)
        case "cos":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        case _:
            return 0.0


def velocity(net: nn.Module, x: Tensor, t: Tensor | float, cond: Any) -> Tensor:
    """x0 - eps of the network at reversed-flow time t."""
    pair: Prediction = net(x, t, cond, FLOW)
    return FLOW.velocity(*pair, t)


def flipped(z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Noise and image mirrored together in a random half of the batch."""
    mirror = torch.rand(len(z), *[1] * (z.ndim - 1), device=z.device) < 0.5
    return torch.where(mirror, z.flip(-1), z), torch.where(mirror, x.flip(-1), x)


def two_step_target(guide: nn.Module, z: Tensor, v: Tensor, t: Tensor, cond: Any) -> Tensor:
    """Where the guide says the student's own path ends: x_t + (1 - t) guide(x_t, t), x_t = z + t sg v. No gradient."""
    with torch.no_grad():
        x = z + along(t, z) * v
        return x + along(1 - t, z) * velocity(guide, x, t, cond)


def draw(run: Run, bank: dict[str, Tensor], cond: Any, batch: int) -> tuple[Tensor, Tensor, Any]:
    index = run.shard(torch.randint(len(bank["z"]), (batch,)))
    return bank["z"][index], bank["x"][index], take(cond, index)


def reflow(cfg: Config, run: Run, setting: Setting, bank: dict[str, Tensor], cond: Any) -> tuple[Denoiser, nn.Module]:
    """Stage 1: (raw weights, EMA) of the small flow."""
    net, optimizer = run.trainable("flow", setting.small(cfg.shrink), cfg.optimizer)
    ema = run.ema("ema", net, cfg.ema)
    for step in run.steps(cfg.reflow_steps):
        z, x, words = draw(run, bank, cond, cfg.batch)
        b = coupling(cfg, step)
        z = math.sqrt(1 - b * b) * z + b * torch.randn_like(z)
        if cfg.flip:
            z, x = flipped(z, x)
        t = EPS + (1 - EPS) * torch.rand(len(z), device=z.device).double()
        run.update(optimizer, squared(velocity(net, FLOW.mix(x, z, t), t, words), x - z))
        ema.update()
        run.log(b=b)
    return run.unwrap(net), ema.net


def distil(cfg: Config, run: Run, setting: Setting, flow: Denoiser, guide: nn.Module, bank: dict[str, Tensor], cond: Any) -> nn.Module:
    """Stage 2: the one-step student."""
    student, optimizer = run.trainable(
        "student", copy.deepcopy(flow).requires_grad_(True) if cfg.start == "flow" else setting.small(cfg.shrink), cfg.optimizer
    )
    ema = run.ema("ema", student, cfg.ema)
    for _ in run.steps(cfg.distil_steps):
        z, x, words = draw(run, bank, cond, cfg.batch)
        if cfg.flip:
            z, x = flipped(z, x)
        parts = {"pairs": squared(z + velocity(student, FLOW.mix(x, z, EPS), EPS, words), x)}
        if cfg.two_step:
            z = torch.randn_like(z)
            v = velocity(student, z, EPS, words)
            t = 0.2 + 0.6 * torch.rand(len(z), device=z.device).double()
            parts["two_step"] = squared(z + v, two_step_target(guide, z, v.detach(), t, words))
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
    """setting: your own teacher in place of `cfg.teacher`."""
    setting = setting or cfg.setting()
    teacher = run.frozen(setting.guided(cfg.guidance))
    times = setting.process.grid(cfg.pair_steps)
    cond = settings.placed(setting.condition(cfg.pairs), run.device)
    bank = run.cached("pairs", pairs, teacher, setting.noise(cfg.pairs, run.device), times, cond)

    decides = (reflow, setting.name, cfg.shrink, cfg.annealing, cfg.anneal_share, cfg.flip, cfg.reflow_steps, cfg.batch, cfg.ema)
    with run.stage("reflow", shared=(*decides, cfg.optimizer, bank)) as stage:
        flow, guide = reflow(cfg, stage, setting, bank, cond)
    with run.stage("distil") as stage:
        student = distil(cfg, stage, setting, flow, guide, bank, cond)

    # Fresh noise, the same for all: quality against the data, and distance to where the teacher's ODE ends.
    real, words = setting.reference(cfg.evaluate, cfg.guidance, cfg.pair_steps, run.device)
    z = setting.noise(cfg.evaluate, run.device)
    ends = pairs(teacher, z, times, words)["x"]
    curved, bend = many_steps(guide, z, words)
    straight, x = one_step(guide, z, words), one_step(student, z, words)
    rows = {"teacher, all steps": ends, "small flow, 20 steps": curved, "small flow, 1 step": straight, "student": x}
    for name, samples in rows.items():
        run.row(name, **setting.evaluate(run, samples, real), endpoint_error=float(squared(samples, ends).mean()))
    setting.show(run, "samples", {"teacher": ends, "small flow, 20 steps": curved, "small flow, 1 step": straight, "student": x})
    run.save_student(student, lambda net, folder: setting.save(net, folder, setting.process.grid(1), fresh_noise=False))
    quality = {f"flow_{name}": value for name, value in setting.evaluate(run, curved, real).items()}
    return (
        setting.evaluate(run, x, real)
        | quality
        | {
            "endpoint_error": float(squared(x, ends).mean()),
            "flow_endpoint_error": float(squared(curved, ends).mean()),
            "straightness": bend,
            "parameters": float(sum(p.numel() for p in student.parameters())),
        }
    )
