"""Phased DMD: the subinterval target in closed form, phases, grids and noise ranges, who learns when and from what; kill and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.diffusion.denoiser import Prediction
from stillroom.diffusion.exact import Gaussian, Mixture
from stillroom.diffusion.processes import EDM, VP, Flow, Process, ReversedFlow, Trig
from stillroom.recipes.diffusion import phased_dmd
from stillroom.recipes.diffusion.phased_dmd import Config, ends_of, fake_goal, fake_loss, noise_range, steps_of
from stillroom.testing import recording, trace
from tests.diffusion.tiny import untrained
from tests.recipes.common import assert_resumes

QUICK: dict[str, Any] = {"updates": 2, "fake_updates": 2, "batch": 32, "evaluate": 16}


def ring() -> Any:
    return untrained("ring", width=8)


@pytest.mark.parametrize("process", [EDM(), VP(), Flow(), ReversedFlow(), Trig(0.5)], ids=lambda p: type(p).__name__)
def test_the_unbiased_target_regresses_to_the_exact_denoiser(process: Process) -> None:
    """E[(x0*, eps*) | x_t] by linear regression over samples of a Gaussian; the naive target regresses to something else."""
    torch.manual_seed(0)
    data, n = Gaussian(torch.tensor([0.7]).double(), 0.5), 200_000
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


class Known(torch.nn.Module):
    """Answers v = 0.3 x in the flow, whatever the time; remembers what it was asked."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Any, process: Any) -> Prediction:
        self.seen, v = (x, t), 0.3 * x
        return Prediction(x - t[:, None] * v, x + (1 - t[:, None]) * v)


@pytest.mark.parametrize("clamp", [10.0, 2.0])
def test_the_fakes_loss_by_hand(clamp: float) -> None:
    s, t = 0.5, torch.tensor([0.52, 0.95], dtype=torch.float64)
    x, eps, net = torch.randn(2, 3).double().requires_grad_(), torch.randn(2, 3).double(), Known()
    loss = fake_loss(net, x, eps, s, t, None, Flow(), "unbiased", clamp)
    ratio = (1 - t) / 0.5
    spread = (t**2 - ratio**2 * 0.25).sqrt()[:, None]
    y = ratio[:, None] * x + spread * eps
    torch.testing.assert_close(net.seen[0], y)
    goal = (0.25 * t[:, None] + (1 - t[:, None]) * 0.25) / 0.25 * eps - spread / 0.5 * x
    weight = torch.minimum(1 / spread[:, 0] ** 2, torch.tensor(clamp))
    torch.testing.assert_close(loss, weight * (spread * 0.3 * y - goal).square().mean(1))
    assert weight[0] == clamp
    assert not loss.requires_grad  # samples are detached
    v = lambda pair, process: process.alpha(500.0) * pair.eps - process.sigma(500.0) * pair.x0  # VP is compared in v
    k = torch.full((2,), 500.0).double()
    said, wanted = net(torch.zeros(2, 3).double(), k, None, None), fake_goal(x, eps, 100.0, k, VP(), "unbiased")
    spread = VP().kernel(100.0, 500.0)[1]

    class Zero(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: Any, cond: Any, process: Any) -> Prediction:
            return Prediction(0 * x, 0 * x)

    loss = fake_loss(Zero(), x, eps, 100.0, k, None, VP(), "unbiased", clamp)
    torch.testing.assert_close(loss, (1 / spread**2).clamp_max(clamp) * v(wanted, VP()).square().mean(1))
    assert said.x0.shape == (2, 3)


def test_phases_cut_the_grid() -> None:
    grid = Flow().grid(4, 5.0)
    assert ends_of(grid, 2) == [grid[2], 0.0]
    assert ends_of(grid, 1) == [0.0]
    assert ends_of(grid, 4) == grid[1:]
    assert [steps_of(grid, ends_of(grid, 2), k) for k in (0, 1)] == [[0, 1], [2, 3]]
    assert [steps_of(grid, ends_of(grid, 3), k) for k in (0, 1, 2)] == [[0], [1, 2], [3]]


def test_noise_times_are_drawn_before_the_shift_of_the_grid() -> None:
    """Phase 1 of 4 steps in 2 phases at shift 5 ends at raw time .5, whatever the shift."""
    flow = Flow()
    ends = ends_of(flow.grid(4, 5.0), 2)
    cfg = Config(steps=4, shift=5.0, margin=0.1)
    assert noise_range(cfg, flow, ends, 0) == pytest.approx((0.6, 0.9))
    assert noise_range(cfg, flow, ends, 1) == pytest.approx((0.1, 0.9))
    assert noise_range(Config(steps=4, shift=5.0, margin=0.1, interval="disjoint"), flow, ends, 1) == pytest.approx((0.1, 0.5))
    assert noise_range(Config(steps=4, shift=5.0, margin=0.1, interval="disjoint"), flow, ends, 0) == pytest.approx((0.6, 0.9))
    with pytest.raises(UserError, match=r"--margin 0\.25 leaves no noise times to phase 1"):
        noise_range(Config(steps=4, shift=5.0, margin=0.25), flow, ends, 0)


