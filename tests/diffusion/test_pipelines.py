"""diffusers pipelines as teachers: our samplers against diffusers' own, and students that plain diffusers loads."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from stillroom.adapt import lora
from stillroom.core.errors import UserError
from stillroom.diffusion import pipelines, teachers
from stillroom.diffusion.denoiser import Guided
from stillroom.diffusion.pipelines.setting import read_prompts
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
    cond, null = pipe.words(prompts), pipe.null
    grid = pipe.process.grid(4)
    guided = pipe.denoiser if pipe.guidance is not None else Guided(pipe.denoiser, weight, null)
    ours = sample(guided, pipe.process.start(z), grid, cond)
    scheduler, words = pipe.schedule(grid, fresh_noise=False)
    plain = type(pipe.pipe)(**{**pipe.pipe.components, "scheduler": scheduler})
    plain.set_progress_bar_config(disable=True)
    if isinstance(pipe, pipelines.Flux) and pipe.guidance is None:
        words |= {"negative_prompt": "", "true_cfg_scale": weight}
    theirs = call(plain, prompts, z, **{**words, "guidance_scale": weight})
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01 * float(ours.abs().max()))


@pytest.mark.parametrize("fresh_noise", [False, True])
def test_full_students_are_sampled_by_plain_diffusers(pipe: pipelines.Pipeline, tmp_path: Path, fresh_noise: bool) -> None:
    import diffusers

    student = copy.deepcopy(pipe.denoiser).requires_grad_(True)
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
        torch.testing.assert_close(pipe.decode(expected).clamp(0, 1), images, rtol=0, atol=0.01)
        return
    z = noise(pipe)
    cond = pipe.words(["a cat", "dog"])
    expected = sample(student.eval(), pipe.process.start(z), grid, cond, step=consistency)
    latents = call(loaded, ["a cat", "dog"], z, **words)
    torch.testing.assert_close(expected, latents, rtol=0.02, atol=0.02 * float(expected.abs().max()))
    images = loaded(["a cat"], output_type="np", **words)[0]
    assert images.shape == (1, 16, 16, 3)


def test_lora_students_load_with_load_lora_weights(pipe: pipelines.Pipeline, tmp_path: Path) -> None:
    import diffusers

    if not pipe.encoders:
        pytest.skip("no LoRA loader in this pipeline class")
    student = lora.add(copy.deepcopy(pipe.denoiser), 2, 6)
    trained = [p for p in student.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.3 * torch.randn_like(parameter))
    grid = pipe.process.grid(1)
    pipe.save(tmp_path, student, grid, fresh_noise=True)
    loaded = diffusers.DiffusionPipeline.from_pretrained(pipe.where)
    loaded.set_progress_bar_config(disable=True)
    loaded.load_lora_weights(tmp_path)
    loaded.scheduler = type(pipe.schedule(grid, True)[0]).from_pretrained(tmp_path / "scheduler")
    z, cond = noise(pipe), pipe.words(["a cat", "dog"])
    start = pipe.process.start(z)
    expected = sample(student.eval(), start, grid, cond)
    latents = call(loaded, ["a cat", "dog"], z, **json.loads((tmp_path / "call.json").read_text()))
    torch.testing.assert_close(expected, latents, rtol=0.02, atol=0.02 * float(expected.abs().max()))
    assert not torch.allclose(expected, sample(pipe.denoiser, start, grid, cond), rtol=0.02)


def test_smaller_networks_answer_in_the_same_shape(pipe: pipelines.Pipeline) -> None:
    small = pipe.smaller(2)
    count = lambda net: sum(p.numel() for p in net.parameters())
    assert count(small) < 0.8 * count(pipe.denoiser)
    assert small(noise(pipe), 0.5 * pipe.process.noisy, pipe.words(["a", "b"])).x0.shape == (2, *pipe.shape)


def test_v_prediction_is_read_as_v(tmp_path: Path) -> None:
    assert pipelines.load(sd15(tmp_path, "v_prediction")).denoiser.prediction == "v"


def test_what_is_not_a_pipeline_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model_index\.json"):
        pipelines.load(str(tmp_path))
    with pytest.raises(UserError, match="could not be loaded"):
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
        read_prompts(str(file))
    with pytest.raises(UserError, match="cannot read"):
        read_prompts(str(tmp_path / "none"))
    with pytest.raises(UserError, match="--prompts FILE"):
        read_prompts("")
    file.write_text("a cat\n\n dog \n")
    assert read_prompts(str(file)) == ["a cat", "dog"]


def test_the_scale_of_lora_turns_a_pipelines_network_into_its_base_and_back(pipe: pipelines.Pipeline) -> None:
    student = lora.add(copy.deepcopy(pipe.denoiser), 2)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    if not pipe.encoders:
        pytest.skip("no attention in this small network")
    x, t, cond = noise(pipe), 0.5 * pipe.process.noisy, pipe.words(["a", "b"])
    with torch.no_grad():
        base, on = pipe.denoiser(x, t, cond).x0, student(x, t, cond).x0
        with lora.off(student):
            torch.testing.assert_close(student(x, t, cond).x0, base)
        with lora.scaled(student, 0.5):
            assert not torch.allclose(student(x, t, cond).x0, on)
        assert torch.equal(student(x, t, cond).x0, on)
    assert not torch.allclose(base, on)


def test_latents_are_decoded_back_and_gradients_pass(pipe: pipelines.Pipeline) -> None:
    channels = 3 if pipe.vae is not None else pipe.shape[0]
    images = torch.rand(2, channels, pipe.shape[-1] * pipe.scale, pipe.shape[-1] * pipe.scale)
    latents = pipe.latents(images).detach().requires_grad_()
    assert latents.shape == (2, *pipe.shape)
    back = pipe.decode(latents)
    assert back.shape == images.shape
    if pipe.vae is None:
        torch.testing.assert_close(back, images)
    else:
        config = pipe.vae.config
        code = pipe.vae.encode(2 * images - 1).latent_dist.mean
        torch.testing.assert_close(latents, (code - (config.get("shift_factor") or 0.0)) * config.scaling_factor)
    (grad,) = torch.autograd.grad(back.sum(), latents)
    assert grad.abs().sum() > 0


def captioned(folder: Path) -> Path:
    from PIL import Image

    folder.mkdir()
    for i, name in enumerate(("a.png", "b.jpg", "c.png")):
        Image.new("RGB", (20 + 4 * i, 18), (80 * i, 40, 200)).save(folder / name)
    (folder / "a.txt").write_text("a red cat\n")
    (folder / "metadata.jsonl").write_text('{"file_name": "b.jpg", "text": "blue"}\n{"file_name": "c.png", "text": "a"}\n')
    return folder


def test_images_with_captions_are_data_and_their_captions_conditions(tmp_path: Path) -> None:
    folder, where = captioned(tmp_path / "images"), sd15(tmp_path / "sd")
    setting = teachers.load(f"diffusers:{where}", images=str(folder))
    assert setting.real
    x, cond = setting.samples(5)
    assert x.shape == (5, *setting.shape)
    assert cond["encoder_hidden_states"].shape[0] == 5
    assert setting.condition(4)["encoder_hidden_states"].shape[0] == 4
    codes = setting.codes  # type: ignore[attr-defined]
    for row, words in zip(x, cond["encoder_hidden_states"], strict=True):  # each picture keeps its caption
        at = next(i for i, code in enumerate(codes) if torch.equal(code, row))
        torch.testing.assert_close(words, setting.pipe.words([("a red cat", "blue", "a")[at]])["encoder_hidden_states"][0])  # type: ignore[attr-defined]


def test_bad_image_folders_are_said(tmp_path: Path) -> None:
    folder, where = captioned(tmp_path / "images"), sd15(tmp_path / "sd")
    (folder / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.png has no caption"):
        teachers.load(f"diffusers:{where}", images=str(folder))
    (folder / "metadata.jsonl").write_text('{"file": "b.jpg"}')
    with pytest.raises(UserError, match="must hold file_name and text"):
        teachers.load(f"diffusers:{where}", images=str(folder))
    with pytest.raises(UserError, match="holds no"):
        teachers.load(f"diffusers:{where}", images=str(tmp_path / "none"))
    with pytest.raises(UserError, match="is for a diffusers pipeline"):
        teachers.load("ring", images=str(folder))
    with pytest.raises(UserError, match="is for a diffusers pipeline"):
        teachers.load("ring", prompts="prompts.txt")


def test_a_network_that_plain_diffusers_could_not_sample_is_refused(pipe: pipelines.Pipeline) -> None:
    from stillroom.diffusion.processes import EDM

    with pytest.raises(UserError, match="could not sample"):
        pipe.smaller(2, EDM())
    with pytest.raises(UserError, match="could not sample"):
        pipe.smaller(2, prediction="edm")
    if isinstance(pipe.process, Flow):
        with pytest.raises(UserError, match="no dropout"):
            pipe.smaller(2, dropout=0.1)
    else:
        assert any(isinstance(m, torch.nn.Dropout) and m.p == 0.1 for m in pipe.smaller(2, dropout=0.1).modules())
