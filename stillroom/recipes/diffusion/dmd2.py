"""DMD2: a one- or few-step generator by distribution matching, two time scales and a GAN head (Yin et al. 2024, arXiv 2405.14867).

A frozen teacher D_r and a fake score D_f (a denoiser of the generator's own output) look at a noised sample y of the generator; both
predict the clean sample. The generator follows, without gradient through either,

    dL/dx = (D_f(y) - D_r(y)) / mean|x - D_r(y)|                                  every `fake_updates`-th iteration,
    and softplus(-head) on features of D_f at y (gan_weight);

the fake score learns in every iteration by denoising the generator's detached samples, and the head with it to tell them from real data:
softplus(head(fake)) + softplus(-head(real)) (weight discriminator_weight, for the head and the fake network alike). With several steps the
generator's input is its own re-noised output of the earlier steps (backward simulation), with gradient in one random step.

A baseline of this library: others build on it.
Exact: gradient, normaliser, order (generator first, the fake update reuses its samples), weights, stop-gradients; scores without dropout.
Shrunk: networks, data, and the number of updates.
Ours: the claim on two time scales compares equal numbers of network updates (200 + 1000 against 600 + 600) at equal rates, without head;
real data come with conditions of their own, not with the generator's.
Left out: the ODE-pair regression (the paper drops it too), R1 and other head regularisers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from stillroom.catalogue.claims import Claim
from stillroom.catalogue.idle import refuse_idle
from stillroom.core.config import Count, NonNegative, Share
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.diffusion import matching
from stillroom.diffusion.sampling import consistency, rollout
from stillroom.diffusion.setting import Setting
from stillroom.diffusion.teachers import StudentConfig
from stillroom.losses.adversarial import Head

BASELINE = True


@dataclass(frozen=True)
class Config(StudentConfig):
    """Laptop defaults; `full()` holds the paper's."""

    steps: Count = 1
    """Sampling steps of the student."""
    first: Share = 1.0
    """Where a one-step student reads the network, as a share of the way from data to noise (0.4 for SDXL)."""
    updates: Count = 200
    """Generator updates."""
    fake_updates: Count = 5
    """Iterations, each one fake-score update, per generator update."""
    low: Share = 0.02
    """Least noise that scores are compared at, as a share of the way from data to noise."""
    high: Share = 0.98
    """Most noise that scores are compared at."""
    gan_weight: NonNegative = 3e-3
    """Weight of the generator's adversarial loss, which needs real data; 0 trains no head."""
    discriminator_weight: NonNegative = 1e-2
    """Weight of the loss of head and fake network in the same game."""
    generator: Optimizer = Optimizer(lr=5e-4, momentum=0.0, schedule="cosine")
    fake: Optimizer = Optimizer(lr=1e-3, momentum=0.0, schedule="cosine")
    """Of the fake score and the head."""


def full() -> Config:
    """The paper's SDXL run in one step: guidance 8, read at timestep 399, AdamW 5e-7 for both (weight decay .01), clip 10, 5 : 1.

    Give --prompts, and --images with captions for the head.
    """
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


TINY = {"updates": 2, "evaluate": 64, "batch": 64, "world_steps": 2}
FSDP2 = "energy"
EQUAL_RATES = {"gan_weight": 0.0, "fake.lr": 5e-4}
ARMS = {
    "dmd2": {},
    "no-head": {"gan_weight": 0.0},
    "two-scales": EQUAL_RATES,
    "one-to-one": {**EQUAL_RATES, "fake_updates": 1, "updates": 600},
}
CLAIMS = [
    Claim(
        "the head on real data improves the generator",
        metric="energy",
        arm="dmd2",
        versus="no-head",
        better="lower",
        paper="ImageNet-64 FID 2.61 -> 1.51",
    ),
    Claim(
        "five fake updates per generator update beat one at equal rates and equally many network updates, without head",
        metric="energy",
        arm="two-scales",
        versus="one-to-one",
        better="lower",
        paper="ImageNet-64 FID 3.48 -> 2.61, without head",
    ),
]