def test_the_loop_by_its_trace(run: Run) -> None:
    """4 steps in 2 phases at shift 3: experts in turn, each from the teacher; the second phase starts from what the first expert made."""
    changes = {**QUICK, "steps": 4, "shift": 3.0, "margin": 0.1, "updates": 6}
    seen = trace(phased_dmd, run, changes, ["fake_loss"], setting=ring())
    grid, raw = Flow().grid(4, 3.0), lambda t: t / (3 - 2 * t)
    for k, stage in enumerate(("phase1", "phase2")):
        assert [u.roles for u in seen.updates(stage=stage)] == [("fake",), ("fake",), ("expert",)] * 6
        assert all(u.moved == set(u.roles) for u in seen.updates(stage=stage))
        losses = seen.calls("fake_loss", stage=stage)
        end = (grid[2], 0.0)[k]
        times = torch.cat([c.args[4] for c in losses])
        low = (0.6, 0.1)[k]
        assert low <= float(raw(times).min()) < low + 0.05
        assert 0.85 < float(raw(times).max()) <= 0.9
        for call in losses:
            assert call.args[3] == end
            assert call.args[7:] == ("unbiased", 10.0)
            assert 0.7 < float(call.args[2].std()) < 1.3
    expert, second = "expert", "expert'"
    assert all(torch.equal(a, b) for a, b in zip(seen.first[expert], seen.first[second]))  # both start from the teacher's network
    assert all(torch.equal(a, b) for a, b in zip(seen.first["fake"], seen.first["fake'"]))
    reached = set()
    for call in seen.calls(expert, stage="phase1"):
        assert call.args[1] in grid[:2]
        if call.grad:
            reached.add(call.args[1])
    assert reached == set(grid[:2])
    last = max(i for i, c in enumerate(seen.called) if c.who == expert and c.grad)  # the end of phase 1
    earlier = [c for c in seen.called[last + 1 :] if c.who == expert]
    assert len(earlier) >= 2 * 18  # both of its steps, for every sample of phase 2
    assert {c.args[1] for c in earlier} == set(grid[:2])
    assert not any(c.grad for c in earlier)
    for step in range(6):
        calls = [c for c in seen.calls(second, stage="phase2", step=step) if c.training]
        assert {c.args[1] for c in calls} <= set(grid[2:4])
        assert sum(c.grad for c in calls) == 1
    scores = [c for c in seen.calls("fake'", stage="phase2") if not c.grad]
    assert {c.training for c in scores} == {False}
    asked = seen.calls("frozen 0")[6:]  # the teacher of both phases is one network
    assert len(asked) == len(scores) == 6
    assert all(torch.equal(a.args[0], b.args[0]) for a, b in zip(asked, scores))
    update, real, fake = seen.updates("expert", "phase2")[0], asked[0].result.x0, scores[0].result.x0
    made = next(c for c in seen.calls(second, stage="phase2", step=0) if c.grad).result.x0  # the last phase jumps to the data
    weight = 1 / (made - real).abs().mean(1, keepdim=True)
    torch.testing.assert_close(update.parts["loss"], 0.5 * (weight * (fake - real)).square().mean(1))


def test_the_first_experts_weights_stay_in_the_second_phase(run: Run) -> None:
    kept: list[list[torch.Tensor]] = []
    setting = ring()
    train = phased_dmd.train_phase

    def watched(*args: Any) -> Any:
        expert = train(*args)
        kept.append([p.detach().clone() for p in expert.parameters()])
        kept.append(list(expert.parameters()))
        return expert

    phased_dmd.train_phase = watched
    try:
        trace(phased_dmd, run, QUICK, setting=setting)
    finally:
        phased_dmd.train_phase = train
    assert all(torch.equal(a, b) for a, b in zip(kept[0], kept[1]))


def test_samples_of_a_phase_jump_to_its_end_and_are_noised_from_there(run: Run) -> None:
    seen = trace(phased_dmd, run, {**QUICK, "steps": 4, "updates": 3}, ["fake_loss"], setting=ring())
    for step in range(3):
        loss = seen.calls("fake_loss", stage="phase1", step=step)[0]
        ends = [0.5 * c.result.x0 + 0.5 * c.result.eps for c in seen.calls("expert", stage="phase1", step=step)]
        assert any(torch.allclose(loss.args[1], end) for end in ends)


