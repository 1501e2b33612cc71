"""Exits of a frozen classifier in a run: what they see, kept in the store, and what the report shows of a student that uses them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.adapt.early_exit import EarlyExit
from stillroom.adapt.exits import Exits, Table, features_of
from stillroom.core.run import Run
from stillroom.data.images import Split
from stillroom.metrics.classification import accuracy
from stillroom.metrics.cost import cost
from stillroom.metrics.exits import Curve, draw_calibration, draw_shares, draw_times, shares
from stillroom.vision import present


def table(run: Run, exits: Exits, split: Split) -> Table:
    """The split's table, computed once and kept in the store."""
    tensors = run.cached("exit-features", features_of, exits.net, tuple(exits.paths), split)
    return Table([tensors[str(exit)] for exit in range(len(exits.paths))], tensors["final"], split.labels)


def show(
    run: Run,
    student: EarlyExit,
    test: Split,
    seen: Table,
    taken: Tensor,
    metrics: Mapping[str, float],
    costs: Tensor,
    curves: Mapping[str, Curve],
) -> None:
    """Rows of the table for the whole net and the student; figures of accuracy against compute, of where the test images leave, of the time
    that each exit takes and of its calibration.

    seen: the exits' table of `test`. taken (N,): where the student's images leave. metrics: its own (accuracy, ece, nll, cost).
    costs (G + 1,): share of the whole net's multiply-adds up to each exit. curves: accuracies against costs, by label.
    """
    net, exits = student.exits.net, range(len(student.exits.paths) + 1)
    example = test.take(torch.arange(min(256, len(test)))).images
    present.classifier(run, "whole net", net, test)
    run.rows[-1] |= {"compute": 1.0, "throughput": rate(net, test)}
    times = [cost(student.at(exit), example) for exit in exits]
    single, batch = [t["latency_ms"] for t in times], [1e3 * len(example) / t["throughput"] for t in times]
    leaving = shares(taken, len(exits))
    latency = sum(share * ms for share, ms in zip(leaving, single, strict=True))
    run.row(
        "student", **{k: metrics[k] for k in ("accuracy", "ece", "nll")}, parameters=times[0]["parameters"], bytes=times[0]["bytes"],
        latency_ms=latency, compute=metrics["cost"], throughput=rate(student, test),
    )  # fmt: skip
    names = [*(f"exit {exit + 1}" for exit in exits[:-1]), "own head"]
    logits, labels = seen.logits(student.heads), seen.labels
    alone = [accuracy(logits[:, exit], labels) for exit in exits]

    def draw_curves(axes: Any) -> None:
        for label, curve in curves.items():
            axes.plot(*zip(*curve), marker="o", markersize=3, label=label)
        axes.scatter(costs.tolist(), alone, marker="x", color="#888888", label="all leave at one exit")
        axes.scatter([metrics["cost"]], [metrics["accuracy"]], marker="*", s=120, label="delivered", zorder=5)
        axes.set(xlabel="share of the whole net's multiply-adds", ylabel="accuracy")
        axes.legend(fontsize=8)

    run.figure("accuracy against compute", draw_curves)
    run.figure("where the test images leave", lambda axes: draw_shares(axes, names, leaving))
    whole = cost(net, example)
    series = {"one image": (single, whole["latency_ms"]), f"{len(example)} images": (batch, 1e3 * len(example) / whole["throughput"])}
    run.figure("time until each exit", lambda axes: draw_times(axes, names, series))
    run.figure("calibration of the exits", lambda axes: draw_calibration(axes, names, logits, labels, taken))


def rate(net: nn.Module, test: Split) -> float:
    """Test images a second in batches of 256, with whatever each image skips."""
    batches = [test.take(rows).images for rows in torch.arange(len(test)).split(256)]
    with torch.inference_mode():
        net(batches[0])
        start = time.perf_counter()
        for images in batches:
            net(images)
        if test.device.type != "cpu":
            torch.accelerator.synchronize(test.device)
    return len(test) / (time.perf_counter() - start)
