"""AGD: adapters start as the conditional model, follow w and t, leave the base untouched, and work inside diffusers pipelines."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.core.store import Store
from stillroom.diffusion import pipelines
from stillroom.diffusion.adapters import Adapters, Kind, Offset, load
from stillroom.diffusion.denoiser import Denoiser, Guided
from stillroom.diffusion.processes import VP
from stillroom.diffusion.sampling import sample
from stillroom.nets.denoisers import PointNet
from stillroom.recipes.diffusion import agd
from stillroom.recipes.diffusion.agd import Config, record
from tests.diffusion.tiny import PIPELINES, call, size, untrained

QUICK: dict[str, Any] = {"trajectories": 6, "steps": 4, "updates": 3, "batch": 5, "evaluate": 6, "width": 8}


def base() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(PointNet(2, 16, 2, classes=4), VP(time_scale=1e-3), "eps").requires_grad_(False)


@pytest.mark.parametrize("kind", ["cross_attention", "offset"])
def test_adapters_start_at_zero_and_only_they_learn(kind: Kind) -> None:
    net = base()
    x, t, cond, w = torch.randn(5, 2), torch.full((5,), 300.0), torch.tensor([0, 1, 2, 3, -1]), torch.linspace(1, 6, 5)
    plain, before = net.raw(x, t, cond), copy.deepcopy(net.state_dict())
    adapters = Adapters(net.net, kind, 8)
    assert torch.equal(adapters(net, x, t, cond, w), plain)
    assert not any("net" in name for name in adapters.state_dict())
    optimizer = torch.optim.Adam(adapters.parameters(), 1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        (adapters(net, x, t, cond, w) - 2 * plain).square().mean().backward()
        optimizer.step()
    moved = adapters(net, x, t, cond, w)
    assert not torch.allclose(moved, plain)
    assert not torch.allclose(moved, adapters(net, x, t, cond, w + 1))
    assert not torch.allclose(moved - plain, adapters(net, x, t + 300, cond, w) - net.raw(x, t + 300, cond))
    assert torch.equal(net.raw(x, t, cond), plain)  # without w the hooks do nothing
    adapters.detach()
    assert torch.equal(net.raw(x, t, cond), plain)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))


def test_offsets_do_not_look_at_x() -> None:
    adapter = Offset(6, 4)
    torch.nn.init.normal_(adapter.mlp[3].weight)
    tokens = torch.randn(3, 4)
    assert torch.equal(adapter(torch.zeros(3, 6), tokens), adapter(torch.randn(3, 6), tokens))
    assert adapter(torch.randn(3, 7, 6), tokens).shape == (3, 1, 6)


def test_recorded_states_are_those_of_guided_sampling_and_targets_its_outputs() -> None:
    net, w, cond = base(), torch.tensor([1.0, 3.0, 6.0]), torch.tensor([0, 1, 2])
    times, z = net.process.grid(5), torch.randn(3, 2)
    bank = record(net, -1, z, w, cond, times)
    guided, x = Guided(net, w, -1), z
    for k in range(5):
        torch.testing.assert_close(bank["x"][:, k], x)
        null, conditional = net.raw(x, times[k], torch.full((3,), -1)), net.raw(x, times[k], cond)
        torch.testing.assert_close(bank["o"][:, k], null + w[:, None] * (conditional - null))
        x = net.process.mix(*guided(x, times[k], cond), times[k + 1])
    torch.testing.assert_close(bank["end"], x)
    torch.testing.assert_close(bank["o"][0, 0], net.raw(z, times[0], cond)[0])  # w = 1 is no guidance


@pytest.mark.parametrize("arm", [*agd.ARMS])
def test_end_to_end_on_points(tmp_path: Path, arm: str) -> None:
    with Run(tmp_path / "run", store=Store(tmp_path / "store"), plots=False) as run:
        metrics = agd.main(Config(**(QUICK | agd.ARMS[arm])), run, setting=untrained("classes"))
    assert (metrics["gap_closed"] == 0.0) == (arm == "no-guidance")
    loaded = load(tmp_path / "run" / "student", PointNet(2, 64, 3, classes=4))
    assert loaded.width == 8


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3", "schnell"])
def test_adapters_in_plain_diffusers(tmp_path: Path, kind: str) -> None:
    """The saved adapters, hung on a fresh pipeline called with guidance_scale=1, give what the run's own student gives."""
    pytest.importorskip("diffusers")
    where = PIPELINES[kind](tmp_path / kind)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    cfg = Config(teacher=f"diffusers:{where}", prompts=str(tmp_path / "prompts.txt"), size=size(kind), **QUICK)
    with Run(tmp_path / "run", store=Store(tmp_path / "store"), plots=False) as run:
        agd.main(cfg, run)
    fresh = pipelines.load(where, size(kind))
    net = getattr(fresh.pipe, fresh.slot)
    adapters = load(tmp_path / "run" / "student", net)
    scheduler, words = fresh._schedule(fresh.process.grid(4), fresh_noise=False)
    pipe = type(fresh.pipe)(**{**fresh.pipe.components, "scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    z = torch.randn(2, *fresh.shape)
    outputs = []
    for w in (None, 1.0, 6.0):
        adapters.w = w
        outputs.append(call(pipe, ["a cat", "a dog"], z, **words))
    assert not torch.equal(outputs[1], outputs[2])
    adapters.w = None
    cond = fresh.encode(["a cat", "a dog"])
    base = fresh.denoiser
    ours = sample(agd.one_pass(adapters, base, torch.tensor([6.0, 6.0])), z, fresh.process.grid(4), cond, process=fresh.process)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, outputs[2], rtol=0, atol=0.01 * float(ours.abs().max()))
    adapters.detach()
    plain = call(pipe, ["a cat", "a dog"], z, **words)
    torch.testing.assert_close(plain, outputs[0])


def test_bad_input(tmp_path: Path) -> None:
    with Run(tmp_path / "run", store=Store(tmp_path / "store")) as run:
        with pytest.raises(UserError, match="must be above"):
            agd.main(Config(low=3.0, high=2.0), run)
        with pytest.raises(UserError, match="takes no conditions"):
            agd.main(Config(teacher="ring"), run)
    with pytest.raises(UserError, match="holds no adapters"):
        load(tmp_path, base().net)
    with pytest.raises(UserError, match="no blocks are known"):
        Adapters(torch.nn.Linear(2, 2), "offset", 8)
