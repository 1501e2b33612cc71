"""Consistency distillation: a few-step student whose answers agree along the teacher's path (Song et al. 2023, Luo et al. 2023).

At adjacent times t > s of a grid, with x_t noised data and one (guided) solver step of the teacher to x_s,

    L = d( f(x_t, t), sg f_ema(x_s, s) ),     f the clean prediction, which is the identity at the data end in every process.

Sampling alternates f with fresh noise. A baseline of this library (CM, LCM): LCM-LoRA, Hyper-SD, MCM and others start from it.
Exact: discrete pairs, EMA target, gradient through f(x_t, t) only. In place of LCM's c_skip, c_out, which differ from (0, 1) only in the
last few of 1000 timesteps, the boundary is the process's own. Without a data set (diffusers teachers) the data are samples of the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from stillroom.catalogue.claims import Claim
from stillroom.core.config import Count, Natural, Share
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.diffusion import sampling, settings
from stillroom.diffusion.denoiser import take
from stillroom.diffusion.objectives import pseudo_huber, squared
from stillroom.diffusion.sampling import ddim, heun, pairs, sample
from stillroom.diffusion.settings import Setting, TeacherConfig

BASELINE = True


@dataclass(frozen=True)
class Config(TeacherConfig):
    """Laptop defaults; `full()` holds LCM's."""

    steps: Count = 2
    """Sampling steps of the student."""
    levels: Count = 40
    """Steps of the grid whose neighbours are made consistent."""
    source: Literal["teacher", "data"] = "teacher"
    """Where x_s comes from: a step of the teacher, or the same data and noise (consistency training)."""
    solver: Literal["ddim", "heun"] = "ddim"
    distance: Literal["l2", "huber"] = "huber"
    updates: Natural = 1000
    batch: Count = 256
    ema: Share = 0.95
    """Decay of the target network."""
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(kind="adam", lr=1e-3, schedule="cosine"))
    bank: Count = 1024
    """Teacher samples that stand for data where there are none."""
    lora_rank: Natural = 0
    """Rank of the student's LoRA on a diffusers network; 0 trains all weights."""
    lora_alpha: Count = 8
    evaluate: Count = 2000
    """Samples for the metrics."""


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


TINY = {"updates": 4, "evaluate": 64, "batch": 64}
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
        "the teacher's step gives a better target than the same data and noise",
        metric="energy",
        arm="consistency",
        versus="consistency-training",
        better="lower",
        paper="CIFAR-10 one step, FID 3.55 against 8.70",
    ),
]


def consistency_loss(
    cfg: Config, student: nn.Module, target: nn.Module, teacher: nn.Module, data: Tensor, n: Tensor, times: Tensor, cond: object
) -> Tensor:
    """[B] distance between f(x_t, t) and the detached target at the next time, t = times[n], s = times[n + 1] for n [B]."""
    process = target.process
    t, s = times[n], times[n + 1]
    eps = torch.randn_like(data)
    x = process.mix(data, eps, t)  # type: ignore[operator, union-attr]
    with torch.no_grad():
        if cfg.source == "teacher":
            lower, _ = (heun if cfg.solver == "heun" else ddim)(teacher, x, t, s, cond, process)  # type: ignore[arg-type]
        else:
            lower = process.mix(data, eps, s)  # type: ignore[operator, union-attr]
        goal = target(lower, s, cond).x0
    said = student(x, t, cond).x0
    return pseudo_huber(said, goal) if cfg.distance == "huber" else squared(said, goal)


def main(cfg: Config, run: Run, *, setting: Setting | None = None) -> dict[str, float]:
    """setting: your own teacher in place of `cfg.teacher`."""
    setting = setting or cfg.setting()
    start = setting.student(run)
    process, grid = start.process, start.process.grid(cfg.steps)
    teacher = run.frozen(setting.guided(cfg.guidance))
    real, words = setting.reference(cfg.evaluate, cfg.guidance, 40, run.device)
    z = process.start(setting.noise(cfg.evaluate, run.device))
    plain = sample(start, z, grid, words, process=process, step=sampling.consistency)
    own = None
    if setting.truth is None:
        cond = settings.placed(setting.condition(cfg.bank), run.device)
        own = run.cached("teacher-samples", pairs, teacher, setting.noise(cfg.bank, run.device), process.grid(40), cond)["x"]

    net = setting.pipeline.lora(cfg.lora_rank, cfg.lora_alpha) if setting.pipeline and cfg.lora_rank else start
    student, optimizer = run.trainable("student", net, cfg.optimizer)
    ema = run.ema("ema", student, cfg.ema)
    times = torch.tensor(process.grid(cfg.levels), dtype=torch.float64, device=run.device)
    for _ in run.steps(cfg.updates):
        if own is not None:
            i = run.shard(torch.randint(cfg.bank, (cfg.batch,)))
            data, words_here = own[i], take(cond, i)
        else:
            assert setting.truth is not None
            words_here = settings.placed(setting.condition(cfg.batch), run.device)
            data, words_here = run.shard((setting.truth(cfg.batch, words_here), words_here))
        n = torch.randint(cfg.levels, (len(data),), device=run.device)
        run.update(optimizer, consistency_loss(cfg, student, ema.net, teacher, data, n, times, words_here))
        ema.update()

    x = sample(ema.net, z, grid, words, process=process, step=sampling.consistency)
    once = sample(ema.net, z, process.grid(1), words, process=process)
    metrics = setting.evaluate(run, x, real) | {f"one_step_{k}": v for k, v in setting.evaluate(run, once, real).items()}
    run.row("teacher network at as few steps", **setting.evaluate(run, plain, real))
    run.row("student, one step", **setting.evaluate(run, once, real))
    run.row("student", **setting.evaluate(run, x, real))
    setting.show(run, "samples", {"teacher": real, "few steps without distillation": plain, "student": x})
    run.save_student(ema.net, lambda net, folder: setting.save(net, folder, grid, fresh_noise=True))
    return metrics
