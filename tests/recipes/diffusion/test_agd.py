"""AGD: adapters start as the conditional model, follow w and t, leave the base untouched; recording, loop, judgement, resume."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.diffusion.adapters import Adapters, Kind, Offset, load
from stillroom.diffusion.denoiser import Denoiser, Guided
from stillroom.diffusion.processes import VP
from stillroom.metrics.generation import gap_closed
from stillroom.nets.denoisers import PointNet
from stillroom.recipes.diffusion import agd
from stillroom.recipes.diffusion.agd import Config, Drawn, guided_path, noised_path
from stillroom.testing import trace
from tests.diffusion.tiny import untrained
from tests.recipes.common import assert_resumes

QUICK: dict[str, Any] = {"trajectories": 6, "steps": 4, "updates": 3, "batch": 8, "evaluate": 7, "width": 8}


def classes() -> Any:
    return untrained("classes", width=16, depth=2)


def base() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(PointNet(2, 16, 2, classes=4), VP(time_scale=1e-3), "eps").requires_grad_(False)


@pytest.mark.parametrize("kind", ["cross_attention", "offset"])
def test_adapters_start_at_zero_and_only_they_learn(kind: Kind) -> None:
    net = base()
    x, t, cond, w = torch.randn(5, 2), torch.full((5,), 300.0), torch.tensor([0, 1, 2, 3, -1]), torch.linspace(1, 6, 5)
    plain, before = net.raw(x, t, cond), copy.deepcopy(net.state_dict())
    adapters = Adapters(net, kind, 8)
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
    *visited, (end, _) = guided_path(net, -1, z, w, cond, times)
    guided, x = Guided(net, w, -1), z
    assert len(visited) == 5
    for k, (state, target) in enumerate(visited):
        torch.testing.assert_close(state, x)
        null, conditional = net.raw(x, times[k], torch.full((3,), -1)), net.raw(x, times[k], cond)
        torch.testing.assert_close(target, null + w[:, None] * (conditional - null))
        assert not target.requires_grad
        x = net.process.mix(*guided(x, times[k], cond), times[k + 1])
    torch.testing.assert_close(end, x)
    torch.testing.assert_close(visited[0][1][0], net.raw(z, times[0], cond)[0])  # w = 1 is no guidance
    data, noises = torch.randn(3, 2), list(torch.randn(5, 3, 2))
    for k, (state, target) in enumerate(noised_path(net, -1, data, noises, w, cond, times)):
        torch.testing.assert_close(state, net.process.mix(data, noises[k], times[k]))
        torch.testing.assert_close(target, guided.raw(state, times[k], cond))


@pytest.mark.parametrize(("data", "half"), [("guided", False), ("guided", True), ("forward", False)])
def test_the_file_holds_what_was_visited_in_batches(run: Run, data: Any, half: bool) -> None:
    setting, net = classes(), base()
    setting.at_once = 4
    times = net.process.grid(3)
    given = Drawn(torch.randn(6, 2), torch.linspace(1, 6, 6), torch.tensor([0, 1, 2, 3, 0, 1]))
    bank = agd.record(Config(data=data, half=half), run, setting, net, given, times)
    assert bank.shape == (6, 3, 2, 2)
    assert bank.dtype == (torch.float16 if half else torch.float32)
    guided = Guided(net, given.w, -1)
    for k, t in enumerate(times[:-1]):
        x = bank[:, k, 0].float()
        torch.testing.assert_close(
            bank[:, k, 1].float(), guided.raw(x, t, given.cond), atol=5e-3 if half else 1e-5, rtol=1e-2 if half else 1e-5
        )
    if data == "guided":
        torch.testing.assert_close(bank[:, 0, 0].float(), given.z, atol=1e-3, rtol=1e-3)
        *visited, _ = guided_path(net, -1, given.z, given.w, given.cond, times)
        torch.testing.assert_close(bank[:, 2, 0].float(), visited[2][0], atol=1e-2 if half else 1e-5, rtol=1e-2)
    else:
        noise = (bank[:, 0, 0] - net.process.alpha(times[0]).float() * given.z) / net.process.sigma(times[0]).float()
        assert 0.5 < float(noise.std()) < 1.6
        assert not torch.equal(bank[:4, 0, 0], bank[:4, 1, 0])
    again = agd.record(Config(data=data, half=half), run, setting, net, given, times)
    assert torch.equal(again, bank)
    assert len(list(run.store.folder.glob("trajectories-*/"))) == 1


@pytest.mark.parametrize("arm", [*agd.ARMS])
def test_the_loop_by_its_trace(run: Run, arm: str) -> None:
    seen = trace(agd, run, {**QUICK, **agd.ARMS[arm]}, ["record", "judge"], setting=classes())
    whole = arm == "fine-tuning"
    (recorded,) = seen.calls("record")
    bank, given = recorded.result, recorded.args[4]
    assert float(given.w.min()) >= 1.0
    assert float(given.w.max()) <= 6.0
    assert float(given.w.std()) > 0.3
    assert [u.roles for u in seen.updates()] == [("adapters", "base") if whole else ("adapters",)] * 3
    assert seen.moved("frozen 0") is False
    assert not whole or seen.moved("base")
    calls = [c for c in seen.calls("adapters") if c.grad]
    clock = torch.tensor(recorded.args[5][:-1])
    for call, update in zip(calls, seen.updates(), strict=True):
        _, x, t, cond, w = call.args
        for row in range(len(x)):
            hit = [(i, j) for i in range(6) for j in range(4) if torch.equal(bank[i, j, 0], x[row])]
            i, j = hit[0]
            assert float(t[row]) == float(clock[j])
            assert int(cond[row]) == int(given.cond[i])
            assert float(w[row]) == float(given.w[i])
            error = (call.result[row] - bank[i, j, 1]).square().mean()
            torch.testing.assert_close(update.parts["loss"][row], error)
        assert len({tuple(row) for row in x.tolist()}) > 3
    judged = [c for c in seen.calls("adapters") if not c.grad]
    assert {c.training for c in judged} == {False}
    rows = {row["name"]: row for row in run.rows}
    assert rows["guidance, two passes"]["evaluations"] == 2 * rows["student"]["evaluations"] == 8
    metrics = seen.metrics
    assert metrics["mean_gap_closed"] == pytest.approx(1 - metrics["sample_error"] / rows["no guidance"]["sample_error"])
    assert load(run.folder / "student", PointNet(2, 16, 2, classes=4)).width == 8


def test_judgement_by_hand_and_in_batches(run: Run) -> None:
    """Adapters at zero are the conditional model: its error is that of no guidance, whatever the batches."""
    net, setting, cfg = base(), classes(), Config(**QUICK)
    held = Drawn(torch.randn(7, 2), torch.linspace(1, 6, 7), torch.tensor([0, 1, 2, 3, 0, 1, 2]))
    times, found = net.process.grid(4), []
    for at_once in (100, 3):
        setting.at_once = at_once
        adapters = Adapters(net, "offset", 8)
        found.append(agd.judge(cfg, run, setting, net, net, adapters, held, times))
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)
    assert found[0]["gap_closed"] == pytest.approx(0.0, abs=1e-6)
    *visited, _ = guided_path(net, -1, held.z, held.w, held.cond, times)
    by_hand = torch.stack([(net.raw(x, t, held.cond) - raw).square().mean() for t, (x, raw) in zip(times, visited)]).mean()
    assert found[0]["prediction_error"] == pytest.approx(float(by_hand), rel=1e-4)
    size = lambda module: sum(p.numel() for p in module.parameters())
    assert found[0]["trainable_share"] == pytest.approx(size(Adapters(net, "offset", 8)) / size(net))


def test_the_gap_is_closed_in_the_median() -> None:
    goal, without = torch.zeros(5, 2), torch.full((5, 2), 2.0)
    x = torch.full((5, 2), 1.0)
    x[0] = 100.0  # one diverged
    assert gap_closed(x, without, goal) == pytest.approx(0.75)
    assert gap_closed(without, without, goal) == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low": 3.0, "high": 2.0}, "must be above"),
        ({"low": 3.0, "high": 3.0}, "must be above"),
        ({"teacher": "ring"}, "takes no conditions"),
        ({"guidance": 2.0}, "--guidance 2"),
        ({"images": "folder"}, "--images"),
    ],
)
def test_bad_input(run: Run, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        agd.main(Config(**changes), run)


def test_folders_and_networks_that_do_not_serve_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no adapters"):
        load(tmp_path, base().net)
    with pytest.raises(UserError, match="no blocks are known"):
        Adapters(torch.nn.Linear(2, 2), "offset", 8)


def test_a_killed_run_ends_bitwise_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    assert_resumes("agd", tmp_path, 2, QUICK, setting=classes())
