"""Two processes, chunks, DDP and FSDP2 give the single process's weights for the same global batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stillroom.core.engine import make
from stillroom.core.errors import UserError
from tests.launch import ROOT, launched
from tests.ranks import main as in_process

RANKS = ROOT / "tests" / "ranks.py"


SHAPES = {
    "ddp": ("one_role", "three_roles", "one_role_accumulated", "reached_accumulated", "bare", "moved", "routed"),
    "fsdp2": ("one_role", "three_roles", "one_role_accumulated", "reached_accumulated", "moved"),
}


@pytest.fixture(scope="module", params=SHAPES)
def two_processes(request, tmp_path_factory) -> tuple[str, Path]:
    """The folder where two processes under one engine left what each shape ended with."""
    engine, folder = request.param, tmp_path_factory.mktemp(request.param)
    done = launched(str(RANKS), engine, str(folder), *SHAPES[engine])
    assert done.returncode == 0, done.stderr[-3000:]
    return engine, folder


def test_the_command_in_two_processes(tmp_path: Path) -> None:
    """A teacher that was trained under one engine serves the other, and one process makes room for both."""
    command = ["-m", "stillroom", "run", "kd", "--steps", "6", "--teacher-steps", "6"]
    command += ["--no-baseline", "--quiet", "--overwrite"]
    for engine in SHAPES:
        # As documented: with no word about the processor, also where there is no accelerator.
        done = launched(*command, "--engine", engine, "--out", str(tmp_path / "run"), STILLROOM_CACHE=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("report: ") == 1
    assert len(list((tmp_path / "cache").glob("teacher-*/train.pt"))) == 1


def ended(folder: Path, shape: str) -> list[torch.Tensor]:
    return torch.load(folder / f"{shape}.pt", weights_only=True)


def test_two_processes_equal_one(two_processes: tuple[str, Path], tmp_path: Path) -> None:
    engine, folder = two_processes
    alone = {shape.removesuffix("_accumulated") for shape in SHAPES[engine]}
    in_process("local", str(tmp_path), *alone)
    for shape in SHAPES[engine]:
        expected, found = ended(tmp_path, shape.removesuffix("_accumulated")), ended(folder, shape)
        assert len(found) == len(expected) > 0
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=f"{engine} {shape}: {{}}".format)


def test_chunks_equal_the_whole_batch(tmp_path: Path) -> None:
    in_process("local", str(tmp_path), "one_role", "one_role_accumulated")
    for a, b in zip(ended(tmp_path, "one_role"), ended(tmp_path, "one_role_accumulated"), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_bf16_runs_the_forward_pass_in_bf16() -> None:
    engine = make("local", "cpu", "bf16")
    net, _ = engine.trainable(torch.nn.Linear(4, 4), torch.optim.SGD)
    assert net(torch.ones(2, 4)).dtype == torch.bfloat16
    assert net.weight.dtype == torch.float32
    assert engine.copy(net)(torch.ones(2, 4)).dtype == torch.bfloat16
    assert engine.copy(net).weight is not net.weight


def test_what_an_engine_needs_is_said(monkeypatch) -> None:
    with pytest.raises(UserError, match="not usable"):
        make("local", "cuda:7")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="torchrun"):
        make("fsdp2")


@pytest.mark.parametrize("kind", SHAPES)
def test_a_program_of_several_processes_ends_without_taking_the_interpreter_down(kind: str, tmp_path: Path) -> None:
    """A thread of the group that wants the interpreter while it is taken down aborts the process: seen once in some hundred runs."""
    program = f"""if True:
        import atexit, sys
        from stillroom.core.engine import make

        class Late:
            def __del__(self):
                print("taken down")

        sys.late = Late()
        atexit.register(print, "exit function")
        engine = make({kind!r}, "cpu")
        print("printed")
        engine.end()
        print("after the end")
        """
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = {**os.environ, **rank, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout.split("\n")) == (0, ["printed", "exit function", ""]), done.stderr[-2000:]


def test_a_program_of_one_process_goes_on_after_its_end() -> None:
    make("local", "cpu").end()
