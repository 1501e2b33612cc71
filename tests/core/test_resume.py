"""A run killed at any instant and started again ends bitwise where the uninterrupted one ends."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from stillroom import log
from stillroom.engine import make
from stillroom.errors import UserError
from stillroom.run import Interrupted, Run
from stillroom.store import Store
from tests.loops import SHAPES, one_optimizer

LOOPS = Path(__file__).parents[1] / "loops.py"


def launch(shape: str, folder: Path, *flags: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(LOOPS), shape, str(folder), "25", *flags], env=environment, stdout=subprocess.PIPE)


def finished(shape: str, folder: Path) -> list[torch.Tensor]:
    assert launch(shape, folder).wait() == 0
    return torch.load(folder / "final.pt", weights_only=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_killed_process_resumes_bitwise(shape: str, tmp_path: Path) -> None:
    straight = finished(shape, tmp_path / "straight" / "run")
    folder, chance = tmp_path / "killed" / "run", random.Random(shape)
    process = launch(shape, folder, "--delay", "0.02")
    process.stdout.readline()
    time.sleep(chance.uniform(0.05, 0.5))  # some step of the first loop
    process.kill()
    process.wait()
    assert not (folder / "final.pt").exists()
    process = launch(shape, folder, "--die-at-save", str(chance.randint(2, 8)))  # in the middle of a checkpoint write
    assert process.wait() == -9
    resumed = finished(shape, folder)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert not list(folder.rglob("*.tmp"))
    mine, other = (log.read(f / "metrics.jsonl") for f in (tmp_path / "straight" / "run", folder))
    assert mine == other  # no line lost, none twice


def test_a_finished_run_only_reloads(tmp_path: Path) -> None:
    first = finished("two_stages", tmp_path / "run")
    stamp = (tmp_path / "run" / "student" / "train.pt").stat().st_mtime_ns
    again = finished("two_stages", tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert (tmp_path / "run" / "student" / "train.pt").stat().st_mtime_ns == stamp


def small(folder: Path, **settings) -> Run:
    return Run(folder, 0, engine=make("local", "cpu"), store=Store(folder.parent / "store"), **settings)


def test_ctrl_c_saves_and_continues(tmp_path: Path) -> None:
    class Stopping(Run):
        def update(self, *args, **parts):
            if self.step == 11:
                os.kill(os.getpid(), 2)
            return super().update(*args, **parts)

    settings = {"engine": make("local", "cpu"), "store": Store(tmp_path / "store")}
    with pytest.raises(Interrupted, match="after step 12 of 25"), Stopping(tmp_path / "a", 0, **settings) as run:
        one_optimizer(run, 25)
    with small(tmp_path / "a") as run:
        resumed = one_optimizer(run, 25)
    with small(tmp_path / "b") as run:
        straight = one_optimizer(run, 25)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_folder_in_use_is_refused(tmp_path: Path) -> None:
    with small(tmp_path / "a"), pytest.raises(UserError, match="in use by another live process"):
        small(tmp_path / "a")
    small(tmp_path / "a").close()


def test_not_finite_names_step_role_and_part_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    def loop(run: Run, bad: int | None) -> None:
        weight = torch.nn.Parameter(torch.ones(3))
        weight, optimizer = run.trainable("images", weight, lambda p: torch.optim.SGD(p, 0.1))
        for step in run.steps(10):
            run.update(optimizer, size=weight.square(), fit=weight.sum() * (float("nan") if step == bad else 1.0))

    with small(tmp_path / "a", save_seconds=0.0) as run, pytest.raises(UserError, match=r"step 6: the loss of 'images'.*fit = nan"):
        loop(run, 6)
    assert torch.load(tmp_path / "a" / "train.pt", weights_only=True)["step"] == 6
    with small(tmp_path / "a") as run:
        loop(run, None)
    with small(tmp_path / "b") as run:
        loop(run, None)
    a, b = (torch.load(tmp_path / x / "train.pt", weights_only=True)["roles"] for x in "ab")
    assert torch.equal(a["images"]["net"][0], b["images"]["net"][0])


def test_checkpoint_of_another_program_is_refused(tmp_path: Path) -> None:
    with small(tmp_path / "a") as run:
        one_optimizer(run, 3)
    with small(tmp_path / "a") as run, pytest.raises(UserError, match="saved by another program"):
        SHAPES["bilevel"](run, 3)


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        small(tmp_path / "file" / "run")


def test_full_disk_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch) -> None:
    with small(tmp_path / "a") as run:
        one_optimizer(run, 3)
        before = (tmp_path / "a" / "train.pt").read_bytes()

        def full(state, file):
            file.write(b"x")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("stillroom.run.torch.save", full)
        with pytest.raises(UserError, match="No space left"):
            run.save(4)
    assert (tmp_path / "a" / "train.pt").read_bytes() == before
    assert not list((tmp_path / "a").glob(".*.tmp"))
