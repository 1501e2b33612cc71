"""The recording run sees what a loop does, in the loop's own order, and nothing else."""

from __future__ import annotations

import copy
import dataclasses
import sys

import torch
from torch import nn

from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.testing import trace


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 100
    every: int = 2
    optimizer: Optimizer = Optimizer("sgd", 0.5, momentum=0.0, schedule="linear")


TINY = {"steps": 4}


def gap(x: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    return (x - goal) ** 2


def main(cfg: Config, run: Run, *, scale: float = 1.0) -> dict[str, float]:
    """Two players: `slow` learns every second step, `fast` always; a moving average of `fast`; a frozen network that answers."""
    teacher = run.frozen(nn.Linear(2, 1))
    slow, slow_sgd = run.trainable("slow", nn.Linear(2, 1), cfg.optimizer)
    with run.stage("warm") as stage:
        fast, fast_sgd = stage.trainable("fast", nn.Linear(2, 1), cfg.optimizer)
        for _ in stage.steps(1):
            stage.update(fast_sgd, gap(fast(torch.ones(3, 2)), torch.zeros(3, 1)))
    quick, quick_sgd = run.trainable("quick", fast, cfg.optimizer)
    ema = run.ema("average", quick, 0.5)
    twin = copy.deepcopy(run.unwrap(quick))  # whose calls are nobody's
    for step in run.steps(cfg.steps):
        x = torch.randn(3, 2)
        with torch.no_grad():
            goal = teacher(x)
        if step % cfg.every == 0:
            run.update(slow_sgd, scaled=scale * gap(slow(x), goal))
        run.update(quick_sgd, own=gap(quick(x), goal), zero=0 * quick(x).sum())
        ema.update()
        twin(x)
        run.log(step_seen=step)
    return {"loss": 1.0}


def traced(run: Run, **keywords):
    return trace(sys.modules[__name__], run, watch=["gap"], **keywords)


def test_who_learned_when_with_which_loss(run: Run) -> None:
    seen = traced(run, scale=3.0)
    assert seen.steps("slow") == [0, 2]
    assert seen.steps("quick", stage="run") == [0, 1, 2, 3]
    assert seen.steps("fast") == [0]
    assert [u.stage for u in seen.updates("fast")] == ["run/warm"]
    assert seen.updates("slow")[0].roles == ("slow",)
    assert seen.updates("slow")[0].moved == {"slow"}
    assert seen.updates("slow")[0].rates == (0.5,)
    assert seen.updates("slow")[1].rates == (0.25,)
    x, goal = seen.calls("gap", stage="run")[0].args
    assert torch.allclose(seen.updates("slow")[0].parts["scaled"], 3.0 * (x - goal) ** 2)
    assert seen.losses("quick", "zero") == [0.0] * 4
    assert seen.metrics == {"loss": 1.0}


def test_calls_tell_inputs_gradient_and_mode(run: Run) -> None:
    seen = traced(run)
    asked = seen.calls("frozen 0")
    assert [call.step for call in asked] == [0, 1, 2, 3]
    assert not any(call.grad or call.training for call in asked)
    assert all(call.grad and call.training for call in seen.calls("slow"))
    assert torch.equal(asked[0].args[0], seen.calls("slow", step=0)[0].args[0])
    assert len(seen.calls("quick", stage="run")) == 8, "two a step, and none of a copy's"
    assert torch.equal(asked[0].result, seen.calls("gap", stage="run", step=0)[0].args[1])


def test_who_moved_what_was_averaged_and_logged(run: Run) -> None:
    seen = traced(run)
    assert not seen.moved("frozen 0")
    assert all(map(seen.moved, ("slow", "fast", "average")))
    assert seen.averaged == [("run", step) for step in range(4)]
    assert [record["step_seen"] for record in seen.logged] == [0, 1, 2, 3]


def test_what_was_recorded_is_a_copy(run: Run) -> None:
    seen = traced(run)
    first, last = seen.calls("quick", stage="run")[0].result, seen.calls("quick", stage="run")[-1].result
    assert not first.requires_grad
    assert first.data_ptr() != last.data_ptr()


def test_the_run_is_as_before_afterwards(run: Run) -> None:
    update, ema = Run.update, Run.ema
    traced(run)
    assert Run.update is update
    assert Run.ema is ema
    assert not any(net._forward_hooks for net in traced_nets(run))


def traced_nets(run: Run) -> list[nn.Module]:
    return [role.net for role in run.roles.values()]
