"""SlimFlow: the annealed coupling, the flip, the two-step target in closed form, and whole runs on exact and diffusers teachers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from stillroom.diffusion.settings import digit_mixture

from stillroom.core.run import Run
from stillroom.core.store import Store
from stillroom.diffusion.denoiser import Prediction
from stillroom.diffusion.exact import Gaussian, Mixture
from stillroom.diffusion.processes import Flow
from stillroom.diffusion.sampling import pairs
from stillroom.recipes.diffusion import slimflow
from stillroom.recipes.diffusion.slimflow import EPS, FLOW, Config, coupling, flipped, one_step, two_step_target, velocity
from stillroom.testing import assert_grads
from tests.diffusion.tiny import PIPELINES, size, untrained

QUICK: dict[str, Any] = {"pairs": 12, "pair_steps": 3, "reflow_steps": 3, "distil_steps": 2, "batch": 4, "evaluate": 24}


def test_coupling_goes_from_independent_to_the_teachers() -> None:
    cfg = Config(reflow_steps=800, anneal_share=0.375)
    assert [coupling(cfg, k) for k in (0, 150, 300, 799)] == [1.0, 0.5, 0.0, 0.0]
    assert coupling(Config(annealing="none"), 0) == 0.0
    assert coupling(Config(annealing="cos", reflow_steps=800), 0) == 1.0


@pytest.mark.parametrize("b", [0.0, 0.3, 0.7, 1.0])
def test_the_mixed_noise_keeps_unit_variance_and_its_correlation(b: float) -> None:
    torch.manual_seed(0)
    z, fresh = torch.randn(2, 200_000)
    mixed = math.sqrt(1 - b * b) * z + b * fresh
    assert float(mixed.std()) == pytest.approx(1.0, abs=0.01)
    assert float((mixed * z).mean()) == pytest.approx(math.sqrt(1 - b * b), abs=0.01)


def test_noise_and_image_flip_together_and_about_half_of_them() -> None:
    torch.manual_seed(0)
    z, x = torch.randn(400, 1, 2, 4), torch.randn(400, 1, 2, 4)
    fz, fx = flipped(z, x)
    mirrored = (fz == z.flip(-1)).flatten(1).all(1)
    assert torch.equal(fx[mirrored], x[mirrored].flip(-1))
    assert torch.equal(fz[~mirrored], z[~mirrored])
    assert torch.equal(fx[~mirrored], x[~mirrored])
    assert 150 < int(mirrored.sum()) < 250


def test_the_digit_teacher_commutes_with_the_flip() -> None:
    teacher = digit_mixture()
    z, times = torch.randn(16, 1, 8, 8), Flow().grid(6)
    straight, mirrored = pairs(teacher, z, times)["x"], pairs(teacher, z.flip(-1), times)["x"]
    torch.testing.assert_close(mirrored, straight.flip(-1), rtol=1e-3, atol=1e-3)


def test_times_run_from_noise_to_image_and_the_velocity_is_image_minus_noise() -> None:
    x, z = torch.randn(3, 2), torch.randn(3, 2)

    class Known(torch.nn.Module):
        def forward(self, y: torch.Tensor, t: Any, cond: Any, process: Any) -> Prediction:
            assert process == FLOW
            return Prediction(x, z)

    torch.testing.assert_close(velocity(Known(), z, EPS, None), x - z)
    torch.testing.assert_close(FLOW.mix(x, z, EPS), EPS * x + (1 - EPS) * z)
    torch.testing.assert_close(one_step(Known(), z, None), z + (1 - EPS) * (x - z))


def test_the_two_step_target_is_the_exact_endpoint_of_a_straight_flow_and_carries_no_gradient() -> None:
    """Data of one point: every path is straight, so any t gives the point itself, whatever the student said if it lies on the path."""
    point = torch.tensor([[0.4, -1.0]]).double()
    guide = Mixture(point, 0.0)
    z, t = torch.randn(5, 2).double(), torch.linspace(0.2, 0.8, 5).double()
    v = (point - z).requires_grad_()
    target = two_step_target(guide, z, v, t, None)
    torch.testing.assert_close(target, point.expand(5, 2))
    assert not target.requires_grad


def test_the_two_step_target_follows_the_guide_from_the_students_state() -> None:
    data, z, t = Gaussian(torch.zeros(2).double(), 0.5), torch.randn(4, 2).double(), torch.full((4,), 0.5).double()
    v = torch.randn(4, 2).double()
    x = z + 0.5 * v
    pair = data(x, 0.5, process=Flow())
    torch.testing.assert_close(two_step_target(data, z, v, t, None), x + 0.5 * (pair.x0 - pair.eps))


def test_gradients_reach_the_student_and_not_the_guide() -> None:
    student, guide = untrained("digits").small(2), untrained("digits").small(2)
    z, t = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.6]).double()
    v = velocity(student, z, EPS, None)
    loss = ((z + v - two_step_target(guide, z, v.detach(), t, None)) ** 2).mean()
    assert_grads(loss, to=[student], not_to=[guide])


@pytest.mark.parametrize("arm", ["slimflow", "neither", "distil-from-scratch"])
def test_end_to_end_on_digits(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, arm: str) -> None:
    store = tmp_path_factory.getbasetemp() / "shared-store"  # the digit classifier is trained once for all arms
    with Run(tmp_path / "run", store=Store(store)) as run:
        metrics = slimflow.main(Config(**(QUICK | slimflow.ARMS[arm])), run, setting=untrained("digits"))
    assert {"frechet", "flow_frechet", "endpoint_error", "straightness"} <= set(metrics)
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 4


@pytest.mark.parametrize("kind", ["ddpm", "sd15", "sd3", "flux"])
def test_small_one_step_pipelines_in_plain_diffusers(tmp_path: Path, kind: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    where = PIPELINES[kind](tmp_path / kind)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    cfg = Config(teacher=f"diffusers:{where}", prompts=str(tmp_path / "prompts.txt"), size=size(kind), flip=False, **QUICK)
    with Run(tmp_path / "run", store=Store(tmp_path / "store")) as run:
        slimflow.main(cfg, run)
    folder = tmp_path / "run" / "student"
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    call = json.loads((folder / "call.json").read_text())
    if kind == "ddpm":
        assert pipe(output_type="np", **call).images.shape == (1, 8, 8, 1)
    else:
        assert pipe("a cat", output_type="np", **call)[0].shape == (1, 16, 16, 3)
