"""consistency: neighbours on a path, the target that follows, gradients, what is refused; kill and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.diffusion.denoiser import Prediction
from stillroom.diffusion.exact import Gaussian
from stillroom.diffusion.objectives import consistent, squared
from stillroom.diffusion.processes import Flow
from stillroom.recipes.diffusion import consistency
from stillroom.recipes.diffusion.consistency import Config, neighbour
from stillroom.testing import assert_grads, trace
from tests.diffusion.tiny import untrained
from tests.recipes.common import assert_resumes

QUICK: dict[str, Any] = {"updates": 3, "batch": 32, "evaluate": 16, "levels": 8}
FLOW, DATA = Flow(), Gaussian(torch.tensor([0.5, -0.5]).double(), 0.6)


def learning(seen: Any, step: int) -> Any:
    """The student's one call with gradient (a copy of it, such as its average, is recorded under its name too)."""
    (call,) = [c for c in seen.calls("student", step=step) if c.grad]
    return call


class Exact(torch.nn.Module):
    """The consistency function of a Gaussian."""

    process = FLOW

    def forward(self, x: torch.Tensor, t: Any, cond: Any = None) -> Prediction:
        return Prediction(DATA.flow_map(x, t, 0.0), x)


def test_a_fine_heun_grid_leaves_the_exact_function_no_loss_and_a_coarse_or_data_step_does() -> None:
    torch.manual_seed(0)
    t = torch.linspace(0.95, 0.05, 10, dtype=torch.float64)
    data, eps = DATA.sample(10), torch.randn(10, 2).double()
    losses = {}
    for name, cfg in (("heun", Config(solver="heun")), ("ddim", Config()), ("data", Config(source="data"))):
        x, lower = neighbour(cfg, DATA, data, eps, t, t - 0.01, None, FLOW)
        torch.testing.assert_close(x, FLOW.mix(data, eps, t))
        assert not lower.requires_grad
        losses[name] = float(consistent(Exact(), Exact(), (x, t), (lower, t - 0.01), distance=squared).max())
    assert losses["heun"] < 0.01 * min(losses["ddim"], losses["data"])


def test_steps_of_the_teacher_and_of_the_data_by_hand() -> None:
    data, eps, t, s = torch.randn(4, 2).double(), torch.randn(4, 2).double(), torch.full((4,), 0.8).double(), torch.full((4,), 0.5).double()
    _, lower = neighbour(Config(source="data"), DATA, data, eps, t, s, None, FLOW)
    torch.testing.assert_close(lower, 0.5 * data + 0.5 * eps)
    x, lower = neighbour(Config(), DATA, data, eps, t, s, None, FLOW)
    pair = DATA(x, 0.8)
    torch.testing.assert_close(lower, 0.5 * pair.x0 + 0.5 * pair.eps)


@pytest.mark.parametrize("name", ["ring", "classes"])
def test_the_loop_by_its_trace(run: Run, name: str) -> None:
    """Target and teacher see the upper point's neighbour on the grid; the target answers with its averaged weights, then follows."""
    setting = untrained(name, width=16)
    guidance = 3.0 if name == "classes" else 1.0
    seen = trace(
        consistency, run, {**QUICK, "distance": "l2", "ema": 0.5, "guidance": guidance}, ["neighbour", "consistent"], setting=setting
    )
    assert seen.steps("student") == [0, 1, 2]
    assert [step for _, step in seen.averaged] == [0, 1, 2]
    assert seen.moved("student")
    assert seen.moved("ema")
    assert not seen.moved("frozen 0")
    assert guidance == 1 or seen.nets["frozen 0"].weight == 3.0
    grid = torch.tensor(setting.process.grid(8), dtype=torch.float64)
    for step in range(3):
        (near,), (loss,) = seen.calls("neighbour", step=step), seen.calls("consistent", step=step)
        _, _, data, eps, t, s, cond, _ = near.args
        at = torch.stack([(grid == value).nonzero()[0, 0] for value in t])
        assert torch.equal(grid[at + 1], s)
        assert at.unique().numel() > 3
        assert 0.8 < float(eps.std()) < 1.2
        assert float(torch.cdist(data, setting.mixture.centres).min(1).values.max()) < 1.6
        (x, t_), (lower, s_) = loss.args[2:4]
        assert torch.equal(x, near.result[0])
        assert torch.equal(lower, near.result[1])
        assert torch.equal(t_, t)
        assert torch.equal(s_, s)
        said, goal = learning(seen, step), seen.calls("ema", step=step)[0]
        assert not goal.grad
        assert torch.equal(said.args[0], x)
        assert torch.equal(goal.args[0], lower)
        torch.testing.assert_close(seen.updates("student")[step].parts["loss"], (said.result.x0 - goal.result.x0).square().mean(1))
        assert name == "ring" or torch.equal(said.args[2], cond)


