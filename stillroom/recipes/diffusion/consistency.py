"""Consistency distillation: a few-step student whose answers agree along the teacher's path (Song et al. 2023, Luo et al. 2023).

At adjacent times t > s of a grid, with x_t = alpha_t x0 + sigma_t eps noised data,

    x_s = one step of the (guided) teacher from x_t         (consistency training instead: x_s = alpha_s x0 + sigma_s eps)
    L   = d( f(x_t, t), sg f_ema(x_s, s) ),     f the clean prediction, which is the identity at the data end.

Sampling alternates f with fresh noise. A baseline of this library (CM, LCM): LCM-LoRA, Hyper-SD, MCM and others start from it.

Exact: discrete pairs, EMA target, gradient through f(x_t, t) only.
Shrunk: networks, data, 40 levels.
Ours: in place of LCM's c_skip, c_out, which differ from (0, 1) only in the last few of 1000 timesteps, the boundary is that of the
parametrization, so networks that predict x0, which have none, are refused. Without data (pipelines without --images) the data are samples
of the teacher. At two steps teacher and data targets both reach the floor on the ring, so that claim is made at one step.
Left out: adaptive grids and EMA schedules of consistency training, LPIPS.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom.catalogue import idle
from stillroom.catalogue.claims import Claim
from stillroom.core.config import Count, Natural, Share
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.diffusion import sampling
from stillroom.diffusion.objectives import consistent, pseudo_huber, squared
from stillroom.diffusion.pairs import Pairs
from stillroom.diffusion.processes import Process
from stillroom.diffusion.sampling import ddim, heun
from stillroom.diffusion.setting import Setting
from stillroom.diffusion.teachers import StudentConfig

BASELINE = True


@dataclass(frozen=True)
class Config(StudentConfig):
    """Laptop defaults; `full()` holds LCM's."""

    steps: Count = 2
    """Sampling steps of the student."""
    levels: Count = 40
    """Steps of the grid whose neighbours are made consistent."""
    source: Literal["teacher", "data"] = "teacher"
    """Where x_s comes from: a step of the teacher, or the same data and noise (consistency training)."""
    solver: Literal["ddim", "heun"] = "ddim"
    """The teacher's step."""
    distance: Literal["l2", "huber"] = "huber"
    updates: Natural = 1000
    ema: Share = 0.95
    """Decay of the target network."""
    optimizer: Optimizer = Optimizer(kind="adam", lr=1e-3, schedule="cosine")
    bank: Count = 1024
    """Teacher samples that stand for data where there are none."""


def full() -> Config:
    """LCM-LoRA on Stable Diffusion 1.5: 50 levels, guidance 7.5, Huber, AdamW 1e-4, batch 96, LoRA 64."""
    return Config(
        teacher="diffusers:stable-diffusion-v1-5/stable-diffusion-v1-5",
        steps=4,
        levels=50,
        guidance=7.5,
        updates=20_000,
        batch=96,
        optimizer=Optimizer(lr=1e-4, clip=1.0),
        bank=10_000,
        lora_rank=64,
        lora_alpha=64,
        evaluate=64,
    )


TINY = {"updates": 4, "evaluate": 64, "batch": 64, "world_steps": 2}
FSDP2 = "energy"
ARMS = {"consistency": {}, "undistilled": {"updates": 0}, "consistency-training": {"source": "data"}}
CLAIMS = [
    Claim(
        "two steps of the student beat two of the same network undistilled",
        metric="energy",
        arm="consistency",
        versus="undistilled",
        better="lower",
    ),
    Claim(
        "the teacher's step gives a better target than the same data and noise, sampled in one step",
        metric="one_step_energy",
        arm="consistency",
        versus="consistency-training",
        better="lower",
        paper="CIFAR-10 one step, FID 3.55 against 8.70",
    ),
]


def neighbour(
    cfg: Config, teacher: nn.Module, data: Tensor, eps: Tensor, t: Tensor, s: Tensor, cond: Any, process: Process
) -> tuple[Tensor, Tensor]:
    """(x_t, x_s): noised data, and the point of the same path at the next time s, without gradient."""
    x = process.mix(data, eps, t)
    if cfg.source == "data":
        return x, process.mix(data, eps, s)
    with torch.no_grad():
        return x, (heun if cfg.solver == "heun" else ddim)(teacher, x, t, s, cond, process)[0]


def main(cfg: Config, run: Run, *, setting: Setting | None = None) -> dict[str, float]:
    """setting: your own teacher in place of `cfg.teacher`. UserError for flags that would do nothing, and a network that predicts x0."""
    setting = setting or cfg.setting()
    start = setting.start(run)
    check(cfg, setting, start.prediction)
    process = start.process
    teacher = run.frozen(setting.guided(cfg.guidance))
    own = None if setting.real else Pairs(run, setting, teacher, setting.process.grid(40), cfg.bank)
    student, optimizer = run.trainable("student", setting.learner(start, cfg.lora_rank, cfg.lora_alpha or cfg.lora_rank), cfg.optimizer)
    target = run.ema("ema", student, cfg.ema)
    times = torch.tensor(process.grid(cfg.levels), dtype=torch.float64).to(run.device)
    distance = pseudo_huber if cfg.distance == "huber" else squared
    for _ in run.steps(cfg.updates):
        data, cond = setting.data(run, cfg.batch) if own is None else own.draw(run, cfg.batch)[1:]
        n = torch.randint(cfg.levels, (len(data),), device=run.device)
        t, s = times[n], times[n + 1]
        x, lower = neighbour(cfg, teacher, data, setting.noise_like(data, cond), t, s, cond, process)
        run.update(optimizer, consistent(student, target.net, (x, t), (lower, s), cond, distance=distance))
        target.update()
    return setting.judge(
        run, target.net, start, process.grid(cfg.steps), count=cfg.evaluate, guidance=cfg.guidance,
        step=partial(sampling.consistency, noise=setting.noise_like), also={"one step": process.grid(1)},
    )  # fmt: skip


def check(cfg: Config, setting: Setting, prediction: str) -> None:
    """UserError for what the method cannot be run on, and for flags that would do nothing."""
    if prediction == "x0":
        raise UserError(f"consistency needs a network that is the identity at the data end; that of {setting.name} predicts x0 itself.")
    if cfg.source == "data" and cfg.solver != "ddim":
        idle.refuse(f"--solver {cfg.solver} is a step of the teacher, and --source data takes none.")
    if cfg.source == "data" and cfg.guidance != 1 and setting.real:
        idle.refuse(f"--guidance {cfg.guidance:g} is the teacher's, and --source data does not ask it.")
    if setting.real and cfg.bank != Config.bank:
        idle.refuse(f"--bank {cfg.bank} stands for data, and {setting.name} brings its own.")
