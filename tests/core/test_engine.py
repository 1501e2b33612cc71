"""Two processes, chunks, DDP and FSDP2 give the single process's weights for the same global batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stillroom.engine import make
from stillroom.errors import UserError
from tests.ranks import main as in_process

RANKS = Path(__file__).parents[1] / "ranks.py"


def launched(shape: str, engine: str, folder: Path) -> list[torch.Tensor]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        str(port),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(RANKS.parents[1])}
    done = subprocess.run([*words, str(RANKS), shape, engine, str(folder)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "final.pt", weights_only=True)


def alone(shape: str, folder: Path) -> list[torch.Tensor]:
    in_process(shape, "local", str(folder))
    return torch.load(folder / "final.pt", weights_only=True)


@pytest.mark.parametrize(
    ("shape", "engine"),
    [
        ("one_role", "ddp"),
        ("one_role", "fsdp2"),
        ("three_roles", "ddp"),
        ("three_roles", "fsdp2"),
        ("one_role_accumulated", "ddp"),
        ("bare", "ddp"),
    ],
)
def test_two_processes_equal_one(shape: str, engine: str, tmp_path: Path) -> None:
    expected = alone(shape.removesuffix("_accumulated"), tmp_path / "one" / "run")
    found = launched(shape, engine, tmp_path / "two" / "run")
    assert len(found) == len(expected) > 0
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_chunks_equal_the_whole_batch(tmp_path: Path) -> None:
    expected, found = (alone(shape, tmp_path / shape / "run") for shape in ("one_role", "one_role_accumulated"))
    for a, b in zip(expected, found, strict=True):
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
