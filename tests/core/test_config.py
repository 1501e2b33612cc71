"""Ranges, nesting and overrides of recipe configs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Interval, Lt

from stillroom.core.config import Count, Natural, NonNegative, Positive, Share, check, flatten, override
from stillroom.core.errors import UserError


@dataclass(frozen=True)
class Inner:
    rate: Positive = 1.0
    drops: tuple[Share, ...] = (0.5,)


@dataclass(frozen=True)
class Config:
    share: Share = 0.5
    positive: Positive = 1.0
    weight: NonNegative = 0.0
    steps: Count = 1
    warm_up: Natural = 0
    angle: Annotated[float, Ge(-1), Lt(1)] = 0.0
    odd: Annotated[int, Interval(gt=2, le=4)] = 3
    limit: Count | None = None
    free: float = -7.0
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    inner_config: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    "fields",
    [{"share": 0}, {"share": 1}, {"positive": 1e-300}, {"positive": math.inf}, {"weight": 0}, {"steps": 1}, {"warm_up": 0}, {"angle": -1},
     {"odd": 4}, {"limit": 1}, {"limit": None}, {"free": math.nan}, {"flag": True}, {"inner_config": Inner(drops=())}],
)  # fmt: skip
def test_values_at_the_edge_of_their_range_pass(fields: dict) -> None:
    check(Config(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"share": -1e-9}, "--share -1e-09 is out of range: it must be at least 0"),
        ({"share": 1.01}, "--share 1.01 is out of range: it must be at most 1"),
        ({"positive": 0.0}, "--positive 0.0 is out of range: it must be greater than 0"),
        ({"weight": -1}, "--weight -1 is out of range: it must be at least 0"),
        ({"steps": 0}, "--steps 0 is out of range: it must be at least 1"),
        ({"warm_up": -1}, "--warm-up -1 is out of range: it must be at least 0"),
        ({"angle": 1}, "--angle 1 is out of range: it must be less than 1"),
        ({"odd": 2}, "--odd 2 is out of range: it must be greater than 2"),
        ({"odd": 5}, "--odd 5 is out of range: it must be at most 4"),
        ({"limit": 0}, "--limit 0 is out of range: it must be at least 1"),
        ({"inner_config": Inner(rate=0.0)}, "--inner-config.rate 0.0 is out of range: it must be greater than 0"),
        ({"inner_config": Inner(drops=(0.5, 2.0))}, "--inner-config.drops 2.0 is out of range: it must be at most 1"),
        *(({name: math.nan}, f"--{name} nan is out of range") for name in ("share", "positive", "weight", "angle")),
    ],
)
def test_values_out_of_range_name_flag_value_and_bound(fields: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        check(Config(**fields))
    assert str(error.value).startswith(message)
    assert error.value.code == 2


def test_override_by_dotted_name_copies() -> None:
    config = Config()
    changed = override(config, {"share": 0.25, "inner_config.rate": 3.0, "inner_config.drops": (0.1, 0.2)})
    assert (changed.share, changed.inner_config) == (0.25, Inner(3.0, (0.1, 0.2)))
    assert config == Config()
    assert override(config, {}) == config


@pytest.mark.parametrize("name", ["shares", "inner_config.rates", "inner_config.rate.x", "share.x", ""])
def test_override_of_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(KeyError):
        override(Config(), {name: 1})


def test_flatten_undoes_override() -> None:
    config = Config(share=0.1, limit=4, inner_config=Inner(9.0, ()))
    flat = flatten(config)
    assert flat["inner_config.rate"] == 9.0
    assert flat["limit"] == 4
    assert override(Config(), flat) == config
