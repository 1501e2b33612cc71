"""Learning rates at their ends, and fused optimizers against torch's plain ones."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import nn

from stillroom.core.config import check
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer

KINDS = ("sgd", "adam", "adamw")


def rates(total: int, **fields) -> list[float]:
    optimizer = Optimizer(lr=2.0, **fields)
    return [optimizer.rate(step, total) for step in range(total)]


def test_constant() -> None:
    assert rates(5) == [2.0] * 5


def test_cosine_starts_at_the_peak_falls_symmetrically_and_would_be_zero_after_the_last_step() -> None:
    found = rates(8, schedule="cosine")
    assert found[0] == 2.0
    assert found[4] == pytest.approx(1.0, abs=1e-12)
    assert found == sorted(set(found), reverse=True)
    assert found[-1] > 0
    assert [a + b for a, b in zip(found[1:], found[:0:-1])] == pytest.approx([2.0] * 7)
    assert Optimizer(lr=2.0, schedule="cosine").rate(8, 8) == pytest.approx(0.0, abs=1e-12)


def test_linear() -> None:
    assert rates(4, schedule="linear") == pytest.approx([2.0, 1.5, 1.0, 0.5])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedules_can_end_above_zero(schedule: str) -> None:
    optimizer = Optimizer(lr=2.0, end=0.5, schedule=schedule)  # type: ignore[arg-type]
    assert [optimizer.rate(step, 8) for step in (0, 4, 8)] == pytest.approx([2.0, 1.25, 0.5])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "step"])
def test_warm_up_rises_linearly_from_zero_to_the_peak_and_the_schedule_takes_what_is_left(schedule: str) -> None:
    found = rates(13, schedule=schedule, warmup=3, drops=())
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert found[3:] == pytest.approx(rates(10, schedule=schedule, drops=()))


def test_a_run_shorter_than_its_warm_up_stays_finite() -> None:
    assert rates(2, schedule="cosine", warmup=5) == pytest.approx([1 / 3, 2 / 3])
    assert rates(1, schedule="cosine") == [2.0]


@pytest.mark.parametrize("total", [20, 100, 300, 700, 2300])
def test_step_drops_come_at_exactly_their_share_of_the_run(total: int) -> None:
    for part in range(1, 20):
        at = Fraction(part, 20) * total
        if at.denominator == 1:
            found = rates(total, schedule="step", drops=(part / 20,), drop_factor=0.1)
            assert found == pytest.approx([2.0] * int(at) + [0.2] * (total - int(at)))


def test_step_drops_multiply() -> None:
    assert rates(4, schedule="step", drops=(0.25, 0.5), drop_factor=0.5) == [2.0, 1.0, 0.5, 0.5]


def descend(build, steps: int = 20) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (4,), ())]
    optimizer = build(weights)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(((w - 0.3) ** 4).sum() for w in weights).backward()
        optimizer.step()
    return [w.detach() for w in weights]


@pytest.mark.parametrize("kind", KINDS)
def test_fused_equals_the_plain_torch_optimizer(kind: str) -> None:
    config = Optimizer(kind, 0.01, momentum=0.8, beta2=0.95, weight_decay=0.1)
    plain = {
        "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.8, weight_decay=0.1, foreach=False, fused=False),
        "adam": lambda p: torch.optim.Adam(p, 0.01, betas=(0.8, 0.95), weight_decay=0.1, foreach=False, fused=False),
        "adamw": lambda p: torch.optim.AdamW(p, 0.01, betas=(0.8, 0.95), weight_decay=0.1, foreach=False, fused=False),
    }[kind]
    for mine, theirs in zip(descend(config), descend(plain), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_float64_parameters_and_a_learning_rate_set_by_hand(kind: str) -> None:
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = Optimizer(kind, 1.0, momentum=0.0)([weight])
    optimizer.param_groups[0]["lr"] = 0.0
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.tolist() == [1.0, 1.0]


def test_nesterov() -> None:
    mine = descend(Optimizer("sgd", 0.01, nesterov=True))
    theirs = descend(lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True, foreach=False))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_decay_also_with_one_output_but_not_biases_tokens_and_position_tables(kind: str) -> None:
    matrices = [*nn.Linear(4, 3).parameters(), *nn.Linear(4, 1).parameters(), *nn.Conv2d(2, 1, 3).parameters(), nn.Conv1d(2, 3, 1).weight]
    others = [nn.Parameter(torch.ones(shape)) for shape in ((), (4,), (1, 1, 4), (1, 9, 4))]
    parameters = [*matrices, *others]
    before = [p.detach().clone() for p in parameters]
    optimizer = Optimizer(kind, 0.1, weight_decay=0.5, decay="matrices")(parameters)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = [not torch.equal(old, new) for old, new in zip(before, parameters)]
    assert moved == [True, False, True, False, True, False, True, False, False, False, False]
    assert len(Optimizer(kind, 0.1)(parameters).param_groups) == 1


def test_settings_that_torch_would_refuse_are_a_users_mistake() -> None:
    with pytest.raises(UserError, match="nesterov"):
        Optimizer("sgd", nesterov=True, momentum=0.0)([torch.nn.Parameter(torch.ones(1))])
    for field in ("momentum", "beta2"):
        with pytest.raises(UserError, match=rf"--{field} 1.0 is out of range: it must be less than 1"):
            check(Optimizer(**{field: 1.0}))