def test_arguments_of_the_arms(run: Run) -> None:
    seen = trace(phased_dmd, run, {**QUICK, "fake_target": "naive", "interval": "disjoint", "clamp": 3.0}, ["fake_loss"], setting=ring())
    assert all(c.args[7:] == ("naive", 3.0) for c in seen.calls("fake_loss"))
    times = torch.cat([c.args[4] for c in seen.calls("fake_loss", stage="phase2")])
    assert float(times.max()) <= 0.5
    assert {"phase1_mmd", "phase1_std_ratio", "diversity"} <= set(seen.metrics)


def test_the_metrics_of_phase_one_compare_with_data_at_its_noise(run: Run) -> None:
    setting = untrained("ring", width=8)
    changes = {**QUICK, "evaluate": 700, "updates": 1, "steps": 4, "phases": 3, "shift": 1.0}
    seen = trace(phased_dmd, run, changes, ["mmd"], setting=setting)
    half, noisy = seen.calls("mmd")[0].args
    assert len(half) == len(noisy) == 700
    end = ends_of(Flow().grid(4, 1.0), 3)[0]
    assert end == 0.75
    expected = (((1 - end) ** 2 * (1.5**2 / 2 + 0.08**2)) + end**2) ** 0.5
    assert float(noisy.std()) == pytest.approx(expected, rel=0.04)  # exchanged: 5 % more
    assert seen.metrics["phase1_std_ratio"] == pytest.approx(float(half.std() / noisy.std()))


def test_the_toy_learns_at_its_time_and_is_judged_beyond_it(run: Run) -> None:
    with recording({"fake_loss": phased_dmd, "sample": phased_dmd}) as seen:
        phased_dmd.toy(run, "unbiased", 40)
    losses = seen.calls("fake_loss")
    assert len(losses) == 40
    x = torch.cat([call.args[1] for call in losses])
    mean, square = x.mean(), x.square().mean()
    assert float(mean) == pytest.approx(0.25, abs=0.02)  # half of {-1, 0, 1, 2}, half noise
    assert float(square) == pytest.approx(0.25 * 1.5 + 0.25, rel=0.03)
    times = torch.cat([call.args[4].flatten() for call in losses])
    assert {call.args[3] for call in losses} == {0.5}
    assert 0.52 <= float(times.min()) < 0.525
    assert 0.995 < float(times.max()) <= 1
    rates = [update.rates[0] for update in seen.updates("net")]
    assert rates[0] == pytest.approx(2e-3)
    assert rates[-1] < 1e-4
    judged = [call.args[1] for call in seen.calls("net") if not call.grad and len(call.args[0]) == 4000][:6]
    assert judged == [0.52, 0.6, 0.7, 0.8, 0.9, 0.98]
    (own, truth) = seen.calls("sample")
    assert torch.equal(own.args[1], truth.args[1])
    assert own.args[2] == truth.args[2] == pytest.approx([1 - i / 100 for i in range(51)])


def test_an_error_of_the_toy_is_the_mean_square_of_velocities(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A net that is the exact answer but for c in its velocity has the error c^2, and its samples drift by half of c."""
    data = Mixture(torch.tensor([[-1.0], [0.0], [1.0], [2.0]]), 0.0)

    class Off(torch.nn.Module):
        def __init__(self, *_: Any) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor, t: Any, cond: Any = None, process: Any = None) -> Prediction:
            x0, eps = data(x, t)
            t = torch.as_tensor(t).float().reshape(-1, 1)
            return Prediction(x0 - t * (0.3 + 0 * self.weight), eps + (1 - t) * (0.3 + 0 * self.weight))

    monkeypatch.setattr(phased_dmd, "Denoiser", Off)
    found = phased_dmd.toy(run, "unbiased", 1)
    assert found["toy_velocity_error"] == pytest.approx(0.09, rel=1e-3)


def test_the_toy_tells_the_targets_apart_and_its_keys(run: Run) -> None:
    found = {target: phased_dmd.toy(run, target, 60) for target in ("unbiased", "naive")}  # type: ignore[arg-type]
    assert found["unbiased"]["toy_velocity_error"] < found["naive"]["toy_velocity_error"]
    for metrics in found.values():
        assert 10 ** metrics["toy_log10_error"] == pytest.approx(metrics["toy_velocity_error"], rel=1e-4)
        assert 0 < metrics["toy_ode_gap"] < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 2, "phases": 3}, "--phases 3"),
        ({"phases": 1, "interval": "disjoint"}, "--interval disjoint"),
        ({"phases": 1, "fake_target": "naive", "toy_steps": 0}, "--fake-target naive"),
        ({"margin": 0.6, "toy_steps": 0}, "--margin"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(run: Run, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        phased_dmd.main(Config(**changes), run, setting=ring())


def test_a_killed_run_ends_bitwise_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    assert_resumes("phased-dmd", tmp_path, 7, {**QUICK, "steps": 4, "batch": 4}, setting=ring())
    assert len(list((tmp_path / "straight" / "student").rglob("model.safetensors"))) == 2
