"""DMD2: a one- or few-step generator by distribution matching, two time scales and a GAN head (Yin et al. 2024, arXiv 2405.14867).

A frozen teacher D_r and a fake score D_f (a denoiser of the generator's own output) look at a noised sample y of the generator; both
predict the clean sample. The generator follows, without gradient through either,

    dL/dx = (D_f(y) - D_r(y)) / mean|x - D_r(y)|                                  every `fake_updates`-th iteration,
    and softplus(-head) on features of D_f at y (gan_weight);

the fake score learns in every iteration by denoising the generator's detached samples, and the head with it to tell them from real data:
softplus(head(fake)) + softplus(-head(real)) (weight discriminator_weight, for the head and the fake network alike). With several steps the
generator's input is its own re-noised output of the earlier steps (backward simulation), with gradient in one random step.

A baseline of this library: others build on it. Exact: gradient, normaliser, order (generator first, the fake update reuses its samples),
weights, stop-gradients. Shrunk: networks, data. The head needs real data, so it is off for diffusers teachers, which bring none.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stillroom.catalogue.claims import Claim
from stillroom.core.config import Count, Natural, NonNegative, Share
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.diffusion.denoiser import tapped
from stillroom.diffusion.objectives import squared
from stillroom.diffusion.sampling import consistency, rollout, sample
from stillroom.diffusion.settings import Setting, TeacherConfig
from stillroom.losses.adversarial import Head, softplus_discriminator, softplus_generator
from stillroom.losses.scores import dmd_weight, vsd

BASELINE = True


@dataclass(frozen=True)
class Config(TeacherConfig):
    """Laptop defaults; `full()` holds the paper's."""

    steps: Count = 1
    """Sampling steps of the student."""
    first: Share = 1.0
    """Where a one-step student reads the network, as a share of the way from data to noise (0.4 for SDXL)."""
    updates: Count = 200
    """Generator updates."""
    fake_updates: Count = 5
    """Iterations, each one fake-score update, per generator update."""
    batch: Count = 256
    low: Share = 0.02
    """Least noise that scores are compared at, as a share of the way from data to noise."""
    high: Share = 0.98
    gan_weight: NonNegative = 3e-3
    """Weight of the generator's adversarial loss; 0 trains no head."""
    discriminator_weight: NonNegative = 1e-2
    generator: Optimizer = field(default_factory=lambda: Optimizer(lr=5e-4, momentum=0.0, schedule="cosine"))
    fake: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-3, momentum=0.0, schedule="cosine"))
    lora_rank: Natural = 0
    """Rank of the generator's LoRA on a diffusers network; 0 trains all weights."""
    lora_alpha: Count = 8
    evaluate: Count = 2000
    """Samples for the metrics."""


def full() -> Config:
    """The paper's SDXL run in one step: guidance 8, first step at 399, AdamW 2e-6 (weight decay .01), clip 10, 5 : 1."""
    adam = Optimizer(lr=5e-7, weight_decay=0.01, clip=10.0)
    return Config(
        teacher="diffusers:stabilityai/stable-diffusion-xl-base-1.0",
        first=0.4,
        updates=24_000,
        batch=128,
        guidance=8.0,
        gan_weight=5e-3,
        generator=adam,
        fake=adam,
        evaluate=64,
    )


TINY = {"updates": 2, "evaluate": 64, "batch": 64}
FSDP2 = "energy"
ARMS = {"dmd2": {}, "one-to-one": {"fake_updates": 1}, "no-head": {"gan_weight": 0.0}}
CLAIMS = [
    Claim(
        "two time scales beat one fake update per generator update",
        metric="energy",
        arm="dmd2",
        versus="one-to-one",
        better="lower",
        paper="ImageNet-64 FID 3.48 -> 2.61, without head",
    ),
    Claim(
        "the head on real data improves the generator",
        metric="energy",
        arm="dmd2",
        versus="no-head",
        better="lower",
        paper="ImageNet-64 FID 2.61 -> 1.51",
    ),
]


