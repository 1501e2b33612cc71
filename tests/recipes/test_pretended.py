"""Every recipe on a pretended accelerator, at its TINY size: no mixed devices, everything that should learn moves, a resumed run measures
the same, and in a training step the host neither waits nor sends more often than is said here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stillroom.catalogue import cards
from tests.launch import ROOT

LIMITS = {"agent-distillation"}
"""It runs, but writing its texts on pretended tensors takes 40 seconds."""
STILL = {"jei-dnn/plain heads:gates"}
"""Roles that are not meant to learn: the gates beside heads that ignore them."""
TRAINING = [name for name in cards.cards() if hasattr(cards.load(name), "TINY") and name not in LIMITS]
HALVED = ["ps-kd", "quantized-distillation", "dmd2", "further-pretraining"]
"""Those whose networks are copied, entered in the middle, or of mixed types: at half precision too."""
NAMES = [*TRAINING, *(f"{name}:bf16" for name in HALVED)]
PROCESSES = 4
"""Several recipes share one, since it takes long to start."""
WAITS = {
    "jei-dnn": 0.2,  # once an epoch
    "agd": 3.0,  # recorded states lie in a mapped file
    "slimflow": 0.1,  # whether losses are finite, now and then
    "gated-attention": 1.0,
    "token-kd": 11.0,
}
"""Waits a step allowed in a recipe's busiest loop; none elsewhere."""
COPIES = {
    "kd": 1.0, "ps-kd": 0.1, "sla": 0.2, "ssld": 1.0, "jei-dnn": 0.1, "krr-st": 1.0, "agd": 3.0,
    "further-pretraining": 1.0, "gated-attention": 1.0, "token-kd": 9.0,
}  # fmt: skip
"""What is sent to the device a step, likewise: the order of an epoch, which is few steps here, and batches that are drawn on the host or
lie in a file."""


def measured(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "STILLROOM_CACHE": str(folder / "cache")}
    words = [sys.executable, "-m", "tests.pretended", str(folder), *names]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def check(found: dict[str, dict[str, Any]]) -> None:
    for asked, what in found.items():
        name = asked.removesuffix(":bf16")
        assert "failed" not in what, (asked, what)
        assert set(what["still"]) <= STILL, f"{name}: {what['still']} did not move"
        assert what["resumed"], f"{name}: a resumed run measures otherwise"
        for kind, allowed in (("waits", WAITS), ("copies", COPIES)):
            loops: dict[str, float] = {}
            for place, count in what[kind].items():
                loop = ":".join(place.split(": ")[0].split(":")[:2])
                loops[loop] = loops.get(loop, 0.0) + count
            assert max(loops.values(), default=0.0) <= allowed.get(name, 0.0), f"{name}, {kind} in its steps: {what[kind]}"


@pytest.mark.parametrize("part", range(PROCESSES))
def test_recipes_run_and_resume_on_an_accelerator(part: int, tmp_path: Path) -> None:
    check(measured(tmp_path, NAMES[part::PROCESSES]))
