"""dmd2 and consistency: order, routing and targets, and whole runs on exact and diffusers teachers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stillroom.diffusion.settings import Setting

from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.core.store import Store
from stillroom.diffusion.denoiser import Denoiser, Prediction
from stillroom.diffusion.exact import Gaussian
from stillroom.diffusion.processes import EDM, Flow
from stillroom.metrics.generation import energy_distance
from stillroom.nets.denoisers import UNet
from stillroom.recipes.diffusion import consistency, dmd2
from stillroom.recipes.diffusion.consistency import consistency_loss
from stillroom.testing import assert_grads

from .tiny import FLOWS, PIPELINES, size, untrained

DMD: dict[str, Any] = {"updates": 2, "fake_updates": 2, "batch": 4, "evaluate": 16}
CD: dict[str, Any] = {"updates": 3, "batch": 4, "evaluate": 16, "bank": 6, "levels": 5}


@pytest.fixture
def run(tmp_path: Path) -> Any:
    with Run(tmp_path / "run", store=Store(tmp_path / "store")) as opened:
        yield opened


@pytest.mark.parametrize("change", [{}, {"steps": 3}, {"gan_weight": 0.0}, {"fake_updates": 1}])
@pytest.mark.parametrize("name", ["ring", "classes"])
def test_dmd2_end_to_end_on_points(run: Run, name: str, change: dict[str, Any]) -> None:
    assert "energy" in dmd2.main(dmd2.Config(**(DMD | change)), run, setting=untrained(name))


def test_dmd2_updates_each_player_as_often_as_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    update = run.update
    names: Callable[[Any], str] = lambda o: run._role(o[0] if isinstance(o, tuple) else o).name
    monkeypatch.setattr(run, "update", lambda o, *a, **k: (order.append(names(o)), update(o, *a, **k))[1])
    dmd2.main(dmd2.Config(**(DMD | {"fake_updates": 3})), run, setting=untrained("ring"))
    assert order == ["generator", "fake", "fake", "fake"] * 2


def test_nan_scores_stop_the_run_with_a_message(run: Run) -> None:
    setting = untrained("ring")
    setting.teacher.centres.fill_(float("nan"))  # type: ignore[operator, union-attr]
    with pytest.raises(UserError, match=r"scores.*not finite"):
        dmd2.main(dmd2.Config(gan_weight=0.0, **DMD), run, setting=setting)


def test_dmd2_ranges(run: Run) -> None:
    with pytest.raises(UserError, match="must be below"):
        dmd2.main(dmd2.Config(low=0.9, high=0.5), run)
    with pytest.raises(UserError, match="takes no conditions"):
        dmd2.main(dmd2.Config(guidance=3.0), run, setting=untrained("ring"))


@pytest.mark.parametrize("arm", list(consistency.ARMS))
def test_consistency_end_to_end_on_points(run: Run, arm: str) -> None:
    metrics = consistency.main(consistency.Config(**(CD | consistency.ARMS[arm])), run, setting=untrained("ring"))
    assert {"energy", "one_step_energy"} <= set(metrics)


def test_the_exact_consistency_function_has_no_loss_with_a_fine_heun_grid_and_gradient_goes_through_the_first_call() -> None:
    flow, data = Flow(), Gaussian(torch.tensor([0.5, -0.5]).double(), 0.6)

    class Exact(torch.nn.Module):
        process = flow

        def forward(self, x: torch.Tensor, t: Any, cond: Any = None) -> Prediction:
            return Prediction(data.flow_map(x, t, 0.0), x)

    times = torch.linspace(1, 0, 101, dtype=torch.float64)
    n = torch.arange(0, 100, 9)
    cfg = consistency.Config(solver="heun", distance="l2")
    torch.manual_seed(0)
    assert float(consistency_loss(cfg, Exact(), Exact(), data, data.sample(len(n)), n, times, None).max()) < 1e-7
    student, target = (untrained("ring").small(1) for _ in range(2))
    loss = consistency_loss(consistency.Config(), student, target, untrained("ring").teacher, torch.randn(4, 2), n[:4], times, None)
    assert isinstance(student, Denoiser)
    assert_grads(loss.mean(), to=[student], not_to=[target])


@pytest.mark.parametrize(("kind", "rank"), [("sd15", 0), ("sdxl", 2), ("sd3", 0), ("flux", 0), ("flux", 2), ("schnell", 2)])
@pytest.mark.parametrize("name", ["dmd2", "consistency"])
def test_students_of_pipelines_are_sampled_by_plain_diffusers(run: Run, tmp_path: Path, kind: str, rank: int, name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    where = PIPELINES[kind](tmp_path / kind)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    recipe, quick = {"dmd2": (dmd2, DMD), "consistency": (consistency, CD)}[name]
    cfg = recipe.Config(  # type: ignore[attr-defined]
        teacher=f"diffusers:{where}",
        prompts=str(tmp_path / "prompts.txt"),
        size=size(kind),
        guidance=2.0,
        steps=2,
        lora_rank=rank,
        **(quick | {"evaluate": 4}),
    )
    recipe.main(cfg, run)  # type: ignore[attr-defined]
    student = run.folder / "student"
    call = json.loads((student / "call.json").read_text())
    if rank:
        pipe = diffusers.DiffusionPipeline.from_pretrained(where)
        pipe.load_lora_weights(student)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler if kind in FLOWS else diffusers.LCMScheduler
        pipe.scheduler = scheduler.from_pretrained(student / "scheduler")
    else:
        pipe = diffusers.DiffusionPipeline.from_pretrained(student)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a cat", output_type="np", **call)[0].shape == (1, 16, 16, 3)


def test_a_setting_of_ones_own_as_in_the_docs(run: Run) -> None:
    teacher = Denoiser(UNet(3, 8), EDM(), "edm")
    setting = Setting(
        "mine",
        teacher,
        EDM(),
        (3, 8, 8),
        student=lambda run: copy.deepcopy(teacher).requires_grad_(True),
        small=lambda factor: teacher,
        evaluate=lambda run, x, reference: {"energy": energy_distance(x, reference)},
        show=lambda run, name, sets: None,
    )
    metrics = dmd2.main(dmd2.Config(**DMD), run, setting=setting)
    assert metrics["energy"] == metrics["energy"]


@pytest.mark.parametrize("name", ["dmd2", "consistency"])
def test_a_killed_run_ends_bitwise_where_an_uninterrupted_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    recipe, quick = {"dmd2": (dmd2, DMD), "consistency": (consistency, CD)}[name]
    ends = []
    for folder, dies_at in (("whole", None), ("killed", 3)):
        for attempt in range(1 if dies_at is None else 2):
            with Run(tmp_path / folder, store=Store(tmp_path / "store"), save_seconds=0.0, plots=False) as run:
                count, update = 0, run.update

                def counted(*args: Any, _update: Any = update, _attempt: int = attempt, _dies: Any = dies_at, **kw: Any) -> torch.Tensor:
                    nonlocal count
                    count += 1
                    if _dies == count and _attempt == 0:
                        raise KeyboardInterrupt
                    return _update(*args, **kw)

                monkeypatch.setattr(run, "update", counted)
                try:
                    metrics = recipe.main(recipe.Config(**quick), run, setting=untrained("ring"))  # type: ignore[attr-defined]
                except KeyboardInterrupt:
                    continue
        ends.append((metrics, load_file(tmp_path / folder / "student" / "model.safetensors")))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(a, ends[1][1][key]) for key, a in ends[0][1].items())


def test_an_unknown_teacher_is_said(run: Run) -> None:
    with pytest.raises(UserError, match="none of ring"):
        dmd2.main(dmd2.Config(teacher="rng"), run)
