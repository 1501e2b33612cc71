"""SlimFlow: the annealed coupling, the flip, the two-step target in closed form, what the small network predicts, both loops by trace."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.diffusion.denoiser import Prediction
from stillroom.diffusion.exact import Gaussian, Mixture
from stillroom.diffusion.processes import EDM, VP, Flow, ReversedFlow, Trig
from stillroom.diffusion.sampling import pairs
from stillroom.diffusion.worlds import digit_mixture
from stillroom.recipes.diffusion import slimflow
from stillroom.recipes.diffusion.slimflow import (
    EPS,
    FLOW,
    Config,
    coupled,
    coupling,
    flow_loss,
    many_steps,
    mirrored,
    one_step,
    pair_loss,
    parametrization,
    two_step_loss,
    two_step_target,
    velocity,
)
from stillroom.testing import assert_grads, trace
from tests.diffusion.tiny import untrained
from tests.recipes.common import assert_resumes

QUICK: dict[str, Any] = {
    "pairs": 12,
    "pair_steps": 3,
    "reflow.steps": 8,
    "distil.steps": 3,
    "reflow.batch": 8,
    "distil.batch": 6,
    "evaluate": 24,
}


def test_coupling_goes_from_independent_to_the_teachers() -> None:
    assert [coupling("linear", done) for done in (0.0, 0.25, 1.0, 2.0, math.inf)] == [1.0, 0.75, 0.0, 0.0, 0.0]
    assert coupling("none", 0.0) == 0.0
    assert [coupling("cos", done) for done in (0.0, 0.5, 1.0, 3.0)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert coupling("exp", 0.5) == pytest.approx(math.exp(-3))


def test_coupled_noise_by_hand_and_of_unit_variance() -> None:
    z, fresh = torch.tensor([[3.0, 1.0]]), torch.tensor([[-2.0, 4.0]])
    torch.testing.assert_close(coupled(z, fresh, 0.6), torch.tensor([[0.8 * 3 - 1.2, 0.8 + 2.4]]))
    assert torch.equal(coupled(z, fresh, 0.0), z)
    assert torch.equal(coupled(z, fresh, 1.0), fresh)
    torch.manual_seed(0)
    assert float(coupled(*torch.randn(2, 100_000), 0.3).std()) == pytest.approx(1.0, abs=0.01)


def test_noise_and_image_are_mirrored_together_where_the_coin_says() -> None:
    z, x, coin = torch.randn(3, 1, 2, 4), torch.randn(3, 1, 2, 4), torch.tensor([0.49, 0.5, 0.0])
    fz, fx = mirrored(z, x, coin)
    for new, old in ((fz, z), (fx, x)):
        assert torch.equal(new, torch.stack([old[0].flip(-1), old[1], old[2].flip(-1)]))


def test_the_digit_teacher_commutes_with_the_flip() -> None:
    teacher = digit_mixture()
    z, times = torch.randn(16, 1, 8, 8), Flow().grid(4)
    straight, turned = pairs(teacher, z, times)["x"], pairs(teacher, z.flip(-1), times)["x"]
    torch.testing.assert_close(turned, straight.flip(-1), rtol=1e-3, atol=1e-3)


class Known(torch.nn.Module):
    """Answers the same pair everywhere, and remembers what it was asked."""

    def __init__(self, x: torch.Tensor, z: torch.Tensor):
        super().__init__()
        self.pair, self.asked = Prediction(x, z), []

    def forward(self, y: torch.Tensor, t: Any, cond: Any, process: Any) -> Prediction:
        assert process == FLOW
        self.asked.append((y, t))
        return self.pair


class Straight(torch.nn.Module):
    """Answers one velocity everywhere."""

    def __init__(self, v: torch.Tensor):
        super().__init__()
        self.v = v

    def forward(self, y: torch.Tensor, t: float, cond: Any, process: Any) -> Prediction:
        return Prediction(y + (1 - t) * self.v, y - t * self.v)


def test_losses_and_samples_by_hand() -> None:
    x, z, a, b = (torch.randn(3, 2).double() for _ in range(4))
    u, net = torch.tensor([0.0, 0.5, 1.0]).double(), Known(a, b)
    torch.testing.assert_close(flow_loss(net, z, x, u, None), ((a - b) - (x - z)).square().mean(1))
    y, t = net.asked[-1]
    torch.testing.assert_close(t, EPS + (1 - EPS) * u)
    torch.testing.assert_close(y, t[:, None] * x + (1 - t[:, None]) * z)
    torch.testing.assert_close(pair_loss(net, z, x, None), (z + a - b - x).square().mean(1))
    torch.testing.assert_close(net.asked[-1][0], EPS * x + (1 - EPS) * z)
    assert net.asked[-1][1] == EPS
    torch.testing.assert_close(velocity(net, z, EPS, None), a - b)
    torch.testing.assert_close(one_step(net, z, None), z + (1 - EPS) * (a - b))
    guide = Known(x, z)
    loss = two_step_loss(net, guide, z, u, None)
    y, t = guide.asked[-1]
    torch.testing.assert_close(t, 0.2 + 0.6 * u)
    torch.testing.assert_close(y, z + t[:, None] * (a - b))
    torch.testing.assert_close(loss, (z + a - b - (y + (1 - t[:, None]) * (x - z))).square().mean(1))
    end, bend = many_steps(Straight(a - b), z, None, 7)
    torch.testing.assert_close(end, z + (1 - EPS) * (a - b))
    assert bend < 1e-12


def test_the_two_step_target_is_the_exact_endpoint_of_a_straight_flow_and_carries_no_gradient() -> None:
    """Data of one point: every path is straight, so any t gives the point itself, whatever the student said if it lies on the path."""
    point = torch.tensor([[0.4, -1.0]]).double()
    z, t = torch.randn(5, 2).double(), torch.linspace(0.2, 0.8, 5).double()
    target = two_step_target(Mixture(point, 0.0), z, (point - z).requires_grad_(), t, None)
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
    loss = two_step_loss(student, guide, torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.6]).double(), None).mean()
    assert_grads(loss, to=[student], not_to=[guide])


def test_the_small_network_predicts_what_is_bounded_at_the_noise_end() -> None:
    """A teacher that predicts eps in VP would give a velocity of 1 / alpha there: losses in the hundreds at t = 1e-3."""
    assert [parametrization(p) for p in (Flow(), ReversedFlow(), Trig(1.0), VP(), EDM())] == ["velocity"] * 3 + ["v", "edm"]
    torch.manual_seed(0)
    world, z, x = untrained("classes"), torch.randn(256, 2), torch.randn(256, 2)
    ends = torch.zeros(256).double()
    loss = {}
    for prediction in ("eps", parametrization(world.process)):
        net = world.small(2, prediction=prediction)
        loss[prediction] = float(flow_loss(net, z, x, ends, torch.zeros(256, dtype=torch.long)).mean())
    assert loss["v"] < 5 < 50 < loss["eps"]


@pytest.fixture
def seen(run: Run) -> Any:
    return trace(
        slimflow, run, QUICK, ["coupled", "mirrored", "flow_loss", "pair_loss", "two_step_loss"], setting=untrained("ring", width=16)
    )


def test_stage_one_by_its_trace(run: Run, seen: Any) -> None:
    assert seen.steps("flow") == list(range(8))
    assert [round(c.args[2], 4) for c in seen.calls("coupled")] == [1.0, 0.6667, 0.3333, 0.0, 0.0, 0.0, 0.0, 0.0]  # 3 of 8 steps
    assert [round(float(v["b"]), 4) for v in seen.logged if "b" in v] == [1.0, 0.6667, 0.3333, 0.0, 0.0, 0.0, 0.0, 0.0]
    for step in range(8):
        (mixed,), (turned,), (loss,) = (
            [c for c in seen.calls(name, step=step) if c.stage.endswith("reflow")] for name in ("coupled", "mirrored", "flow_loss")
        )
        assert torch.equal(turned.args[0], mixed.result)
        assert turned.args[1].shape == (8, 2)
        assert all(torch.equal(a, b) for a, b in zip(loss.args[1:3], turned.result))
        assert not torch.equal(mixed.args[0], mixed.args[1])
        assert len(loss.args[3].unique()) == 8
    bank = {tuple(row) for c in seen.calls("coupled") for row in c.args[0].tolist()}
    assert len(bank) <= 12
    assert [stage.rpartition("/")[2] for stage, _ in seen.averaged] == ["reflow"] * 8 + ["distil"] * 3
    assert {c.grad for c in seen.calls("frozen 0")} == {False}


def test_stage_two_by_its_trace(run: Run, seen: Any) -> None:
    assert seen.steps("student") == [0, 1, 2]
    flow = [p.detach() for p in seen.nets["flow"].parameters()]
    assert all(torch.equal(a, b) for a, b in zip(seen.first["student"], flow))  # raw weights, not the average
    average = [p.detach() for p in seen.nets["ema"].parameters()]
    assert not all(torch.equal(a, b) for a, b in zip(average, flow))
    for update, pair, two in zip(seen.updates("student"), seen.calls("pair_loss"), seen.calls("two_step_loss"), strict=True):
        assert torch.equal(update.parts["pairs"], pair.result)
        assert torch.equal(update.parts["two_step"], two.result)
        assert two.args[1] is seen.nets["ema"]
        assert pair.args[1].shape == two.args[2].shape == (6, 2)
        assert not torch.equal(pair.args[1], two.args[2])  # fresh noise
    turned = [c for c in seen.calls("mirrored") if c.stage.endswith("distil")]
    assert all(torch.equal(a, b) for c, p in zip(turned, seen.calls("pair_loss"), strict=True) for a, b in zip(c.result, p.args[1:3]))
    rows = {row["name"]: row for row in run.rows}
    assert list(rows) == ["teacher, all steps", "small flow, 20 steps", "small flow, 1 step", "student"]
    assert rows["teacher, all steps"]["endpoint_error"] == 0.0
    assert seen.metrics["endpoint_error"] == rows["student"]["endpoint_error"]
    assert seen.metrics["flow_energy"] == rows["small flow, 20 steps"]["energy"]
    assert seen.metrics["parameters"] < 0.4 * sum(p.numel() for p in untrained("ring", width=16).small(1).parameters())


def test_arms_leave_their_part_out(run: Run) -> None:
    changes = {
        **QUICK,
        "reflow.annealing": "none",
        "reflow.flip": False,
        "distil.start": "scratch",
        "distil.two_step": False,
        "dropout": 0.5,
    }
    seen = trace(slimflow, run, changes, ["coupled", "mirrored", "two_step_loss"], setting=untrained("ring", width=16))
    assert {c.args[2] for c in seen.calls("coupled")} == {0.0}
    assert not seen.calls("mirrored")
    assert not seen.calls("two_step_loss")
    flow = [p.detach() for p in seen.nets["flow"].parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(seen.first["student"], flow) if a.std() > 0)
    assert {m.p for m in seen.nets["student"].modules() if isinstance(m, torch.nn.Dropout)} == {0.5}
    assert {c.training for c in seen.calls("ema")} == {False}


def test_evaluation_in_batches_gives_the_same(run: Run, tmp_path: Path) -> None:
    changes, found = {**QUICK, "reflow.flip": True}, []
    for at_once in (1 << 20, 5):
        setting = untrained("ring", width=16)
        setting.at_once = at_once
        with Run(tmp_path / str(at_once), engine=run.engine, store=run.store, plots=False) as other:
            found.append(trace(slimflow, other, changes, setting=setting).metrics)
    assert found[0] == pytest.approx(found[1], rel=0.02, abs=1e-4)


def test_another_group_of_flags_is_another_small_flow(run: Run) -> None:
    for i, changes in enumerate(({}, {"distil.steps": 4}, {"reflow.ema": 0.9}, {"reflow.batch": 4}, {"shrink": 1}, {"dropout": 0.1})):
        with Run(run.folder.with_name(f"r{i}"), engine=run.engine, store=run.store, plots=False) as other:
            trace(slimflow, other, {**QUICK, **changes}, setting=untrained("ring", width=16))
    assert len(list(run.store.folder.glob("reflow-*/"))) == 5  # the student's own flags do not count


def test_an_annealing_share_without_annealing_is_refused(run: Run) -> None:
    with pytest.raises(UserError, match="anneal-share"):
        trace(slimflow, run, {"reflow.annealing": "none", "reflow.anneal_share": 0.5}, setting=untrained("ring"))
    assert Config().teacher == "digits"


def test_a_killed_run_ends_bitwise_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    assert_resumes("slimflow", tmp_path, 6, QUICK, setting=untrained("ring", width=16))
