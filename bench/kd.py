"""`kd` against hand-written loops and peers: same networks, batches and optimizer, in turn, each in its own environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from bench.install_peers import python_of
from bench.task import SETTINGS, Task, network

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2)
CONTENDERS: dict[str, tuple[str, dict[str, str]]] = {
    "by hand, no teacher": ("by_hand", {"mode": "plain"}),
    "by hand, online": ("by_hand", {"mode": "online"}),
    "by hand, cached": ("by_hand", {"mode": "cached"}),
    "stillroom kd, no teacher": ("stillroom", {"mode": "plain"}),
    "stillroom kd, online": ("stillroom", {"mode": "online"}),
    "stillroom kd, cached": ("stillroom", {"mode": "cached"}),
    "stillroom kd, cached, first time": ("stillroom", {"mode": "cached, first time"}),
    "torchdistill DistillationBox": ("torchdistill", {}),
    "ModelOpt mtd.convert": ("modelopt", {}),
    "KD_Lib VanillaKD": ("kd_lib", {"loss": "its own"}),
    "KD_Lib VanillaKD, loss_fn=KL": ("kd_lib", {"loss": "kl"}),
    "transformers Trainer": ("trainer", {}),
}
PEERS = ["torchdistill DistillationBox", "ModelOpt mtd.convert", "KD_Lib VanillaKD, loss_fn=KL", "transformers Trainer"]
"""Those that do the same work; KD_Lib's own loss is another one."""


class Contender:
    """A contender's process. `missing` says why it is not there."""

    def __init__(self, module: str):
        python, self.missing = python_of(module), ""
        if not Path(python).exists():
            self.missing = "not installed: python bench/install_peers.py"
            return
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process it records
        self.process = subprocess.Popen(
            [python, "-m", f"bench.peers.{module}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env=environment, cwd=ROOT,
        )  # fmt: skip

    def ask(self, **request: Any) -> dict[str, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            self.process.wait()
            self.log.seek(0)
            self.missing = (self.log.read().strip().splitlines() or ["ended without a word"])[-1]
            return {}

    def close(self) -> None:
        if hasattr(self, "process"):
            if not self.missing:
                assert self.process.stdin
                self.process.stdin.close()
            self.process.wait()
            self.log.close()


@contextmanager
def processes() -> Iterator[dict[str, Contender]]:
    with ExitStack() as stack:
        contenders = {}
        for module in dict.fromkeys(module for module, _ in CONTENDERS.values()):
            contenders[module] = Contender(module)
            stack.callback(contenders[module].close)
        yield contenders


def train_teacher(setting: str, file: Path) -> None:
    s = SETTINGS[setting]
    data = s.data()
    net = network(s.teacher, data, 0)
    task = Task(data, net, net, s.batch, s.steps, 0)
    optimizer = task.optimizer()
    for _, image, label in task.batches():
        F.cross_entropy(net(image), label).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_file(net.state_dict(), file)


def compare(setting: str, contenders: dict[str, Contender], rounds: int) -> dict[str, Any]:
    """CPU milliseconds of a step (median over rounds), as a ratio to the hand-written loop in the same round, and the students' quality."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        teacher = Path(folder) / "teacher.safetensors"
        train_teacher(setting, teacher)
        for turn in range(-1, rounds):  # the first only warms up
            order = list(CONTENDERS) if turn % 2 else list(CONTENDERS)[::-1]
            for name in order:
                module, options = CONTENDERS[name]
                if contenders[module].missing:
                    continue
                brief = {"steps": 4} if turn < 0 else {}
                answer = contenders[module].ask(
                    setting=setting, seed=SEEDS[turn % len(SEEDS)], teacher=str(teacher), options=options, **brief
                )
                if answer and turn >= 0:
                    found[name].append(answer)
            print(f"  {setting}: round {turn + 1} of {rounds}", file=sys.stderr)
    return {name: summary(name, found) if found[name] else {"missing": contenders[CONTENDERS[name][0]].missing} for name in CONTENDERS}


def summary(name: str, found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    mine = found[name]

    def ratio(other: str) -> float:
        return median(a["ms"] / b["ms"] for a, b in zip(mine, found[other]))

    values: dict[str, Any] = {
        "ms": median(a["ms"] for a in mine),
        "/ hand online": ratio("by hand, online"),
        "/ stillroom without teacher": ratio("stillroom kd, no teacher"),
        "accuracy": sum(a["accuracy"] for a in mine[: len(SEEDS)]) / len(mine[: len(SEEDS)]),
        "nll": sum(a["nll"] for a in mine[: len(SEEDS)]) / len(mine[: len(SEEDS)]),
    }
    if name == "stillroom kd, online":
        peers = [peer for peer in PEERS if found[peer]]
        if peers:
            best = min(peers, key=lambda peer: median(a["ms"] for a in found[peer]))
            values |= {"best peer": best, "/ best peer": ratio(best)}
    return values


def measure(rounds: int = 9) -> dict[str, Any]:
    torch.set_num_threads(1)
    with processes() as contenders:
        return {setting: compare(setting, contenders, rounds) for setting in SETTINGS}
