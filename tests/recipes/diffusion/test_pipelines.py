"""Few-step recipes on tiny diffusers pipelines: what they save is sampled by plain diffusers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.catalogue import cards
from stillroom.core.config import override
from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.diffusion import pipelines
from stillroom.diffusion.adapters import load
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.processes import EDM
from stillroom.diffusion.sampling import sample
from stillroom.diffusion.setting import Setting
from stillroom.metrics.generation import energy_distance
from stillroom.nets.denoisers import UNet
from stillroom.recipes.diffusion import agd, dmd2
from tests.diffusion.test_pipelines import captioned
from tests.diffusion.tiny import FLOWS, PIPELINES, call, size

diffusers = pytest.importorskip("diffusers")
SMALL: dict[str, dict[str, Any]] = {
    "dmd2": {"updates": 2, "fake_updates": 2, "batch": 4, "evaluate": 4, "steps": 2, "gan_weight": 0.0},
    "consistency": {"updates": 3, "batch": 4, "evaluate": 4, "bank": 6, "levels": 5},
    "phased-dmd": {"updates": 2, "fake_updates": 1, "batch": 4, "toy_steps": 0, "evaluate": 4},
    "slimflow": {"pairs": 12, "pair_steps": 3, "reflow.steps": 3, "reflow.flip": False, "distil.steps": 2, "reflow.batch": 4,
                 "distil.batch": 4, "evaluate": 6},
    "agd": {"trajectories": 6, "steps": 4, "updates": 3, "batch": 5, "evaluate": 6, "width": 8},
    "lora-distillation": {"updates": 2, "batch": 4, "steps": 4, "evaluate": 4, "bank": 6},
}  # fmt: skip


def ran(name: str, kind: str, run: Run, tmp_path: Path, **changes: Any) -> tuple[Path, str, dict[str, float]]:
    """(student's folder, teacher's folder, metrics) of a tiny run."""
    where, recipe = PIPELINES[kind](tmp_path / kind), cards.load(name)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    given = {"teacher": f"diffusers:{where}", "prompts": "" if kind == "ddpm" else str(tmp_path / "prompts.txt"), "size": size(kind)}
    metrics = recipe.main(override(recipe.Config(), {**given, **SMALL[name], **changes}), run)
    return run.folder / "student", where, metrics


def loaded(student: Path, where: str, lora: bool, scheduler: Any) -> tuple[Any, dict[str, Any]]:
    """A plain pipeline with the student in it, and its call."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(where if lora else student)
    if lora:
        pipe.load_lora_weights(student)
        pipe.scheduler = scheduler.from_pretrained(student / "scheduler")
    pipe.set_progress_bar_config(disable=True)
    return pipe, json.loads((student / "call.json").read_text())


@pytest.mark.parametrize(
    ("name", "kind", "rank"),
    [
        ("dmd2", "sd15", 0),
        ("dmd2", "sdxl", 2),
        ("dmd2", "flux", 2),
        ("consistency", "sd3", 0),
        ("consistency", "schnell", 2),
        ("consistency", "sd15", 0),
    ],
)
def test_students_of_pipelines_are_sampled_by_plain_diffusers(run: Run, tmp_path: Path, name: str, kind: str, rank: int) -> None:
    student, where, _ = ran(name, kind, run, tmp_path, guidance=2.0, lora_rank=rank)
    pipe, words = loaded(student, where, bool(rank), diffusers.FlowMatchEulerDiscreteScheduler if kind in FLOWS else diffusers.LCMScheduler)
    assert pipe("a cat", output_type="np", **words)[0].shape == (1, 16, 16, 3)


@pytest.mark.parametrize(("kind", "rank"), [("sd15", 0), ("sdxl", 2), ("flux", 2)])
def test_phase_experts_in_plain_diffusers(run: Run, tmp_path: Path, kind: str, rank: int) -> None:
    student, where, _ = ran("phased-dmd", kind, run, tmp_path, guidance=2.0, lora_rank=rank)
    words = json.loads((student / "phase1" / "call.json").read_text())
    if rank:
        pipe = diffusers.DiffusionPipeline.from_pretrained(where)
        for phase in ("phase1", "phase2"):
            pipe.load_lora_weights(student / phase, adapter_name=phase)
        pipe.set_adapters("phase1")
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler if kind in FLOWS else diffusers.TCDScheduler
        pipe.scheduler = scheduler.from_pretrained(student / "phase1" / "scheduler")

        def switch(pipe, step, t, tensors):  # type: ignore[no-untyped-def]
            pipe.set_adapters("phase2")
            return tensors
    else:
        pipe, second = (diffusers.DiffusionPipeline.from_pretrained(student / phase) for phase in ("phase1", "phase2"))

        def switch(pipe, step, t, tensors):  # type: ignore[no-untyped-def]
            pipe.unet = second.unet
            return tensors

    pipe.set_progress_bar_config(disable=True)
    assert pipe("a cat", output_type="np", callback_on_step_end=switch, **words)[0].shape == (1, 16, 16, 3)


