"""Phased DMD: the subinterval target in closed form, phases and grids, and whole runs on exact and diffusers teachers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.core.store import Store
from stillroom.diffusion.exact import Gaussian
from stillroom.diffusion.processes import EDM, VP, Flow, Process, ReversedFlow, Trig
from stillroom.recipes.diffusion import phased_dmd
from stillroom.recipes.diffusion.phased_dmd import Config, fake_goal
from tests.diffusion.tiny import FLOWS, PIPELINES, size, untrained

QUICK = {"updates": 2, "fake_updates": 1, "batch": 4, "toy_steps": 0, "evaluate": 16}


def run(folder: Path, seed: int = 0) -> Run:
    return Run(folder / "run", seed, store=Store(folder / "store"))


@pytest.mark.parametrize("process", [EDM(), VP(), Flow(), ReversedFlow(), Trig(0.5)], ids=lambda p: type(p).__name__)
def test_the_unbiased_target_regresses_to_the_exact_denoiser(process: Process) -> None:
    """E[(x0*, eps*) | x_t] by linear regression over samples of a Gaussian; the naive target regresses to something else."""
    torch.manual_seed(0)
    data, n = Gaussian(torch.tensor([0.7]).double(), 0.5), 400_000
    s, t = float(process.time(0.6)), process.time(torch.tensor([1.5], dtype=torch.float64))
    x = process.mix(data.sample(n), torch.randn(n, 1).double(), s)
    eps = torch.randn(n, 1).double()
    y = process.renoise(x, s, float(t), eps)
    design = torch.cat([y, torch.ones_like(y)], 1)
    probe = torch.tensor([[-1.0], [0.5], [2.0]]).double() * float(process.norm(t))
    exact = data(probe, float(t), process=process)
    _, spread = process.kernel(s, t)
    for target, good in (("unbiased", True), ("naive", False)):
        goal = fake_goal(x, eps, s, t.expand(n), process, target)  # type: ignore[arg-type]
        for part, truth in zip(goal, exact, strict=True):
            slope = torch.linalg.lstsq(design, part / spread).solution
            guess = torch.cat([probe, torch.ones_like(probe)], 1) @ slope
            assert bool((guess - truth).abs().max() < 0.02) == good


def test_the_flow_target_is_the_papers() -> None:
    flow, s, t = Flow(), 0.5, torch.tensor([0.6, 0.9], dtype=torch.float64)
    x, eps = torch.randn(2, 3).double(), torch.randn(2, 3).double()
    a_s, s_s, a_t, s_t = 1 - s, s, 1 - t[:, None], t[:, None]
    _, spread = flow.kernel(s, t)
    goal = fake_goal(x, eps, s, t, flow, "unbiased")
    paper = (a_s**2 * s_t + a_t * s_s**2) / a_s**2 * eps - spread[:, None] / a_s * x
    torch.testing.assert_close(flow.velocity(*goal, t), paper)
    at_zero = fake_goal(x, eps, 0.0, t, flow, "unbiased")
    torch.testing.assert_close(flow.velocity(*at_zero, t) / t[:, None], eps - x)
    naive = fake_goal(x, eps, s, t, flow, "naive")
    torch.testing.assert_close(flow.velocity(*naive, t), spread[:, None] * (eps - x))


def test_the_target_stays_finite_at_the_phases_end() -> None:
    goal = fake_goal(torch.ones(1, 1), torch.ones(1, 1), 0.5, torch.tensor([0.5]).double(), Flow(), "unbiased")
    assert all(part.isfinite().all() for part in goal)


def test_more_phases_than_steps_are_refused(tmp_path: Path) -> None:
    with run(tmp_path) as r, pytest.raises(UserError, match="--phases 3"):
        phased_dmd.main(Config(steps=2, phases=3), r)


@pytest.mark.parametrize("phases", [1, 2, 4])
def test_end_to_end_on_points(tmp_path: Path, phases: int) -> None:
    cfg = Config(steps=4, phases=phases, shift=5.0, **{**QUICK, "toy_steps": 2})  # type: ignore[arg-type]
    with run(tmp_path) as r:
        metrics = phased_dmd.main(cfg, r, setting=untrained("ring"))
    assert {"energy", "effective_modes", "toy_log10_error"} <= set(metrics)
    assert ("phase1_mmd" in metrics) == (phases > 1)
    assert len(list((tmp_path / "run" / "student").rglob("*.safetensors"))) == phases


@pytest.mark.parametrize(("kind", "rank"), [("sd15", 0), ("sdxl", 2), ("sd3", 2), ("flux", 0), ("flux", 2), ("schnell", 2)])
def test_phase_experts_in_plain_diffusers(tmp_path: Path, kind: str, rank: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    teacher = PIPELINES[kind](tmp_path / kind)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    cfg = Config(
        teacher=f"diffusers:{teacher}",
        prompts=str(tmp_path / "prompts.txt"),
        size=size(kind),
        guidance=2.0,
        lora_rank=rank,
        **(QUICK | {"evaluate": 4}),  # type: ignore[arg-type]
    )
    with run(tmp_path) as r:
        metrics = phased_dmd.main(cfg, r)
    assert metrics["energy"] == metrics["energy"]
    student = tmp_path / "run" / "student"
    call = json.loads((student / "phase1" / "call.json").read_text())
    if rank:
        pipe = diffusers.DiffusionPipeline.from_pretrained(teacher)
        for phase in ("phase1", "phase2"):
            pipe.load_lora_weights(student / phase, adapter_name=phase)
        pipe.set_adapters("phase1")
        pipe.scheduler = (diffusers.FlowMatchEulerDiscreteScheduler if kind in FLOWS else diffusers.TCDScheduler).from_pretrained(
            student / "phase1" / "scheduler"
        )

        def switch(pipe, step, t, tensors):  # type: ignore[no-untyped-def]
            pipe.set_adapters("phase2")
            return tensors
    else:
        pipe = diffusers.DiffusionPipeline.from_pretrained(student / "phase1")
        second = diffusers.DiffusionPipeline.from_pretrained(student / "phase2")

        def switch(pipe, step, t, tensors):  # type: ignore[no-untyped-def]
            slot = "transformer" if kind in FLOWS else "unet"
            setattr(pipe, slot, getattr(second, slot))
            return tensors

    pipe.set_progress_bar_config(disable=True)
    images = pipe("a cat", output_type="np", callback_on_step_end=switch, **call)[0]
    assert images.shape == (1, 16, 16, 3)
