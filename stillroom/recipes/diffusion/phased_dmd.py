"""Phased DMD: one few-step expert per noise phase, matched at its own noise level (Fan et al. 2025, arXiv 2510.27684).

Few-step DMD with truncated roll-outs (SGTS) trains a one-step generator whenever the truncation falls on the first step, and diversity
drops to the one-step level. Here the steps are cut into phases 1 = s_0 > s_1 > ... > s_K = 0, each with its own expert G_k, trained in
order while the earlier ones are frozen. Phase k ends at x_s, s = s_k, where no clean sample exists:

    generator   dL/dx_s = w (D_fake - D_real)(x_t),   x_t = alpha_{t|s} x_s + sigma_{t|s} eps,   t in the *reverse nested* (s, 1)
    fake score  min(1 / sigma_{t|s}^2, 10) || sigma_{t|s} (F(x_t, t) - v*) ||^2
                v* = (alpha_s^2 sigma_t + alpha_t sigma_s^2) / (alpha_s^2 sigma_{t|s}) eps - x_s / alpha_s

eps is the noise of the conditional kernel, so the noise of x_t as a whole is sigma_t eps / sigma_{t|s}; the naive target eps - x_s is
biased. At s = 0 both are ordinary DMD2 without its discriminator. Inside a phase of several steps SGTS is kept, and the chosen step
jumps straight to the phase's end.

Exact: targets, kernels, clamp, order, stop-gradients, re-initialised fake nets; t is drawn in the raw time of the grid and then shifted.
Shrunk: networks, 2 steps in 2 phases on an exact 2-D teacher; the subinterval claim is checked on the paper's own 1-D example.
Ours: the weight w is DMD's normaliser 1 / mean|x_s - D_real| (whether the paper's runs use it or its w_{t|s} is unconfirmed), t is uniform
before the shift (unconfirmed).
Left out: LightX2V's extras (a third fake net, IDA, diversity loss, real-data branch) and teachers that are themselves routed (Wan2.2).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom.catalogue import idle
from stillroom.catalogue.claims import Claim
from stillroom.core.config import Count, Natural, Positive, Share
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.diffusion import matching
from stillroom.diffusion.denoiser import Denoiser, Prediction, Routed
from stillroom.diffusion.exact import Mixture
from stillroom.diffusion.objectives import per_sample
from stillroom.diffusion.processes import VP, Flow, Process, along, as_time, shifted
from stillroom.diffusion.sampling import rollout, sample
from stillroom.diffusion.setting import Setting
from stillroom.diffusion.teachers import StudentConfig
from stillroom.metrics.generation import diversity, mmd
from stillroom.nets.denoisers import PointNet

Target = Literal["unbiased", "naive"]


@dataclass(frozen=True)
class Config(StudentConfig):
    """Laptop defaults; `full()` holds the paper's."""

    steps: Count = 2
    """Sampling steps of the student."""
    phases: Count = 2
    """Experts; 1 is DMD2 with stochastic gradient truncation."""
    shift: Positive = 1.0
    """Shift of the grid of times towards noise, on top of that of a flow pipeline's scheduler."""
    fake_target: Target = "unbiased"
    """Target of the fake score inside a subinterval."""
    interval: Literal["nested", "disjoint"] = "nested"
    """Where x_s is noised to: (s_k, 1), or only (s_k, s_{k-1})."""
    updates: Count = 500
    """Generator updates of each phase."""
    fake_updates: Count = 3
    """Fake-score updates before each generator update."""
    margin: Share = 0.02
    """Least distance of t from the phase's end and from pure noise, as a share of the way before the shift."""
    clamp: Positive = 10.0
    """Largest weight 1 / sigma_{t|s}^2."""
    generator: Optimizer = Optimizer(lr=5e-4, momentum=0.0, schedule="cosine")
    fake: Optimizer = Optimizer(lr=1e-3, momentum=0.0, schedule="cosine")
    toy_steps: Natural = 1000
    """Training steps of the 1-D check of the subinterval target; 0 skips it."""


