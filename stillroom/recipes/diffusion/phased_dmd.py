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

Exact: targets, kernels, clamp, order, stop-gradients, re-initialised fake nets. The weight w is DMD's normaliser 1 / mean|x_s - D_real|
(whether the paper's runs use it or its w_{t|s} is unconfirmed), t is uniform before the shift (unconfirmed). Shrunk: networks, 2 steps in
2 phases on an exact 2-D teacher. The subinterval claim is checked on the paper's own 1-D example.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from stillroom.catalogue.claims import Claim
from stillroom.core.config import Count, Natural, Positive, Share
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.diffusion.denoiser import Denoiser, Prediction, Routed
from stillroom.diffusion.exact import Mixture
from stillroom.diffusion.objectives import per_sample
from stillroom.diffusion.processes import VP, Flow, Process, along, as_time
from stillroom.diffusion.sampling import rollout, sample
from stillroom.diffusion.settings import Setting, TeacherConfig
from stillroom.losses.scores import dmd_weight, vsd
from stillroom.metrics.generation import diversity, mmd
from stillroom.nets.denoisers import PointNet

Target = Literal["unbiased", "naive"]


@dataclass(frozen=True)
class Config(TeacherConfig):
    """Laptop defaults; `full()` holds the paper's."""

    teacher: str = "ring"
    """ring, grid, digits (exact, nothing to train), or diffusers:FOLDER-OR-ID."""
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
    batch: Count = 256
    margin: Share = 0.02
    """Least distance of t from the phase's end and from pure noise."""
    clamp: Positive = 10.0
    """Largest weight 1 / sigma_{t|s}^2."""
    generator: Optimizer = field(default_factory=lambda: Optimizer(lr=5e-4, momentum=0.0, schedule="cosine"))
    fake: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-3, momentum=0.0, schedule="cosine"))
    lora_rank: Natural = 0
    """Rank of each expert's LoRA on a diffusers network; 0 trains all weights."""
    lora_alpha: Count = 8
    toy_steps: Natural = 1000
    """Training steps of the 1-D check of the subinterval target; 0 skips it."""
    evaluate: Count = 2000
    """Samples for the metrics."""