def features(net: Any, middle: Any, x: Tensor, t: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
    """The network's own output at (x, t) and the middle features of the same call."""
    with tapped(middle) as seen:
        raw = net(x, t, cond, read=False)
    return raw, seen[-1]


def main(cfg: Config, run: Run, *, setting: Setting | None = None) -> dict[str, float]:
    """setting: your own teacher in place of `cfg.teacher`. UserError when --low is not below --high."""
    if cfg.low >= cfg.high:
        raise UserError(f"--low {cfg.low:g} must be below --high {cfg.high:g}.", code=2)
    setting = setting or cfg.setting()
    start = setting.student(run)
    process = start.process
    grid = process.grid(cfg.steps) if cfg.steps > 1 else [float(process.place(cfg.first)), process.clean]
    teacher = run.frozen(setting.guided(cfg.guidance))
    net = setting.pipeline.lora(cfg.lora_rank, cfg.lora_alpha) if setting.pipeline and cfg.lora_rank else copy.deepcopy(start)
    generator, generator_adam = run.trainable("generator", net, cfg.generator)
    fake, fake_adam = run.trainable("fake", copy.deepcopy(start), cfg.fake)
    learners: tuple = (fake_adam,)
    middle: Any = None
    if cfg.gan_weight and setting.truth is not None:
        middle = fake.net.middle
        head, head_adam = run.trainable("head", Head(start.net.features), cfg.fake)  # type: ignore[arg-type]
        learners += (head_adam,)

    for step in run.steps(cfg.updates * cfg.fake_updates):
        turn = step % cfg.fake_updates == 0
        z, cond = run.shard((setting.noise(cfg.batch), setting.condition(cfg.batch)))
        at = int(torch.randint(cfg.steps, ()))
        with torch.set_grad_enabled(turn):
            x, _ = rollout(generator, process.start(z), grid, at, process.clean, cond, process=process, step=consistency)
        if turn:
            t = process.uniform(len(x), cfg.low, cfg.high, device=x.device)
            with torch.no_grad():
                y = process.mix(x, torch.randn_like(x), t)
                real, said = teacher(y, t, cond, process).x0, fake(y, t, cond).x0
                gap = (said - real).abs().mean()
            run.finite.check("scores", gap, {"score gap": gap})
            run.log(score_gap=gap)
            parts = {"dmd": vsd(x, said, real, dmd_weight(x, real))}
            if middle is not None:
                y = process.mix(x, torch.randn_like(x), t)
                parts["adversarial"] = cfg.gan_weight * softplus_generator(head(features(fake, middle, y, t, cond)[1]))
            run.update(generator_adam, **parts)
        x = x.detach()
        eps, t = torch.randn_like(x), process.uniform(len(x), cfg.low, cfg.high, device=x.device)
        if middle is None:
            run.update(learners, squared(fake(process.mix(x, eps, t), t, cond, read=False), start.target(x, eps, t)))
            continue
        assert setting.truth is not None
        said, judged = features(fake, middle, process.mix(x, eps, t), t, cond)
        data = run.shard(setting.truth(cfg.batch, cond))
        truth = head(features(fake, middle, process.mix(data, torch.randn_like(data), t), t, cond)[1])
        run.update(
            learners,
            denoising=squared(said, start.target(x, eps, t)),
            discriminator=cfg.discriminator_weight * softplus_discriminator(truth, head(judged)),
        )

    student = run.unwrap(generator).eval()
    real, cond = setting.reference(cfg.evaluate, cfg.guidance, 40, run.device)
    z = process.start(setting.noise(cfg.evaluate, run.device))
    x, plain = (sample(net, z, grid, cond, process=process, step=consistency) for net in (student, start))
    metrics = setting.evaluate(run, x, real)
    run.row("teacher network at as few steps", **setting.evaluate(run, plain, real))
    run.row("student", **metrics)
    setting.show(run, "samples", {"teacher": real, "few steps without distillation": plain, "student": x})
    run.save_student(student, lambda net, folder: setting.save(net, folder, grid, fresh_noise=True))
    return metrics
