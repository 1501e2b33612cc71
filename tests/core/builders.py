"""Builders and stages that test_store.py runs in several processes; each appends what happened to a log, one word a line."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

from stillroom.core import store as files
from stillroom.core.engine import make
from stillroom.core.run import Run
from stillroom.core.store import Store


def note(log: Path, word: str) -> None:
    with open(log, "a") as out:
        out.write(word + "\n")


def slow(log: Path, seconds: float) -> dict[str, torch.Tensor]:
    note(log, "built")
    time.sleep(seconds)
    return {"x": torch.arange(4.0)}


def drawn(size: int) -> dict[str, torch.Tensor]:
    return {"noise": torch.randn(size)}


def cached(store: Store, log: Path, seconds: float) -> None:
    tensors = store.cached("slow", slow, log, seconds)
    note(log, f"has {tensors['x'].sum():g}")


def dies_while_building(store: Store, log: Path, seconds: float) -> None:
    files.save_file = lambda tensors, file: (Path(file).write_bytes(b"half"), os.kill(os.getpid(), signal.SIGKILL))
    cached(store, log, seconds)


def stage(store: Store, log: Path, seconds: float) -> None:
    """A shared stage of ten steps, of which the fourth takes `seconds`."""
    with Run(log.parent / f"run{os.getpid()}", 0, engine=make("local", "cpu"), store=store, save_seconds=0.0) as run:
        note(log, "wants")
        with run.stage("teacher", shared=("inputs", 3)) as shared:
            note(log, f"in {os.getpid()}")
            weight, optimizer = shared.trainable("w", torch.nn.Parameter(torch.zeros(3)), lambda p: torch.optim.SGD(p, 0.1))
            for step in shared.steps(10):
                note(log, f"step {step}")
                time.sleep(seconds if step == 3 else 0.0)
                shared.update(optimizer, (weight - torch.randn(3)).square())
            note(log, f"out {weight.sum().item():.9g}")
