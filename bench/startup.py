"""How long it takes to start: Stillroom's commands and imports beside the peers' imports; and the peak memory of the demo.

The measuring happens in a process that has not imported torch: a child's peak memory starts at its parent's size.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench.install_peers import python_of

ROOT = Path(__file__).parents[1]
CLI = ("-m", "stillroom")
COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "stillroom --help": ("", (*CLI, "--help")),
    "stillroom list": ("", (*CLI, "list")),
    "stillroom run kd --help": ("", (*CLI, "run", "kd", "--help")),
    "import torch": ("", ("-c", "import torch")),
    "import stillroom": ("", ("-c", "import stillroom")),
    "import the recipe kd": ("", ("-c", "import stillroom.recipes.classification.kd")),
    "import torchdistill": ("torchdistill", ("-c", "import bench.peers.torchdistill")),
    "import ModelOpt distill": ("modelopt", ("-c", "import modelopt.torch.distill")),
    "import KD_Lib": ("kd_lib", ("-c", "import bench.peers.kd_lib")),
    "import transformers Trainer": ("trainer", ("-c", "from transformers import Trainer")),
}


def run(python: str, words: tuple[str, ...]) -> dict[str, float]:
    """Wall and CPU seconds and peak memory in MB of one process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    process = subprocess.Popen([python, *words], env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        return {}
    return {"wall s": time.monotonic() - started, "cpu s": usage.ru_utime + usage.ru_stime, "peak MB": usage.ru_maxrss / 1024}


def measure() -> dict[str, Any]:
    words = [sys.executable, "-m", "bench.startup"]
    return json.loads(subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure_here(rounds: int = 3) -> dict[str, Any]:
    """Medians over rounds in turn; the first round only fills the caches of bytecode and files."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in COMMANDS}
    for turn in range(-1, rounds):
        for name, (peer, words) in COMMANDS.items():
            if Path(python_of(peer)).exists() and (answer := run(python_of(peer), words)) and turn >= 0:
                found[name].append(answer)
        print(f"  start-up: round {turn + 1} of {rounds}", file=sys.stderr)
    table: dict[str, Any] = {
        name: {key: median(a[key] for a in answers) for key in answers[0]} if answers else {"missing": "not installed, or its import fails"}
        for name, answers in found.items()
    }
    with tempfile.TemporaryDirectory() as place:
        demo = (*CLI, "run", "kd", "--out", f"{place}/run", "--cache", f"{place}/cache", "--quiet")
        table["stillroom run kd (the demo)"] = run(sys.executable, demo) or {"missing": "the demo failed"}
    return table


if __name__ == "__main__":
    print(json.dumps(measure_here()))
