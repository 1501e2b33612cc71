"""What the tests of every recipe do: run it at its TINY size, kill it and go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from stillroom.catalogue import cards
from stillroom.catalogue.execute import execute
from stillroom.core.config import override
from stillroom.core.engine import make
from stillroom.core.run import Run
from stillroom.core.store import Store


class Killed(BaseException):
    """Stands for a power cut: nothing catches it."""


def finish(name: str, folder: Path, changes: dict[str, Any] | None = None, *, arm: str | None = None, **keywords: Any) -> dict[str, Any]:
    """The result of an arm at TINY size with `changes`, run in `folder` with a store beside it; every step is saved."""
    recipe = cards.load(name)
    config = override(cards.config_of(recipe, arm, override(recipe.Config(), recipe.TINY)), changes or {})
    settings: dict[str, Any] = {"engine": make("local", "cpu"), "store": Store(folder.with_name(folder.name + "-store")), "plots": False}
    with Run(folder, 0, save_seconds=0.0, **settings) as run:
        return execute(name, config, run, arm=arm, **keywords)


def assert_resumes(name: str, tmp_path: Path, after: int, changes: dict[str, Any] | None = None, **keywords: Any) -> dict[str, Any]:
    """AssertionError unless a run that dies in its update number `after` and is started again ends bitwise where an undisturbed one does.
    Returns the latter's result."""
    straight = finish(name, tmp_path / "straight", changes, **keywords)
    update, left = Run.update, [after]

    def dying(run: Run, *words: Any, **parts: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return update(run, *words, **parts)

    with mock.patch.object(Run, "update", dying), pytest.raises(Killed):
        finish(name, tmp_path / "killed", changes, **keywords)
    again = finish(name, tmp_path / "killed", changes, **keywords)
    compared = [json.dumps({k: r[k] for k in ("metrics", "rows")}, sort_keys=True) for r in (straight, again)]
    assert compared[0] == compared[1]
    students = (tmp_path / place / "student" for place in ("straight", "killed"))
    files = [{file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()} for folder in students]
    assert files[0] == files[1]
    return straight
