"""Every test has its own store and one thread."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stillroom.engine import make
from stillroom.run import Run
from stillroom.store import Store


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "store"))


@pytest.fixture
def run(tmp_path: Path):
    with Run(tmp_path / "run", 0, engine=make("local", "cpu"), store=Store(tmp_path / "store"), plots=False) as run:
        yield run