def full() -> Config:
    """The paper's: 4 steps in 2 phases, shift 5 (Wan; 3 for Qwen-Image), guidance 4, LoRA 64 (alpha 8), fake : generator 5 : 1, batch 64.

    The scheduler of Stable Diffusion 3.5 brings a shift of 3. Give --prompts.
    """
    adam = Optimizer(momentum=0.0, beta2=0.999)
    return Config(
        teacher="diffusers:stabilityai/stable-diffusion-3.5-medium",
        steps=4,
        guidance=4.0,
        fake_updates=5,
        updates=1000,
        batch=64,
        generator=replace(adam, lr=5e-5),
        fake=replace(adam, lr=4e-7),
        lora_rank=64,
        lora_alpha=8,
        toy_steps=0,
        evaluate=64,
    )


TINY = {"updates": 2, "evaluate": 64, "batch": 64, "toy_steps": 0, "world_steps": 2}
FSDP2 = "energy"
ARMS = {
    "phased-dmd": {},
    "sgts-dmd": {"phases": 1},
    "naive-target": {"fake_target": "naive"},
    "disjoint": {"interval": "disjoint"},
}
CLAIMS = [
    Claim(
        "phases keep more diversity than truncated roll-outs at equal updates per expert",
        metric="effective_modes",
        arm="phased-dmd",
        versus="sgts-dmd",
        paper="pairwise DINOv3 cosine .782 / .826 (lower is more diverse), Wan2.1",
    ),
    Claim(
        "the subinterval target is at least ten times closer to the exact velocity than the naive one (log10)",
        metric="toy_log10_error",
        arm="phased-dmd",
        versus="naive-target",
        better="lower",
        margin=1.0,
        paper="1-D example: unbiased / biased",
    ),
    Claim("its ODE lands closer", metric="toy_ode_gap", arm="phased-dmd", versus="naive-target", better="lower"),
    Claim("phase 1 lands on the right noisy distribution", metric="phase1_mmd", arm="phased-dmd", versus="naive-target", better="lower"),
    Claim("the student is better with the unbiased target", metric="energy", arm="phased-dmd", versus="naive-target", better="lower"),
    Claim("reverse nested intervals are better than disjoint ones", metric="energy", arm="phased-dmd", versus="disjoint", better="lower"),
]


def fake_goal(x: Tensor, eps: Tensor, s: float, t: Tensor, process: Process, target: Target) -> Prediction:
    """sigma_{t|s} times the pair (x0*, eps*) that the fake net should answer at x_t = renoise(x, s, t, eps).

    Finite as sigma_{t|s} -> 0: eps* = sigma_t eps / sigma_{t|s} and x0* = x_s / alpha_s - alpha_t sigma_s^2 / (alpha_s^2 sigma_{t|s}) eps.
    "naive" takes x_s for the data and the kernel's noise for all of it.
    """
    _, spread = process.kernel(as_time(s, x), t)
    if target == "naive":
        return Prediction(along(spread, x) * x, along(spread, x) * eps)
    a_s, s_s = process.alpha(as_time(s, x)), process.sigma(as_time(s, x))
    x0 = along(spread / a_s, x) * x - along(process.alpha(t) * s_s**2 / a_s**2, x) * eps
    return Prediction(x0, along(process.sigma(t), x) * eps)


def fake_loss(
    fake: nn.Module, x: Tensor, eps: Tensor, s: float, t: Tensor, cond: Any, process: Process, target: Target, clamp: float
) -> Tensor:
    """[B] min(1 / sigma_{t|s}^2, clamp) || sigma_{t|s} (F - v*) ||^2 on detached samples x at time s, in velocity (v for VP)."""
    x = x.detach()
    _, spread = process.kernel(as_time(s, x), t)
    predicted: Prediction = fake(process.renoise(x, s, t, eps), t, cond, process)
    goal = fake_goal(x, eps, s, t, process, target)
    velocity = process.v if isinstance(process, VP) else process.velocity
    gap = velocity(along(spread, x) * predicted.x0, along(spread, x) * predicted.eps, t) - velocity(*goal, t)
    return (1 / spread**2).clamp_max(clamp).to(x.dtype) * per_sample(gap**2)


