"""What tests of the command share: real processes, messages of commands that must fail, folders as lists."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stillroom.cli import main

FORK = multiprocessing.get_context("fork")  # torch and the command are imported once
ROOT = Path(__file__).parents[1]
TINY = ("--steps", "4", "--teacher-steps", "4", "--quiet")


class Child:
    """`function(*args)` in a process of its own; its return value (an int) is the exit code, its streams are kept."""

    def __init__(self, folder: Path, function: Callable[..., Any], *args: Any):
        self.folder = folder
        self.process: Any = FORK.Process(target=self._main, args=(function, args))
        self.process.start()

    def _main(self, function: Callable[..., Any], args: tuple) -> None:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        torch.set_num_threads(1)  # the parent's threads do not exist here
        code = 99
        try:
            code = function(*args) or 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)

    def code(self) -> int:
        self.process.join(60)
        return self.process.exitcode

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    @property
    def out(self) -> str:
        file = self.folder / "out"
        return file.read_text() if file.exists() else ""


def python(*words: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False, timeout=120)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def refused(capsys, *args: str, code: int = 2) -> str:
    """The message of a command that must fail in this way."""
    capsys.readouterr()
    assert main(list(args)) == code
    streams = capsys.readouterr()
    assert "Traceback" not in streams.out + streams.err
    assert streams.err.strip()
    return " ".join(streams.err.replace("│", " ").split())
