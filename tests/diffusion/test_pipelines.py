"""diffusers pipelines as teachers: our samplers against diffusers' own, and students that plain diffusers loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stillroom.core.errors import UserError
from stillroom.diffusion import pipelines
from stillroom.diffusion.denoiser import Guided
from stillroom.diffusion.processes import VP, Flow
from stillroom.diffusion.sampling import consistency, sample

from .tiny import PIPELINES, call, sd15, size

pytest.importorskip("diffusers")


@pytest.fixture(scope="module", params=list(PIPELINES))
def pipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pipelines.Pipeline:
    return pipelines.load(PIPELINES[request.param](tmp_path_factory.mktemp(request.param)), size(request.param), guidance=3.0)


def noise(pipe: pipelines.Pipeline, n: int = 2) -> torch.Tensor:
    return torch.randn(n, *pipe.shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_process_is_the_schedulers(pipe: pipelines.Pipeline) -> None:
    if isinstance(pipe.process, Flow):
        assert pipe.process.time_scale == (1.0 if isinstance(pipe, pipelines.Flux) else 1000.0)
        return
    assert isinstance(pipe.process, VP)
    kept = pipe.pipe.scheduler.alphas_cumprod.double()
    torch.testing.assert_close(pipe.process.alpha(torch.arange(1000)), kept.sqrt(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_guided_deterministic_sampling_is_diffusers_own(pipe: pipelines.Pipeline) -> None:
    """Same noise, same grid, guidance 3: the pipeline called as its users call it, against `sample`."""
    if not pipe.encoders:
        pytest.skip("no text")
    prompts, weight = ["a red cat", "blue"], 3.0
    z = noise(pipe)
    cond, null = pipe.encode(prompts), pipe.null
    grid = pipe.process.grid(4)
    guided = pipe.denoiser if pipe.guidance is not None else Guided(pipe.denoiser, weight, null)
    ours = sample(guided, pipe.process.start(z), grid, cond)
    scheduler, words = pipe._schedule(grid, fresh_noise=False)
    plain = type(pipe.pipe)(**{**pipe.pipe.components, "scheduler": scheduler})
    plain.set_progress_bar_config(disable=True)
    if isinstance(pipe, pipelines.Flux) and pipe.guidance is None:
        words |= {"negative_prompt": "", "true_cfg_scale": weight}
    theirs = call(plain, prompts, z, **{**words, "guidance_scale": weight})
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01 * float(ours.abs().max()))


@pytest.mark.parametrize("fresh_noise", [False, True])
def test_full_students_are_sampled_by_plain_diffusers(pipe: pipelines.Pipeline, tmp_path: Path, fresh_noise: bool) -> None:
    import diffusers

    student = pipe.student()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    grid = pipe.process.grid(1)
    pipe.save(tmp_path / "student", student, grid, fresh_noise)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student")
    loaded.set_progress_bar_config(disable=True)
    words = json.loads((tmp_path / "student" / "call.json").read_text())
    if not pipe.encoders:
        torch.manual_seed(5)
        images = torch.tensor(loaded(batch_size=2, output_type="np", **words).images).permute(0, 3, 1, 2)
        torch.manual_seed(5)
        expected = sample(student.eval(), torch.randn(2, *pipe.shape), grid)
        torch.testing.assert_close(pipe.decode(expected), images, rtol=0, atol=0.01)
        return
    z = noise(pipe)
    cond = pipe.encode(["a cat", "dog"])
    expected = sample(student.eval(), pipe.process.start(z), grid, cond, step=consistency)
    latents = call(loaded, ["a cat", "dog"], z, **words)
    torch.testing.assert_close(expected, latents, rtol=0.02, atol=0.02 * float(expected.abs().max()))
    images = loaded(["a cat"], output_type="np", **words)[0]
    assert images.shape == (1, 16, 16, 3)


def test_lora_students_load_with_load_lora_weights(pipe: pipelines.Pipeline, tmp_path: Path) -> None:
    import diffusers

    if not pipe.encoders:
        pytest.skip("no LoRA loader in this pipeline class")
    student = pipe.lora(2, 6)
    trained = [p for p in student.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.3 * torch.randn_like(parameter))
    grid = pipe.process.grid(1)
    pipe.save(tmp_path, student, grid, fresh_noise=True)
    loaded = diffusers.DiffusionPipeline.from_pretrained(pipe.where)
    loaded.set_progress_bar_config(disable=True)
    loaded.load_lora_weights(tmp_path)
    loaded.scheduler = type(pipe._schedule(grid, True)[0]).from_pretrained(tmp_path / "scheduler")
    z, cond = noise(pipe), pipe.encode(["a cat", "dog"])
    start = pipe.process.start(z)
    expected = sample(student.eval(), start, grid, cond)
    latents = call(loaded, ["a cat", "dog"], z, **json.loads((tmp_path / "call.json").read_text()))
    torch.testing.assert_close(expected, latents, rtol=0.02, atol=0.02 * float(expected.abs().max()))
    assert not torch.allclose(expected, sample(pipe.denoiser, start, grid, cond), rtol=0.02)


def test_smaller_networks_answer_in_the_same_shape(pipe: pipelines.Pipeline) -> None:
    small = pipe.smaller(2)
    count = lambda net: sum(p.numel() for p in net.parameters())
    assert count(small) < 0.8 * count(pipe.denoiser)
    assert small(noise(pipe), 0.5 * pipe.process.noisy, pipe.encode(["a", "b"])).x0.shape == (2, *pipe.shape)


def test_v_prediction_is_read_as_v(tmp_path: Path) -> None:
    assert pipelines.load(sd15(tmp_path, "v_prediction")).denoiser.prediction == "v"


def test_what_is_not_a_pipeline_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model_index\.json"):
        pipelines.load(str(tmp_path))
    with pytest.raises(UserError, match="cannot load"):
        pipelines.load(str(tmp_path / "missing"))
    folder = Path(sd15(tmp_path / "sd"))
    with pytest.raises(UserError, match="not divisible by 4"):
        pipelines.load(str(folder), size=18)
    config = folder / "scheduler" / "scheduler_config.json"
    good = json.loads(config.read_text())
    config.write_text(json.dumps({**good, "prediction_type": "flow"}))
    with pytest.raises(UserError, match="prediction_type 'flow'"):
        pipelines.load(str(folder))
    config.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}))
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", "FlowMatchEulerDiscreteScheduler"))
    with pytest.raises(UserError, match="disagree"):
        pipelines.load(str(folder))


def test_prompt_files(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n  \n")
    with pytest.raises(UserError, match="is empty"):
        pipelines.read_prompts(str(file))
    with pytest.raises(UserError, match="cannot read"):
        pipelines.read_prompts(str(tmp_path / "none"))
    with pytest.raises(UserError, match="--prompts FILE"):
        pipelines.read_prompts("")
    file.write_text("a cat\n\n dog \n")
    assert pipelines.read_prompts(str(file)) == ["a cat", "dog"]