def test_the_target_starts_as_the_student_and_averages_by_its_decay(run: Run) -> None:
    seen = trace(consistency, run, {**QUICK, "updates": 1, "ema": 0.75}, setting=untrained("ring", width=8))
    now = dict(seen.nets["student"].named_parameters())
    for old, (name, mean) in zip(seen.first["student"], seen.nets["ema"].named_parameters()):
        torch.testing.assert_close(mean, 0.75 * old + 0.25 * now[name].detach())


def test_huber_is_the_default_and_its_value(run: Run) -> None:
    seen = trace(consistency, run, {**QUICK, "updates": 1}, setting=untrained("ring", width=8))
    said, goal = learning(seen, 0).result.x0, seen.calls("ema")[0].result.x0
    c = 0.00054 * 2**0.5
    torch.testing.assert_close(seen.updates()[0].parts["loss"], ((said - goal).square().sum(1) + c * c).sqrt() - c)


def test_the_average_is_judged_in_few_steps_and_in_one(run: Run) -> None:
    setting = untrained("ring", width=8)
    seen = trace(consistency, run, {**QUICK, "steps": 3}, setting=setting)
    judged = [c.args[1] for c in seen.calls("ema") if not isinstance(c.args[1], torch.Tensor)]
    assert judged == [*Flow().grid(3)[:3], 1.0]
    assert {c.training for c in seen.calls("ema")} == {False}
    assert seen.metrics["energy"] != seen.metrics["one_step_energy"]
    few = [c for c in seen.calls("ema") if not isinstance(c.args[1], torch.Tensor)]
    fresh = (few[1].args[0] - (1 - few[1].args[1]) * few[0].result.x0) / few[1].args[1]
    assert 0.6 < float(fresh.std()) < 1.5  # noised anew


def test_without_data_the_teachers_samples_stand_for_them(run: Run) -> None:
    setting = untrained("ring", width=8)
    setting.real = False
    seen = trace(consistency, run, {**QUICK, "bank": 12, "updates": 1}, ["neighbour"], setting=setting)
    data = seen.calls("neighbour")[0].args[2]
    assert len(data.unique(dim=0)) <= 12
    assert float(torch.cdist(data, setting.mixture.centres).min(1).values.median()) < 0.25


def test_gradient_goes_through_the_first_call_alone() -> None:
    student, target = (untrained("ring", width=8).small(1) for _ in range(2))
    x, t = torch.randn(4, 2), torch.rand(4)
    assert_grads(consistent(student, target, (x, t), (x, t)).mean(), to=[student], not_to=[target])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "data", "solver": "heun"}, "--solver heun"),
        ({"source": "data", "guidance": 2.0}, "--guidance 2"),
        ({"bank": 7}, "--bank 7"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(run: Run, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        consistency.main(Config(**changes), run, setting=untrained("classes", width=8))


def test_a_network_that_predicts_x0_is_refused(run: Run) -> None:
    with pytest.raises(UserError, match="predicts x0 itself"):
        consistency.main(Config(), run, setting=untrained("ring", width=8, prediction="x0"))


def test_a_killed_run_ends_bitwise_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    assert_resumes("consistency", tmp_path, 2, {"batch": 8}, setting=untrained("ring", width=8))