def main(cfg: Config, run: Run, *, setting: Setting | None = None) -> dict[str, float]:
    """setting: your own teacher in place of `cfg.teacher`. UserError for flags that contradict each other, and for a head without data."""
    check(cfg)
    setting = setting or cfg.setting()
    if cfg.gan_weight and not setting.real:
        raise UserError(f"--gan-weight {cfg.gan_weight:g}: the head needs real data: give --images FOLDER, or --gan-weight 0.", code=2)
    start = setting.start(run)
    process = start.process
    grid = process.grid(cfg.steps) if cfg.steps > 1 else [float(process.place(cfg.first)), process.clean]
    renoise = partial(consistency, noise=setting.noise_like)
    teacher = run.frozen(setting.guided(cfg.guidance))
    learner = setting.learner(start, cfg.lora_rank, cfg.lora_alpha or cfg.lora_rank)
    generator, generator_adam = run.trainable("generator", learner, cfg.generator)
    fake, fake_adam = run.trainable("fake", copy.deepcopy(start), cfg.fake)
    learners: tuple = (fake_adam,)
    head: Any = None
    if cfg.gan_weight:
        look = partial(matching.features, fake, fake.net.middle)
        head, head_adam = run.trainable("head", Head(start.net.features), cfg.fake)  # type: ignore[arg-type]
        learners += (head_adam,)

    for step in run.steps(cfg.updates * cfg.fake_updates):
        turn = step % cfg.fake_updates == 0
        z, cond = setting.draw(run, cfg.batch)
        at = int(torch.randint(cfg.steps, (), generator=run.common))  # every process makes as many calls
        with torch.set_grad_enabled(turn):
            x, _ = rollout(generator, process.start(z), grid, at, process.clean, cond, process=process, step=renoise)
        if turn:
            t, eps = process.uniform(len(x), cfg.low, cfg.high, device=x.device), setting.noise_like(x, cond)
            real_x0, fake_x0 = matching.scores(run, teacher, fake, process.mix(x.detach(), eps, t), t, cond, process)
            parts = {"dmd": matching.gap_loss(x, real_x0, fake_x0)}
            if head is not None:
                y = process.mix(x, setting.noise_like(x, cond), t)
                with matching.answering(fake):
                    judged = look(y, t, cond)[1]
                parts["adversarial"] = matching.fooling_loss(cfg.gan_weight, head(judged))
            run.update(generator_adam, **parts)
        x = x.detach()
        eps, t = setting.noise_like(x, cond), process.uniform(len(x), cfg.low, cfg.high, device=x.device)
        if head is None:
            raw = fake(process.mix(x, eps, t), t, cond, read=False)
            run.update(learners, denoising=matching.denoising_loss(raw, x, eps, t, start))
            continue
        raw, judged = look(process.mix(x, eps, t), t, cond)
        data, words = setting.data(run, cfg.batch)
        truth = look(process.mix(data, setting.noise_like(data, words), t), t, words)[1]
        run.update(
            learners,
            denoising=matching.denoising_loss(raw, x, eps, t, start),
            discriminator=matching.telling_loss(cfg.discriminator_weight, head(truth), head(judged)),
        )
    return setting.judge(run, generator, start, grid, count=cfg.evaluate, guidance=cfg.guidance, step=renoise)


def check(cfg: Config) -> None:
    """UserError for flags that would do nothing."""
    if cfg.low >= cfg.high:
        raise UserError(f"--low {cfg.low:g} must be below --high {cfg.high:g}.", code=2)
    if cfg.steps > 1 and cfg.first != 1:
        raise UserError(f"--first {cfg.first:g} is where a one-step student reads the network; --steps {cfg.steps} has a grid.", code=2)
    if not cfg.gan_weight:
        refuse_idle(cfg, (Config(), full()), "without the head that --gan-weight 0 leaves out", "discriminator_weight")
