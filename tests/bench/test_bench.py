"""The benchmark compares equals: what is written by hand and what goes through Stillroom end with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bench.__main__
from bench import steps
from bench.install_peers import PEERS, python_of
from bench.peers import by_hand, stillroom
from bench.task import Task, network
from stillroom.core.engine import make
from stillroom.core.run import Run
from stillroom.core.store import Store
from stillroom.data.embedded import digits


def test_both_loops_end_with_the_same_weights(tmp_path: Path) -> None:
    split, hand, core = steps.images(64), steps.network("mlp-8"), steps.network("mlp-8")
    with Run(tmp_path / "run", engine=make("local", "cpu"), store=Store(tmp_path)) as run:
        for _ in zip(steps.by_hand(hand, split, 16, 12), steps.by_core(run, core, split, 16, 12)):
            pass
    for a, b in zip(hand.parameters(), core.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["plain", "online", "cached"])
def test_the_recipe_and_the_hand_written_task_end_with_the_same_weights(mode: str) -> None:
    def task() -> Task:
        data = digits(0, labelled=50, transfer=0)
        return Task(data, network("convnet-w2", data, 1), network("convnet-w4", data, 2).eval().requires_grad_(False), 10, 12, seed=3)

    hand, recipe = task(), task()
    assert by_hand.train(hand, mode) > 0
    assert stillroom.train(recipe, mode) > 0
    for a, b in zip(hand.student.parameters(), recipe.student.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_every_row_is_printed_and_missing_ones_say_so() -> None:
    quality = {"accuracy": 0.5, "nll": 1.0}
    found = {"ms": 1.0, "/ hand online": 1.0, "/ stillroom without teacher": 1.0, **quality}
    results = {
        "steps": {"about 2 ms": {"hand ms": 2.0, "core / hand": 1.01, "quartiles": [1.0, 1.02]}},
        "kd": {"digits": {"by hand": found, "a peer": {"missing": "not installed"}}},
        "startup": {"import x": {"wall s": 1.0, "cpu s": 1.0, "peak MB": 100.0}},
    }
    lines = bench.__main__.rows(results)
    assert [line[1] for line in lines] == ["2.00 ms by hand", "1.00 ms a step", "missing", "1.00 CPU s"]
    assert all(Path(python_of(peer)).name == "python" for peer in PEERS)
