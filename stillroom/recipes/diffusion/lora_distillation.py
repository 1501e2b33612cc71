"""LoRA-enhanced distillation: guidance in one pass by LoRA on the network that is its own teacher (Golnari 2023, arXiv 2312.06899).

One network holds both roles: its LoRA off (scale 0) it is the teacher, on (scale 1) the student. On noised data x_t, t uniform,

    o   = o_null + g (o_cond - o_null)          scale 0, no gradient, g fixed: guidance is baked in
    L   = mean || o_lora(x_t, t, c) - o ||^2    scale 1, on the raw output, gradient to the LoRA weights alone

so that sampling asks the network once per step, by the prompt alone, without a guidance formula, and training holds one network.

Exact: target, data, shared weights, LoRA (rank 4, down N(0, 1/rank^2), up zero, factor 1), no weighting, no noise-prediction term.
Shrunk: a 2-D base network of 4 classes and width 96, 1,200 steps of 192, g = 4.
Ours: learning rate 2e-3 with cosine (the script's 5e-4 in full()); LoRA on every linear layer of the small network's blocks; without
--images a pipeline's data are samples of the guided teacher. `held_bytes` counts weights and Adam's two moments, exactly; gradients,
which are freed after a step, do not count.
Left out: wall-clock and peak memory (they depend on the machine's load; evaluations and bytes stand for them), visual quality, g as an
input (agd has it).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom.adapt import lora
from stillroom.catalogue.claims import Claim
from stillroom.core.config import Count, Natural, NonNegative
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.diffusion.denoiser import Denoiser, Guided
from stillroom.diffusion.matching import answering
from stillroom.diffusion.objectives import squared
from stillroom.diffusion.pairs import Pairs
from stillroom.diffusion.setting import Setting
from stillroom.diffusion.teachers import TeacherConfig
from stillroom.diffusion.worlds import world
from stillroom.metrics.generation import energy_distance, gap_closed


@dataclass(frozen=True)
class Config(TeacherConfig):
    """Laptop defaults; `full()` holds the paper's."""

    teacher: str = "classes"
    """classes (a small conditional network, trained first), run:FOLDER (an earlier student of it), or diffusers:FOLDER-OR-ID."""
    guidance: NonNegative = 4.0
    """The scale g that is baked in (paper: 7.5)."""
    width: Count = 96
    """Width of the embedded base network."""
    train: Literal["lora", "all"] = "lora"
    """What learns: LoRA on the shared network, or all weights of a copy, with a teacher apart (full distillation)."""
    rank: Count = 4
    """Of the LoRA, which counts by factor 1."""
    targets: tuple[str, ...] = ()
    """Which layers get LoRA, as patterns of paths; by default the blocks' linear layers, or the attention of a diffusers network."""
    scale: NonNegative = 1.0
    """Weight of the LoRA when the student is judged: below 1 it slides towards no guidance. It is saved at 1."""
    steps: Count = 50
    """Sampling steps (DDIM)."""
    updates: Natural = 1200
    batch: Count = 192
    optimizer: Optimizer = Optimizer(lr=2e-3, schedule="cosine", clip=1.0)
    bank: Count = 1024
    """Teacher samples that stand for data where there are none."""
    evaluate: Count = 500
    """Samples for the metrics."""


def full() -> Config:
    """The released script: Stable Diffusion 2.1-base, g 7.5, batch 1, AdamW 5e-4 constant (weight decay .01), clip 1, 50 epochs of 50k.

    Give --images with captions (DiffusionDB's first 50k), or --prompts. Batch and epochs are those of the checkpoint's name (unconfirmed).
    """
    return Config(
        teacher="diffusers:stabilityai/stable-diffusion-2-1-base",
        guidance=7.5,
        updates=2_500_000,
        batch=1,
        optimizer=Optimizer(lr=5e-4, weight_decay=1e-2, clip=1.0),
        evaluate=16,
    )


TINY = {"updates": 3, "batch": 16, "steps": 4, "evaluate": 16, "width": 8, "world_steps": 2}
ARMS = {"lora": {}, "full-distillation": {"train": "all"}, "no-distillation": {"updates": 0}}
CLAIMS = [
    Claim("one pass closes more than 70 % of the median gap to guidance", metric="gap_closed", arm="lora", versus=0.7),
    Claim(
        "LoRA holds less than half of a full distillation's weights and optimizer state",
        metric="held_share",
        arm="lora",
        versus=0.5,
        better="lower",
        paper="memory about -50 %",
    ),
    Claim(
        "its samples are no worse than those of full distillation by 0.05",
        metric="sample_error",
        arm="lora",
        versus="full-distillation",
        better="lower",
        margin=-0.05,
    ),
    Claim("its samples are nearer to guided ones than no distillation's", metric="sample_error", arm="lora", versus="no-distillation",
          better="lower"),
]  # fmt: skip


def guided_target(teacher: Denoiser, null: Any, g: float, x: Tensor, t: Tensor, cond: Any) -> Tensor:
    """o_null + g (o_cond - o_null), the raw output under guidance, without gradient."""
    with torch.no_grad():
        return Guided(teacher, g, null).raw(x, t, cond)


