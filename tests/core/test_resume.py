"""A run killed at any instant and started again ends bitwise where the uninterrupted one ends."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from stillroom.catalogue import report
from stillroom.core.engine import make
from stillroom.core.errors import UserError
from stillroom.core.interrupt import Interrupted
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.core.store import Store
from tests.loops import SHAPES, finish, one_optimizer

SGD = Optimizer("sgd", 0.1, momentum=0.0)


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory) -> None:
    """What torch imports with the first step is imported before processes are forked."""
    with small(tmp_path_factory.mktemp("warm") / "run") as run:
        one_optimizer(run, 1)


def finished(child, shape: str, folder: Path) -> list[torch.Tensor]:
    assert child(finish, shape, folder, 25).code() == 0
    return torch.load(folder / "final.pt", weights_only=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_killed_process_resumes_bitwise(shape: str, tmp_path: Path, child) -> None:
    straight = finished(child, shape, tmp_path / "straight" / "run")
    folder, chance = tmp_path / "killed" / "run", random.Random(shape)
    for _ in range(2):
        killed = child(finish, shape, folder, 25, None, 0.05)
        while "started" not in killed.out:
            assert killed.process.is_alive()
            time.sleep(0.01)
        time.sleep(chance.uniform(0.05, 0.4))
        killed.process.kill()
        assert killed.code() == -9
    assert not (folder / "final.pt").exists()
    assert child(finish, shape, folder, 25, chance.randint(2, 6)).code() == -9  # in the middle of a checkpoint write
    resumed = finished(child, shape, folder)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert not list(folder.rglob("*.tmp"))
    mine, other = (report.records(f / "metrics.jsonl") for f in (tmp_path / "straight" / "run", folder))
    assert mine == other  # no line lost, none twice


def test_a_finished_run_only_reloads(tmp_path: Path, child) -> None:
    first = finished(child, "two_stages", tmp_path / "run")
    stamp = (tmp_path / "run" / "student" / "train.pt").stat().st_mtime_ns
    again = finished(child, "two_stages", tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert (tmp_path / "run" / "student" / "train.pt").stat().st_mtime_ns == stamp


def small(folder: Path, **settings) -> Run:
    return Run(folder, 0, engine=make("local", "cpu"), store=Store(folder.parent / "store"), **settings)


def test_ctrl_c_saves_and_continues(tmp_path: Path) -> None:
    class Stopping(Run):
        def update(self, *args, **parts):
            if self.finite.step == 11:
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

        monkeypatch.setattr("stillroom.core.run.torch.save", full)
        with pytest.raises(UserError, match="No space left"):
            run.save(4)
    assert (tmp_path / "a" / "train.pt").read_bytes() == before
    assert not list((tmp_path / "a").glob(".*.tmp"))


def two_loops(run: Run, stop: int | None = None, kill_at: int | None = None) -> torch.Tensor:
    weight, optimizer = run.trainable("w", torch.nn.Parameter(torch.ones(1)), lambda p: torch.optim.SGD(p, 0.5))
    for name in ("warm", "train"):
        for step in run.steps(20, name):
            if name == "train" and step == stop:
                raise RuntimeError("stop")
            if name == "warm" and step == kill_at:
                os.kill(os.getpid(), signal.SIGINT)
            run.update(optimizer, (weight - torch.randn(1)).square())
    return weight.detach()


def test_a_run_stopped_in_its_second_loop_loses_no_line_of_its_log(tmp_path: Path) -> None:
    with small(tmp_path / "a") as run:
        straight = two_loops(run)
    with small(tmp_path / "b", save_seconds=0.0) as run, pytest.raises(RuntimeError):
        two_loops(run, stop=9)
    with small(tmp_path / "b") as run:
        resumed = two_loops(run)
    assert torch.equal(straight, resumed)
    assert report.records(tmp_path / "a" / "metrics.jsonl") == report.records(tmp_path / "b" / "metrics.jsonl")


def test_ctrl_c_in_the_last_step_of_a_loop_stops_too(tmp_path: Path) -> None:
    with small(tmp_path / "a") as run, pytest.raises(Interrupted, match=r"after step 20 of 20 \(warm\)"):
        two_loops(run, kill_at=19)
    with small(tmp_path / "a") as run:
        resumed = two_loops(run)
    with small(tmp_path / "b") as run:
        assert torch.equal(two_loops(run), resumed)


def test_a_damaged_or_hostile_checkpoint_is_refused_and_never_executed(tmp_path: Path) -> None:
    with small(tmp_path / "a") as run:
        two_loops(run)
    file = tmp_path / "a" / "warm.pt"
    whole = file.read_bytes()

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"step": 1, "payload": Hostile()}, tmp_path / "hostile.pt")
    for content in (whole[:100], whole[: len(whole) // 2], b"", b"not a checkpoint", (tmp_path / "hostile.pt").read_bytes()):
        file.write_bytes(content)
        with small(tmp_path / "a") as run, pytest.raises(UserError, match=r"warm.pt is damaged.*--overwrite"):
            two_loops(run)
    assert not (tmp_path / "executed").exists()


def test_a_flipped_bit_in_a_checkpoints_tensor_is_noticed(tmp_path: Path) -> None:
    with small(tmp_path / "a") as run:
        weight, optimizer = run.trainable("w", torch.nn.Parameter(torch.full((64,), 0.7071)), SGD)
        for _ in run.steps(1):
            run.update(optimizer, 0 * weight)
    file = tmp_path / "a" / "train.pt"
    content = bytearray(file.read_bytes())
    content[content.index(weight.detach().numpy().tobytes()) + 17] ^= 4
    file.write_bytes(content)
    with small(tmp_path / "a") as run:
        run.trainable("w", torch.nn.Parameter(torch.zeros(64)), SGD)
        with pytest.raises(UserError, match=r"train.pt is damaged.*--overwrite"):
            next(run.steps(2))


def test_what_a_killed_run_left_half_written_is_gone_at_the_next_start(tmp_path: Path) -> None:
    for place in (tmp_path / "a", tmp_path / "a" / "samples"):
        place.mkdir()
        (place / ".picture.png.123.tmp").write_text("half")
    small(tmp_path / "a").close()
    assert not list((tmp_path / "a").rglob("*.tmp"))
