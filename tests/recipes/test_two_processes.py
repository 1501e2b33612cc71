"""Every recipe in two processes, at a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stillroom import catalogue
from tests.every_recipe import SMALL
from tests.launch import ROOT, launched

SHARDED = {"kd": "nll", "krr-st": "mse", "dmd2": "energy", "consistency": "energy", "gated-attention": "ce"}
"""Recipes that FSDP2 runs, and a metric of theirs that tells whether they learned."""
REFUSED = ("quantized-distillation", "token-kd")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What the recipes measured, per engine."""
    measured = {}
    for engine, names in {"ddp": list(SMALL), "fsdp2": [*SHARDED, *REFUSED]}.items():
        folder: Path = tmp_path_factory.mktemp(engine)
        done = launched(str(ROOT / "tests" / "every_recipe.py"), engine, str(folder), *names)
        assert done.returncode == 0, done.stderr[-3000:]
        measured[engine] = json.loads((folder / "found.json").read_text())
    return measured


def test_every_recipe_that_trains_is_here() -> None:
    assert set(SMALL) == set(catalogue.cards()) - {"hgm"}  # it trains nothing


def test_all_run_under_ddp(found) -> None:
    assert not {name: metrics for name, metrics in found["ddp"].items() if isinstance(metrics, str)}


@pytest.mark.parametrize("name", SHARDED)
def test_fsdp2_measures_what_ddp_does(name: str, found) -> None:
    ddp, fsdp2 = (found[engine][name][SHARDED[name]] for engine in ("ddp", "fsdp2"))
    assert fsdp2 == pytest.approx(ddp, rel=5e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_what_fsdp2_cannot_run_is_refused(name: str, found) -> None:
    assert "--engine ddp" in found["fsdp2"][name]
