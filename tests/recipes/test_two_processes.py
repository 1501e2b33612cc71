"""Every recipe in two processes, at its TINY size. Several recipes share a launch, which costs more than they do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stillroom.catalogue import cards
from tests.launch import ROOT, launched

RECIPES = {name: cards.load(name) for name in cards.cards()}
LAUNCHES = 4


def test_every_recipe_has_a_tiny_size() -> None:
    assert all(hasattr(recipe, "TINY") for recipe in RECIPES.values())


@pytest.mark.parametrize("part", range(LAUNCHES))
def test_ddp_runs_all_and_fsdp2_measures_what_ddp_does_or_is_refused(part: int, tmp_path: Path) -> None:
    names = list(RECIPES)[part::LAUNCHES]
    done = launched(str(ROOT / "tests" / "every_recipe.py"), str(tmp_path), *names)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    ddp, fsdp2 = found["ddp"], found["fsdp2"]
    assert not {name: metrics for name, metrics in ddp.items() if isinstance(metrics, str)}
    for name in names:
        if metric := getattr(RECIPES[name], "FSDP2", None):
            assert fsdp2[name][metric] == pytest.approx(ddp[name][metric], rel=5e-3), name
        else:
            assert "--engine ddp" in fsdp2[name]
            assert not (tmp_path / "fsdp2" / name / "result.json").exists()
