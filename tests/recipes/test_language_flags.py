"""The language recipes' own flags must not be those that every run takes: tyro would refuse both."""

import dataclasses

import pytest

from stillroom.catalogue import cards
from stillroom.catalogue.command import RunOptions
from stillroom.core.config import check


@pytest.mark.parametrize("name", ["token-kd", "gated-attention", "agent-distillation"])
def test_flags_are_free_and_presets_valid(name):
    recipe = cards.load(name)
    names = lambda kind: {field.name for field in dataclasses.fields(kind)}
    assert not names(recipe.Config) & names(RunOptions)
    check(recipe.full())
    for arm in recipe.ARMS:
        check(cards.config_of(recipe, arm))
    assert {claim.arm for claim in recipe.CLAIMS} <= recipe.ARMS.keys()
