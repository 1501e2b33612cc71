"""Flags that would do nothing are refused, in every way that recipes say it, but not where they serve several arms."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stillroom.catalogue import idle
from stillroom.core.errors import UserError
from stillroom.recipes.classification import kd, sla
from stillroom.recipes.diffusion import phased_dmd

IDLE = {
    "one value": lambda: idle.refuse_idle(kd.Config(temperature=2.0), [kd.Config(), kd.full()], "here", "temperature"),
    "a group": lambda: idle.refuse_idle(
        replace(kd.Config(), optimizer=replace(kd.Config().optimizer, lr=9.0)), [kd.Config()], "here", "optimizer"
    ),
    "a field": lambda: idle.refuse_unread(kd.Config(steps=7), {"steps": "there are none"}),
    "a recipe's own words": lambda: sla.refuse_ignored(sla.Config(mode="da", temperature=3.0)),
    "a baseline of one phase": lambda: phased_dmd.check(phased_dmd.Config(phases=1, interval="disjoint")),
}


@pytest.mark.parametrize("kind", IDLE)
def test_an_idle_flag_is_refused_unless_it_serves_other_arms_too(kind: str) -> None:
    with pytest.raises(UserError, match="--") as refused:
        IDLE[kind]()
    assert refused.value.code == 2
    with idle.some_flags_idle():
        IDLE[kind]()
    with pytest.raises(UserError):
        IDLE[kind]()


def test_what_contradicts_is_refused_everywhere() -> None:
    with idle.some_flags_idle(), pytest.raises(UserError, match="--phases 3 needs"):
        phased_dmd.check(phased_dmd.Config(phases=3))


def test_values_of_a_preset_pass() -> None:
    idle.refuse_idle(kd.full(), [kd.Config(), kd.full()], "here", "steps", "optimizer")
    idle.refuse_unread(kd.Config(), {"steps": "there are none"})
