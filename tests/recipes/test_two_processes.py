"""Every recipe in two processes, at its TINY size: a family at a time, so that several workers share them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stillroom.catalogue import cards
from tests.launch import ROOT, launched

RECIPES = {name: cards.load(name) for name in cards.cards()}
TRAINING = {name: recipe for name, recipe in RECIPES.items() if hasattr(recipe, "TINY")}
FAMILIES = sorted({cards.find(name).family for name in TRAINING})


def measured(folder: Path, engine: str, names: list[str]) -> dict[str, dict[str, Any]]:
    done = launched(str(ROOT / "tests" / "every_recipe.py"), engine, str(folder), *names)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def test_every_recipe_is_here() -> None:
    assert set(TRAINING) == set(RECIPES)


@pytest.mark.parametrize("family", FAMILIES)
def test_ddp_runs_all_and_fsdp2_measures_what_ddp_does(family: str, tmp_path: Path) -> None:
    names = [name for name in TRAINING if cards.find(name).family == family]
    ddp = measured(tmp_path / "ddp", "ddp", names)
    assert not {name: metrics for name, metrics in ddp.items() if isinstance(metrics, str)}
    if sharded := {name: TRAINING[name].FSDP2 for name in names if hasattr(TRAINING[name], "FSDP2")}:
        fsdp2 = measured(tmp_path / "fsdp2", "fsdp2", list(sharded))
        assert {n: fsdp2[n][m] for n, m in sharded.items()} == pytest.approx({n: ddp[n][m] for n, m in sharded.items()}, rel=5e-3)


def test_fsdp2_is_refused_where_a_recipe_does_not_declare_it(tmp_path: Path) -> None:
    assert "--engine ddp" in measured(tmp_path, "fsdp2", ["quantized-distillation"])["quantized-distillation"]