def ends_of(grid: Sequence[float], phases: int) -> list[float]:
    """Where each phase ends: the grid's steps dealt evenly, the last end being the data."""
    return [grid[round((len(grid) - 1) * (k + 1) / phases)] for k in range(phases)]


def steps_of(grid: Sequence[float], ends: Sequence[float], k: int) -> list[int]:
    """Which steps of the grid are phase k's."""
    return list(range(grid.index(ends[k - 1]) if k else 0, grid.index(ends[k])))


def noise_range(cfg: Config, process: Process, ends: Sequence[float], k: int) -> tuple[float, float]:
    """Between which shares of the way, in the raw time that the grid's shift is applied to, the noise times of phase k lie: (s_k, 1), or
    (s_k, s_{k-1}) if disjoint, less the margins. UserError when these leave nothing."""
    raw = [shifted(process.share(end), 1 / cfg.shift) for end in ends]
    low, high = raw[k] + cfg.margin, raw[k - 1] if cfg.interval == "disjoint" and k else 1 - cfg.margin
    if low >= high:
        raise UserError(f"--margin {cfg.margin:g} leaves no noise times to phase {k + 1}, which lie in {raw[k]:.3g} to {high:.3g}.", code=2)
    return low, high


def train_phase(
    cfg: Config, run: Run, setting: Setting, start: Denoiser, grid: list[float], ends: list[float], experts: list[nn.Module]
) -> nn.Module:
    """The expert of phase k = len(experts), against a fresh fake net; the earlier experts are frozen."""
    process, k = start.process, len(experts)
    end, own, (low, high) = ends[k], steps_of(grid, ends, k), noise_range(cfg, process, ends, k)
    learner = setting.learner(start, cfg.lora_rank, cfg.lora_alpha or cfg.lora_rank)
    expert, expert_adam = run.trainable("expert", learner, cfg.generator)
    fake, fake_adam = run.trainable("fake", copy.deepcopy(start), cfg.fake)
    teacher = run.frozen(setting.guided(cfg.guidance))
    chain = Routed([*experts, expert], ends[: k + 1])

    def generate() -> tuple[Tensor, Any, Tensor, Tensor]:
        """Samples at the phase's end, their condition, and a noise time and kernel noise to see them at."""
        z, cond = setting.draw(run, cfg.batch)
        at = own[int(torch.randint(len(own), (), generator=run.common))]  # every process makes as many calls
        x, _ = rollout(chain, process.start(z), grid, at, end, cond, process=process)
        t = process.uniform(len(x), low, high, cfg.shift, device=run.device)
        return x, cond, t, setting.noise_like(x, cond)

    for _ in run.steps(cfg.updates):
        for _ in range(cfg.fake_updates):
            with torch.no_grad():
                x, cond, t, eps = generate()
            run.update(fake_adam, fake_loss(fake, x, eps, end, t, cond, process, cfg.fake_target, cfg.clamp))
        x, cond, t, eps = generate()
        real_x0, fake_x0 = matching.scores(run, teacher, fake, process.renoise(x.detach(), end, t, eps), t, cond, process)
        run.update(expert_adam, matching.gap_loss(x, real_x0, fake_x0))
    return run.unwrap(expert).eval()


def save(student: Routed, folder: Path, setting: Setting, grid: list[float]) -> None:
    """One folder per phase, or the student itself if there is only one."""
    for k, expert in enumerate(student.experts):
        place = folder / f"phase{k + 1}" if len(student.experts) > 1 else folder
        place.mkdir(exist_ok=True)
        setting.save(expert, place, grid, fresh_noise=False)


