"""What every recipe has in common: its parts, the words of its keywords and of its docstring, presets and arms that are valid."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from stillroom.catalogue import cards
from stillroom.catalogue.command import RunOptions
from stillroom.core.config import check, flatten, override

KEYWORDS = {"data", "target", "pool", "near", "teacher", "student", "setting", "sandbox"}
"""The user's own parts. Beside the usual ones: a target (a second task), a pool and what is near to its test (ssld), a sandbox (hgm)."""


@pytest.fixture(params=list(cards.cards()))
def recipe(request):
    return cards.load(request.param)


def test_it_takes_a_config_a_run_and_the_users_own_parts_by_keyword(recipe) -> None:
    parameters = inspect.signature(recipe.main).parameters.values()
    assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == ["cfg", "run"]
    assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} <= KEYWORDS
    assert all(p.default is not p.empty for p in parameters if p.kind is p.KEYWORD_ONLY)


def test_its_docstring_says_what_is_exact_shrunk_ours_and_left_out(recipe) -> None:
    last = recipe.__doc__.strip().split("\n\n")[-1]
    places = [last.find(f"{word}:") for word in ("Exact", "Shrunk", "Ours", "Left out")]
    assert all(place >= 0 for place in places), "one block at the end: Exact: … Shrunk: … Ours: … Left out: …"
    assert places == sorted(places)


def test_its_flags_are_not_those_that_every_run_takes(recipe) -> None:
    own, every = ({field.name for field in dataclasses.fields(kind)} for kind in (recipe.Config, RunOptions))
    assert not own & every


def test_its_presets_and_arms_are_in_range_and_every_arm_has_a_claim(recipe) -> None:
    check(recipe.full())
    check(override(recipe.Config(), getattr(recipe, "TINY", {})))
    for arm in recipe.ARMS:
        check(cards.config_of(recipe, arm))
    claimed = {name for claim in recipe.CLAIMS for name in (claim.arm, claim.versus) if isinstance(name, str)}
    assert claimed == set(recipe.ARMS)


def test_no_two_arms_are_one(recipe) -> None:
    configs = [tuple(map(str, flatten(cards.config_of(recipe, arm)).items())) for arm in recipe.ARMS]
    assert len(set(configs)) == len(configs)