def full() -> Config:
    """The paper's: 4 steps in 2 phases, shift 5 (Wan; 3 for Qwen-Image), guidance 4, LoRA 64, fake : generator 5 : 1, batch 64.

    The scheduler of Stable Diffusion 3.5 brings a shift of 3.
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
        toy_steps=0,
        evaluate=64,
    )


TINY = {"updates": 2, "evaluate": 64, "batch": 64, "toy_steps": 0, "guidance": 1.0}
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


def fake_loss(fake: nn.Module, x: Tensor, s: float, t: Tensor, cond: object, process: Process, target: Target, clamp: float) -> Tensor:
    """[B] min(1 / sigma_{t|s}^2, clamp) || sigma_{t|s} (F - v*) ||^2 on detached samples x at time s, in velocity (v for VP)."""
    x = x.detach()
    eps = torch.randn_like(x)
    _, spread = process.kernel(as_time(s, x), t)
    said: Prediction = fake(process.renoise(x, s, t, eps), t, cond, process)
    goal = fake_goal(x, eps, s, t, process, target)
    speak = process.v if isinstance(process, VP) else process.velocity
    gap = speak(along(spread, x) * said.x0, along(spread, x) * said.eps, t) - speak(*goal, t)
    return (1 / spread**2).clamp_max(clamp).to(x.dtype) * per_sample(gap**2)


def train_phase(cfg: Config, run: Run, setting: Setting, experts: list[nn.Module], ends: list[float], start: Denoiser) -> nn.Module:
    """Expert len(experts) + 1 of phase (ends[k - 1], ends[k]), against a fresh fake net; the earlier experts are frozen."""
    process, k = setting.process, len(experts)
    grid, end = process.grid(cfg.steps, cfg.shift), ends[k]
    mine = [
        i for i, t in enumerate(grid[:-1]) if (k == 0 or process.rho(t) <= process.rho(ends[k - 1])) and process.rho(t) > process.rho(end)
    ]
    net = setting.pipeline.lora(cfg.lora_rank, cfg.lora_alpha) if setting.pipeline and cfg.lora_rank else copy.deepcopy(start)
    expert, expert_adam = run.trainable("expert", net, cfg.generator)
    fake, fake_adam = run.trainable("fake", copy.deepcopy(start), cfg.fake)
    teacher = run.frozen(setting.guided(cfg.guidance))

    # Uniform in raw time and then shifted, like the grid, but inside (s_k, 1).
    low, high = process.share(end) + cfg.margin, 1 - cfg.margin
    if cfg.interval == "disjoint" and k:
        high = process.share(ends[k - 1])

    def noise_time(n: int) -> Tensor:
        return process.uniform(n, low, high, cfg.shift, device=run.device)

    def generate(differentiable: bool) -> tuple[Tensor, object]:
        z, cond = run.shard((setting.noise(cfg.batch), setting.condition(cfg.batch)))
        z = process.start(z)
        at = int(torch.randint(len(mine), ()))
        with torch.set_grad_enabled(differentiable):
            if mine[0]:
                z = sample(Routed(experts, ends[:k]), z, grid[: mine[0] + 1], cond, process=process)
            return rollout(expert, z, grid[mine[0] :], at, end, cond, process=process)[0], cond

    for _ in run.steps(cfg.updates):
        for _ in range(cfg.fake_updates):
            x, cond = generate(differentiable=False)
            run.update(fake_adam, fake_loss(fake, x, end, noise_time(len(x)), cond, process, cfg.fake_target, cfg.clamp))
        x, cond = generate(differentiable=True)
        with torch.no_grad():
            t = noise_time(len(x))
            y = process.renoise(x, end, t, torch.randn_like(x))
            real, said = teacher(y, t, cond, process).x0, fake(y, t, cond, process).x0
        run.update(expert_adam, vsd(x, said, real, dmd_weight(x, real)))
        gap = (said - real).abs().mean()
        run.finite.check("scores", gap, {"score gap": gap})
        run.log(score_gap=gap)
    return run.unwrap(expert).eval()


def save(student: Routed, folder: Path, setting: Setting, grid: list[float]) -> None:
    """One folder per phase, or the student itself if there is only one."""
    for k, expert in enumerate(student.experts):
        place = folder / f"phase{k + 1}" if len(student.experts) > 1 else folder
        place.mkdir(exist_ok=True)
        setting.save(expert, place, grid, fresh_noise=False)


def main(cfg: Config, run: Run, *, setting: Setting | None = None) -> dict[str, float]:
    """setting: your own teacher in place of `cfg.teacher`. UserError for more phases than steps."""
    if cfg.phases > cfg.steps:
        raise UserError(f"--phases {cfg.phases} needs at least as many --steps, not {cfg.steps}.", code=2)
    metrics = toy(run, cfg.fake_target, cfg.toy_steps) if cfg.toy_steps else {}
    setting = setting or cfg.setting()
    run.frozen(setting.teacher)
    process = setting.process
    grid = process.grid(cfg.steps, cfg.shift)
    ends = [grid[round(cfg.steps * (k + 1) / cfg.phases)] for k in range(cfg.phases)]
    start = setting.student(run)

    experts: list[nn.Module] = []
    for k in range(cfg.phases):
        with run.stage(f"phase{k + 1}") as stage:
            experts.append(train_phase(cfg, stage, setting, experts, ends, start))
    student = Routed(experts, ends)

    real, cond = setting.reference(cfg.evaluate, cfg.guidance, 40, run.device)
    z = process.start(setting.noise(cfg.evaluate, run.device))
    x = sample(student, z, grid, cond, process=process)
    metrics |= setting.evaluate(run, x, real) | {"diversity": diversity(x)}
    if cfg.phases > 1 and setting.truth is not None:
        half = sample(student, z, [t for t in grid if process.rho(t) >= process.rho(ends[0])], cond, process=process)
        noisy = process.mix(real, torch.randn_like(real), ends[0])
        metrics |= {"phase1_mmd": mmd(half, noisy), "phase1_std_ratio": float(half.std() / noisy.std())}
        setting.show(run, "after phase 1", {"noisy data": noisy, "student": half})
    plain = sample(start, z, grid, cond, process=process)
    run.row("teacher network at as few steps", **setting.evaluate(run, plain, real))
    run.row("student", **metrics)
    setting.show(run, "samples", {"teacher": real, "few steps without distillation": plain, "student": x})
    run.save_student(student, lambda net, folder: save(net, folder, setting, grid))
    return metrics


# -- the paper's 1-D example -------------------------------------------------------------------------------------------------------
def toy(run: Run, target: Target, steps: int, s: float = 0.5) -> dict[str, float]:
    """How close a velocity net trained on samples at time s alone comes to the exact velocity on (s, 1], x0 in {-1, 0, 1, 2}."""
    flow, data = Flow(), Mixture(torch.tensor([[-1.0], [0.0], [1.0], [2.0]]), 0.0)
    optimizer = Optimizer(lr=2e-3, schedule="cosine")
    with run.stage("subinterval", shared=(toy, target, steps, s, optimizer)) as stage:
        net, adam = stage.trainable("net", Denoiser(PointNet(1, 64, 3), flow, "velocity"), optimizer)
        for _ in stage.steps(steps):
            x0 = data.sample(1024)
            x = flow.mix(x0, torch.randn_like(x0), s)
            stage.update(adam, fake_loss(net, x, s, flow.uniform(1024, s + 0.02, 1.0), None, flow, target, 10.0))
        errors = []
        with torch.no_grad():
            for t in (0.52, 0.6, 0.7, 0.8, 0.9, 0.98):
                x0 = data.sample(4000)
                x = flow.mix(x0, torch.randn_like(x0), t)
                said, exact = Prediction(*net(x, t)), Prediction(*data(x, t))
                errors.append(float(((flow.velocity(*said, t) - flow.velocity(*exact, t)) ** 2).mean()))
        z, times = torch.randn(4000, 1), [1 - i / 100 for i in range(51)]
        gap = (sample(net, z, times, process=flow) - sample(data, z, times, process=flow)).square().mean().sqrt()
    mean = sum(errors) / len(errors)
    return {"toy_velocity_error": mean, "toy_log10_error": float(torch.tensor(mean).log10()), "toy_ode_gap": float(gap)}