def main(cfg: Config, run: Run, *, setting: Setting | None = None) -> dict[str, float]:
    """setting: your own teacher in place of `cfg.teacher`. UserError for more phases than steps, and for flags that would do nothing."""
    check(cfg)
    metrics = toy(run, cfg.fake_target, cfg.toy_steps) if cfg.toy_steps else {}
    setting = setting or cfg.setting()
    start = setting.start(run)
    process = start.process
    grid = process.grid(cfg.steps, cfg.shift)
    ends = ends_of(grid, cfg.phases)
    for k in range(cfg.phases):
        noise_range(cfg, process, ends, k)  # said now, not after the first phase

    experts: list[nn.Module] = []
    for k in range(cfg.phases):
        with run.stage(f"phase{k + 1}") as stage:
            experts.append(train_phase(cfg, stage, setting, start, grid, ends, experts))
    student = Routed(experts, ends)

    if cfg.phases > 1 and setting.real:  # the first expert alone against data at its noise level
        real, cond = setting.reference(cfg.evaluate, cfg.guidance, 40, run.device)
        half = setting.sampled(experts[0], setting.noise(len(real), run.device, cond), grid[: grid.index(ends[0]) + 1], cond)
        noisy = process.mix(real, setting.noise_like(real, cond), ends[0])
        metrics |= {"phase1_mmd": mmd(half, noisy), "phase1_std_ratio": float(half.std() / noisy.std())}
        setting.show(run, "after phase 1", {"noisy data": noisy, "student": half})
    metrics |= setting.judge(
        run, student, start, grid, count=cfg.evaluate, guidance=cfg.guidance, save=lambda net, folder: save(net, folder, setting, grid)
    )  # fmt: skip
    z, cond = setting.noise(cfg.evaluate, run.device), setting.condition(cfg.evaluate, run.device)
    return metrics | {"diversity": diversity(setting.sampled(student, z, grid, cond))}


def check(cfg: Config) -> None:
    """UserError for flags that contradict each other or would do nothing."""
    if cfg.phases > cfg.steps:
        raise UserError(f"--phases {cfg.phases} needs at least as many --steps, not {cfg.steps}.", code=2)
    if cfg.phases == 1 and cfg.interval == "disjoint":
        idle.refuse("--interval disjoint needs an earlier phase to be disjoint from: give more --phases.")
    if cfg.phases == 1 and cfg.fake_target == "naive" and not cfg.toy_steps:
        idle.refuse("--fake-target naive is the unbiased one at the data end, where a single phase lies: give more --phases.")


# -- the paper's 1-D example -------------------------------------------------------------------------------------------------------
def toy(run: Run, target: Target, steps: int, s: float = 0.5) -> dict[str, float]:
    """How close a velocity net trained on samples at time s alone comes to the exact velocity on (s, 1], x0 in {-1, 0, 1, 2}."""
    flow, data = Flow(), Mixture(torch.tensor([[-1.0], [0.0], [1.0], [2.0]]), 0.0)
    optimizer = Optimizer(lr=2e-3, schedule="cosine")
    with run.stage("subinterval", shared=(toy, target, steps, s, optimizer)) as stage:
        net, adam = stage.trainable("net", Denoiser(PointNet(1, 64, 3), flow, "velocity"), optimizer)
        data.to(stage.device)
        for _ in stage.steps(steps):
            x0 = data.sample(1024)
            x = flow.mix(x0, torch.randn_like(x0), s)
            t, eps = flow.uniform(1024, s + 0.02, 1.0, device=stage.device), torch.randn_like(x)
            stage.update(adam, fake_loss(net, x, eps, s, t, None, flow, target, 10.0))
        errors = []
        with torch.no_grad():
            for at in (0.52, 0.6, 0.7, 0.8, 0.9, 0.98):
                x0 = data.sample(4000)
                x = flow.mix(x0, torch.randn_like(x0), at)
                predicted, exact = Prediction(*net(x, at)), Prediction(*data(x, at))
                errors.append(float(((flow.velocity(*predicted, at) - flow.velocity(*exact, at)) ** 2).mean()))
        z, times = torch.randn(4000, 1, device=stage.device), [1 - i / 100 for i in range(51)]
        gap = (sample(net, z, times, process=flow) - sample(data, z, times, process=flow)).square().mean().sqrt()
    mean = sum(errors) / len(errors)
    return {"toy_velocity_error": mean, "toy_log10_error": float(torch.tensor(mean).log10()), "toy_ode_gap": float(gap)}
