"""Flux: packed latents, positions, time scale, shift and guidance embedding, against diffusers' pipeline and by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.diffusion import pipelines, teachers
from stillroom.diffusion.processes import Flow
from stillroom.diffusion.sampling import sample
from stillroom.recipes.diffusion import agd

from .tiny import PIPELINES, call, flux

diffusers = pytest.importorskip("diffusers")
WORDS = ["a red cat", "blue"]


@pytest.fixture(scope="module", params=["flux", "schnell"])
def pipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pipelines.Pipeline:
    return pipelines.load(PIPELINES[request.param](tmp_path_factory.mktemp(request.param)), size=16, guidance=3.5)


def test_packing_is_the_pipelines_own() -> None:
    x = torch.randn(3, 5, 8, 6)
    packed = pipelines.pack(x)
    assert torch.equal(packed, diffusers.FluxPipeline._pack_latents(x, 3, 5, 8, 6))
    assert torch.equal(pipelines.unpack(packed, 4, 3), x)


@torch.no_grad()
def test_the_velocity_is_that_of_the_transformer_called_by_hand(pipe: pipelines.Pipeline) -> None:
    """Tokens (row, column) of values (channel, row, column), positions (0, row, column), time in [0, 1], the scale as it is."""
    (c, h, w), t = pipe.shape, 0.3
    assert (c, h, w) == (4, 8, 8)
    x, cond = torch.randn(2, c, h, w), pipe.words(WORDS)
    assert cond is not None
    tokens = torch.stack([x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(2, -1) for i in range(4) for j in range(4)], 1)
    out = pipe.pipe.transformer(
        hidden_states=tokens,
        timestep=torch.tensor([t, t]),
        guidance=torch.tensor([3.5, 3.5]) if pipe.guidance is not None else None,
        encoder_hidden_states=cond["encoder_hidden_states"],
        pooled_projections=cond["pooled_projections"],
        img_ids=torch.tensor([[0.0, i, j] for i in range(4) for j in range(4)]),
        txt_ids=torch.zeros(cond["encoder_hidden_states"].shape[1], 3),
    ).sample
    by_hand = torch.empty_like(x)
    for k in range(16):
        by_hand[:, :, 2 * (k // 4) : 2 * (k // 4) + 2, 2 * (k % 4) : 2 * (k % 4) + 2] = out[:, k].reshape(2, c, 2, 2)
    torch.testing.assert_close(pipe.denoiser.raw(x, t, cond), by_hand)
    torch.testing.assert_close(pipe.process.velocity(*pipe.denoiser(x, t, cond), t), by_hand, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_euler_on_our_grid_is_the_plain_pipeline_with_its_own_scheduler(pipe: pipelines.Pipeline) -> None:
    z = torch.randn(2, *pipe.shape)
    ours = sample(pipe.denoiser, pipe.process.start(z), pipe.process.grid(4), pipe.words(WORDS))
    length = 512 if pipe.guidance is not None else 256
    theirs = call(
        pipe.pipe, WORDS, z, height=16, width=16, num_inference_steps=4, guidance_scale=3.5, max_sequence_length=length
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(ours.abs().max()))
    torch.testing.assert_close(torch.tensor(pipe.process.grid(4)), pipe.pipe.scheduler.sigmas)


def test_the_shift_follows_the_number_of_tokens() -> None:
    make = diffusers.FlowMatchEulerDiscreteScheduler
    dynamic = make(shift=3.0, use_dynamic_shifting=True).config
    assert pipelines.shift_of(dynamic, 256) == pytest.approx(math.exp(0.5))
    assert pipelines.shift_of(dynamic, 4096) == pytest.approx(math.exp(1.15))
    assert pipelines.shift_of(make(use_dynamic_shifting=True, time_shift_type="linear").config, 2176) == pytest.approx(0.825)
    assert pipelines.shift_of(make(shift=3.0).config, 4096) == 3.0
    flow = Flow(shift=3.0)
    assert flow.grid(2) == [1.0, 0.75, 0.0]
    assert flow.grid(2, shift=2.0) == [1.0, pytest.approx(6 / 7), 0.0]
    assert flow.share(float(flow.place(0.2))) == pytest.approx(0.2)


def test_guidance_is_an_input_where_the_network_has_an_embedding_for_it(tmp_path: Path) -> None:
    where, prompts = flux(tmp_path / "flux"), tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    first, second = (teachers.load(f"diffusers:{where}", str(prompts), 16, guidance) for guidance in (1.0, 3.5))
    assert first.embedded == 1.0
    assert second.embedded == 3.5
    assert second.condition(3)["guidance"].tolist() == [3.5] * 3
    x = torch.randn(1, *first.shape)
    with torch.no_grad():
        assert not torch.allclose(*(s.teacher(x, 0.5, s.condition(1)).x0 for s in (first, second)))
    assert second.guided(3.5) is second.teacher  # one pass: no classifier-free guidance on top
    with pytest.raises(UserError, match=r"load it with guidance=2"):
        second.guided(2.0)
    with Run(tmp_path / "run") as run, pytest.raises(UserError, match=r"guidance embedding.*runs once per step"):
        agd.main(agd.Config(teacher=f"diffusers:{where}", prompts=str(prompts), size=16), run)


def test_without_an_embedding_guidance_is_two_passes(pipe: pipelines.Pipeline) -> None:
    cond = pipe.words(WORDS)
    assert cond is not None
    assert ("guidance" in cond) == (pipe.guidance is not None) == pipe.pipe.transformer.config.guidance_embeds


def test_other_uses_of_the_transformer_are_refused(tmp_path: Path, pipe: pipelines.Pipeline) -> None:
    diffusers.FluxImg2ImgPipeline(**pipe.pipe.components).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="FluxImg2ImgPipeline around a FluxTransformer2DModel is not supported"):
        pipelines.load(str(tmp_path))
    with pytest.raises(UserError, match="not divisible by 4"):
        pipelines.load(pipe.where, size=18)
