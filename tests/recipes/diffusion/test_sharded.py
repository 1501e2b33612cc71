"""Recipes with several calls of a sharded network in a step finish in two processes: both draw at which one the gradient flows, and a
head's loss enters the network in its middle."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.diffusion.tiny import untrained
from tests.launch import ROOT, launched


def test_dmd2_and_phased_dmd_of_four_steps_finish_with_sharded_blocks(tmp_path: Path) -> None:
    block = untrained("ring", width=600, depth=1).small(1).net.blocks[0]
    assert sum(p.numel() for p in block.parameters()) > 1_000_000  # so FSDP2 shards it on its own
    done = launched(str(ROOT / "tests" / "recipes" / "diffusion" / "wide.py"), str(tmp_path), seconds=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found) == {"dmd2", "dmd2 whole", "phased_dmd"}
    assert all(math.isfinite(energy) for energy in found.values())
    assert found["dmd2"] == pytest.approx(found["dmd2 whole"], rel=1e-5)  # with its head, on features from behind a sharded block