@pytest.mark.parametrize("kind", ["ddpm", "sd15", "flux"])
def test_small_one_step_pipelines_in_plain_diffusers(run: Run, tmp_path: Path, kind: str) -> None:
    student, where, _ = ran("slimflow", kind, run, tmp_path)
    pipe, words = loaded(student, where, False, None)
    assert kind == "flux" or pipe.scheduler.config.prediction_type == "v_prediction"  # what the small network predicts
    if kind == "ddpm":
        assert pipe(output_type="np", **words).images.shape == (1, 8, 8, 1)
    else:
        assert pipe("a cat", output_type="np", **words)[0].shape == (1, 16, 16, 3)


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
def test_distilled_lora_in_plain_diffusers(run: Run, tmp_path: Path, kind: str) -> None:
    student, where, metrics = ran("lora-distillation", kind, run, tmp_path)
    assert metrics["held_share"] < 0.9
    pipe, words = loaded(student, where, True, diffusers.FlowMatchEulerDiscreteScheduler if kind in FLOWS else diffusers.TCDScheduler)
    assert words["guidance_scale"] == 1.0
    assert pipe("a cat", output_type="np", **words)[0].shape == (1, 16, 16, 3)


@pytest.mark.parametrize("name", ["dmd2", "lora-distillation"])
def test_images_with_captions_are_the_data(run: Run, tmp_path: Path, name: str) -> None:
    head = {"gan_weight": 0.1} if name == "dmd2" else {}
    _, _, metrics = ran(name, "sd15", run, tmp_path, images=str(captioned(tmp_path / "images")), **head)
    assert metrics["energy"] == metrics["energy"]
    if name == "dmd2":
        with pytest.raises(UserError, match="--images FOLDER"), Run(tmp_path / "other") as other:
            ran(name, "sd15", other, tmp_path, **head)


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3", "schnell"])
def test_adapters_in_plain_diffusers(run: Run, tmp_path: Path, kind: str) -> None:
    """The saved adapters, hung on a fresh pipeline called with guidance_scale=1, give what the run's own student gives."""
    student, where, _ = ran("agd", kind, run, tmp_path)
    fresh = pipelines.load(where, size(kind))
    adapters = load(student, getattr(fresh.pipe, fresh.slot))
    scheduler, words = fresh.schedule(fresh.process.grid(4), fresh_noise=False)
    pipe = type(fresh.pipe)(**{**fresh.pipe.components, "scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    z = torch.randn(2, *fresh.shape)
    outputs = []
    for w in (None, 1.0, 6.0):
        adapters.w = w
        outputs.append(call(pipe, ["a cat", "a dog"], z, **words))
    assert not torch.equal(outputs[1], outputs[2])
    adapters.w = None
    cond, base = fresh.words(["a cat", "a dog"]), fresh.denoiser
    one_pass = agd.one_pass(adapters, base, torch.tensor([6.0, 6.0]))
    ours = sample(one_pass, z, fresh.process.grid(4), cond, process=fresh.process)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, outputs[2], rtol=0, atol=0.01 * float(ours.abs().max()))
    adapters.detach()
    torch.testing.assert_close(call(pipe, ["a cat", "a dog"], z, **words), outputs[0])


class Mine(Setting):
    """As in docs/diffusion.md."""

    name, shape = "mine", (3, 8, 8)

    def __init__(self, teacher: Denoiser):
        self.teacher = teacher

    def start(self, run: Run) -> Denoiser:
        return copy.deepcopy(self.teacher).to(run.device).requires_grad_(True)

    def evaluate(self, run: Run, x: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
        return {"energy": energy_distance(x, reference)}


def test_a_setting_of_ones_own_as_in_the_docs(run: Run) -> None:
    setting = Mine(Denoiser(UNet(3, 8), EDM(), "edm"))
    metrics = dmd2.main(dmd2.Config(updates=2, fake_updates=2, batch=4, evaluate=16, gan_weight=0.0), run, setting=setting)
    assert metrics["energy"] == metrics["energy"]
    assert (run.folder / "student" / "model.safetensors").exists()
