"""What the documentation shows works as shown."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from pathlib import Path

import pytest

from stillroom.catalogue import cards
from stillroom.core.config import override

ROOT = Path(__file__).parents[1]


@pytest.fixture
def example(monkeypatch) -> types.ModuleType:
    """The worked example of docs/adding-a-recipe.md as a module."""
    source = re.search(r'```python\n("""Class means.*?)```', (ROOT / "docs" / "adding-a-recipe.md").read_text(), re.DOTALL)
    assert source is not None
    module = types.ModuleType("class_mean")
    monkeypatch.setitem(sys.modules, "class_mean", module)
    exec(compile(source[1], "class_mean.py", "exec"), module.__dict__)
    return module


def test_the_worked_example_runs_in_every_arm_and_continues_bitwise(example, tmp_path) -> None:
    import torch

    from stillroom.core.run import Run

    for arm in example.ARMS:
        cfg = override(dataclasses.replace(example.Config(), steps=6), example.ARMS[arm])
        with Run(tmp_path / arm, 0, plots=False) as run:
            assert set(example.main(cfg, run)) >= {"accuracy", "ece"}
        with Run(tmp_path / arm, 0, plots=False) as run:
            example.main(cfg, run)
            assert torch.isfinite(run._tracked["means"]).all()
    assert example.CLAIMS[0].arm in example.ARMS
    example.full()


def test_pages_link_to_files_that_exist() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "bench" / "README.md"]:
        if page.exists():
            for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_recipe_in_the_ledger_is_in_the_catalogue() -> None:
    from stillroom.catalogue.ledger import read_ledger

    assert set(read_ledger(ROOT / "ledger")) <= set(cards.cards())