def distillation_loss(student: nn.Module, x: Tensor, t: Tensor, cond: Any, target: Tensor) -> Tensor:
    """[B] || o(x_t, t, c) - o ||^2, in float32 at least."""
    raw = student(x, t, cond, read=False)
    wide = torch.promote_types(raw.dtype, torch.float32)
    return squared(raw.to(wide), target.to(wide))


def times_of(process: Any, n: int, device: torch.device) -> Tensor:
    """[n] uniform times: whole timesteps 0..T - 1 of a discrete process, else the way from data to noise."""
    if hasattr(process, "steps"):
        return torch.randint(process.steps, (n,), device=device).double()
    return process.uniform(n, device=device)


def held_bytes(nets: Sequence[nn.Module]) -> int:
    """Of all weights and buffers in `nets`, with Adam's two moments for those that learn; shared ones count once."""
    tensors = {id(t): t for net in nets for t in [*net.parameters(), *net.buffers()]}
    return sum(t.numel() * t.element_size() * (3 if t.requires_grad else 1) for t in tensors.values())


def main(cfg: Config, run: Run, *, setting: Setting | None = None) -> dict[str, float]:
    """setting: your own in place of `cfg.teacher`. UserError for a teacher without conditions or with a guidance embedding, and for flags
    that would do nothing."""
    check(cfg)
    if setting is None:
        setting = world("classes", width=cfg.width, steps=cfg.world_steps) if cfg.teacher == "classes" else cfg.setting()
    if setting.null is None or setting.embedded is not None:
        raise UserError(f"lora-distillation distils guidance, and the teacher {setting.name} asks for it by no second pass.", code=2)
    start = setting.start(run)
    process, whole = start.process, cfg.train == "all"
    own = None if setting.real else Pairs(run, setting, run.frozen(setting.guided(cfg.guidance)), setting.process.grid(cfg.steps), cfg.bank)
    apart = run.frozen(copy.deepcopy(start)) if whole else None
    student, adam = run.trainable("student", start if whole else lora.add(start, cfg.rank, targets=cfg.targets), cfg.optimizer)

    for _ in run.steps(cfg.updates):
        x0, cond = setting.data(run, cfg.batch) if own is None else own.draw(run, cfg.batch)[1:]
        eps, t = setting.noise_like(x0, cond), times_of(process, len(x0), run.device)
        x = process.mix(x0, eps, t)
        with undistilled(student, apart) as teacher:
            target = guided_target(teacher, setting.null, cfg.guidance, x, t, cond)
        run.update(adam, distillation_loss(student, x, t, cond, target))
    return judge(cfg, run, setting, run.unwrap(student).eval(), apart)


@contextmanager
def undistilled(student: Any, apart: nn.Module | None) -> Iterator[Any]:
    """The teacher: a network apart, or the student itself without LoRA and dropout while the block runs."""
    if apart is not None:
        yield apart
        return
    with lora.off(student), answering(student):
        yield student


def check(cfg: Config) -> None:
    """UserError for flags that would do nothing."""
    if cfg.train == "all" and (cfg.rank, cfg.targets, cfg.scale) != (Config.rank, Config.targets, Config.scale):
        raise UserError("--rank, --targets and --scale are LoRA's, and --train all trains no LoRA.", code=2)
    if cfg.guidance == 1:
        raise UserError("--guidance 1 is no guidance: there is nothing to distil.", code=2)
    if cfg.teacher != "classes" and cfg.width != Config.width:
        raise UserError(f"--width {cfg.width} is of the embedded teacher classes, not of {cfg.teacher}.", code=2)


@torch.no_grad()
def judge(cfg: Config, run: Run, setting: Setting, student: Any, apart: nn.Module | None) -> dict[str, float]:
    """Samples from the same noise: guidance in two passes, none, and the student in one."""
    held = held_bytes([student] if apart is None else [student, apart])
    added = lora.state(student)
    weights, buffers = (
        sum(t.numel() * t.element_size() for name, t in tensors if name not in added)
        for tensors in (student.named_parameters(), student.named_buffers())
    )
    times = student.process.grid(cfg.steps)
    z, cond = setting.noise(cfg.evaluate, run.device), setting.condition(cfg.evaluate, run.device)
    with undistilled(student, apart) as teacher:
        goal = setting.sampled(Guided(teacher, cfg.guidance, setting.null), z, times, cond)
        without = setting.sampled(teacher, z, times, cond)
    with lora.scaled(student, cfg.scale):
        ours = setting.sampled(student, z, times, cond)
    metrics = {
        "sample_error": float(squared(ours, goal).mean()),
        "gap_closed": gap_closed(ours, without, goal),
        "energy": energy_distance(ours, goal),
        "held_bytes": float(held),
        "held_share": held / (4 * weights + 2 * buffers),  # of full distillation: a copy that learns, and its teacher
        "evaluations": float(cfg.steps),
    }
    missed = {"sample_error": float(squared(without, goal).mean()), "energy": energy_distance(without, goal)}
    run.row("guidance, two passes", sample_error=0.0, evaluations=2.0 * cfg.steps)
    run.row("no guidance", **missed, evaluations=float(cfg.steps))
    run.row("student", **metrics)
    setting.show(run, "samples", {"no guidance": without, "guidance, two passes": goal, "student, one pass": ours})
    run.save_student(student, lambda net, folder: setting.save(net, folder, times, fresh_noise=False))
    return metrics
