"""Every recipe on a pretended accelerator, at its TINY size: no mixed devices, everything that should learn moves, a resumed run measures
the same, and the host waits no more often in a training step than is said here."""

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

LIMITS = {"token-kd", "agent-distillation"}
"""token-kd's figure multiplies one row by a matrix, for which torch squeezes in place: the pretended tensors cannot change their shape.
agent-distillation runs, but writing its texts on them takes 40 seconds."""
STILL = {"jei-dnn/plain heads:gates"}
"""Roles that are not meant to learn: the gates beside heads that ignore them."""
TRAINING = [name for name in cards.cards() if hasattr(cards.load(name), "TINY") and name not in LIMITS]
FAMILIES = sorted({cards.find(name).family for name in TRAINING})
WAITS = {
    "gated-attention": 1,  # a batch of text is drawn on the host
    "agd": 3,  # recorded states lie in a mapped file
    "consistency": 1,  # the exact teachers' data are drawn by torch.multinomial, which waits
    "dmd2": 1,
    "lora-distillation": 1,
    "jei-dnn": 0.2,  # once an epoch
    "slimflow": 1.1,
}
"""Waits a step allowed in a recipe's busiest loop; none elsewhere."""


def measured(folder: Path, precision: str, names: list[str]) -> dict[str, dict[str, Any]]:
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "STILLROOM_CACHE": str(folder / "cache")}
    words = [sys.executable, "-m", "tests.pretended", str(folder), precision, *names]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def check(found: dict[str, dict[str, Any]]) -> None:
    for name, what in found.items():
        assert "failed" not in what, (name, what)
        assert set(what["still"]) <= STILL, f"{name}: {what['still']} did not move"
        assert what["resumed"], f"{name}: a resumed run measures otherwise"
        loops: dict[str, float] = {}
        for place, count in what["waits"].items():
            loop = ":".join(place.split(": ")[0].split(":")[:2])
            loops[loop] = loops.get(loop, 0.0) + count
        assert max(loops.values(), default=0.0) <= WAITS.get(name, 0.0), f"{name} waits in its steps: {what['waits']}"


@pytest.mark.parametrize("family", FAMILIES)
def test_recipes_of_a_family_run_and_resume_on_an_accelerator(family: str, tmp_path: Path) -> None:
    check(measured(tmp_path, "fp32", [name for name in TRAINING if cards.find(name).family == family]))


def test_half_precision_trains_what_full_precision_does(tmp_path: Path) -> None:
    """Those whose networks are copied, entered in the middle, or of mixed types."""
    check(measured(tmp_path, "bf16", ["ps-kd", "quantized-distillation", "dmd2", "further-pretraining"]))
