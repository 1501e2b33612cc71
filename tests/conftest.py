"""Every test has its own store and one thread; tests of the command share a store whose tiny teacher is trained once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.cli import main
from stillroom.core.engine import make
from stillroom.core.run import Run
from stillroom.core.store import Store
from tests.command import TINY, Child


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "store"))


@pytest.fixture
def run(tmp_path: Path):
    with Run(tmp_path / "run", 0, engine=make("local", "cpu"), store=Store(tmp_path / "store"), plots=False) as run:
        yield run


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def work(tmp_path: Path, shared_store: Path, monkeypatch) -> Path:
    """An empty working folder, with the shared store."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("STILLROOM_CACHE", str(shared_store))
    monkeypatch.setenv("COLUMNS", "200")
    return folder


@pytest.fixture
def child(tmp_path: Path):
    """Starts a Child; whatever still runs at the end of the test is killed."""
    children: list[Child] = []

    def start(function: Callable[..., Any], *args: Any) -> Child:
        folder = tmp_path / f"child{len(children)}"
        folder.mkdir()
        children.append(Child(folder, function, *args))
        return children[-1]

    yield start
    for each in children:
        if each.process.is_alive():
            each.process.kill()
            each.process.join()


@pytest.fixture(scope="session")
def finished(tmp_path_factory, shared_store: Path) -> Path:
    """A finished tiny run of kd."""
    folder = tmp_path_factory.mktemp("runs") / "r"
    assert main(["run", "kd", "--out", str(folder), "--cache", str(shared_store), *TINY]) == 0
    return folder
