"""How a classifier does whose images leave at different exits: quality, calibration, conformal sets and cost of an operating point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from stillroom.metrics.classification import accuracy
from stillroom.metrics.uncertainty import conformal_sets, conformal_threshold, equal_mass_ece


def exit_quantiles(probabilities: Tensor, labels: Tensor, taken: Tensor, alpha: float) -> list[float]:
    """A conformal threshold for each exit, from the images that left there if they are more than 20, else from all."""
    quantiles = []
    for exit in range(probabilities.shape[1]):
        rows = taken == exit
        rows = rows if rows.sum() > 20 else torch.ones_like(rows)
        quantiles.append(conformal_threshold(probabilities[rows, exit], labels[rows], alpha))
    return quantiles


def measured(logits: Tensor, labels: Tensor, taken: Tensor, quantiles: list[float], costs: Tensor) -> dict[str, float]:
    """Of images that leave at `taken`: accuracy, cost (share of the whole net's multiply-adds), calibration error in 15 bins of equal mass,
    log loss, mean size of conformal sets and their coverage."""
    out = logits[torch.arange(len(taken), device=taken.device), taken]
    sets = conformal_sets(out.softmax(-1), torch.tensor(quantiles, device=taken.device)[taken])
    return {
        "accuracy": accuracy(out, labels),
        "cost": float(costs[taken].mean()),
        "ece": equal_mass_ece(out, labels),
        "nll": float(cross_entropy(out.double(), labels)),
        "set_size": float(sets.sum(1).float().mean()),
        "coverage": float(sets.gather(1, labels[:, None]).float().mean()),
    }


Curve = Sequence[tuple[float, float]]
"""(cost, value) of operating points, ascending in cost. Between two of them a curve is linear, which mixing both at random attains."""


def gain_at_equal_cost(points: Curve, rival: Curve) -> float:
    """The points' values minus those of the rival's curve at their costs, mean over the points."""
    at = np.interp([cost for cost, _ in points], [cost for cost, _ in rival], [value for _, value in rival])
    return float(np.mean([value for _, value in points] - at))


def mean_of_upper_half(curve: Curve) -> float:
    """The curve's mean over costs from one half to one."""
    return float(np.interp(np.linspace(0.5, 1, 101), [cost for cost, _ in curve], [value for _, value in curve]).mean())


def shares(taken: Tensor, exits: int) -> list[float]:
    """Share of the images (N,) that leave at each of `exits` exits."""
    return (torch.bincount(taken, minlength=exits).double() / len(taken)).tolist()


def draw_shares(axes: Any, names: Sequence[str], shares: Sequence[float]) -> None:
    axes.bar(names, shares)
    axes.set_ylabel("share of the images")


def draw_times(axes: Any, names: Sequence[str], series: Mapping[str, tuple[Sequence[float], float]]) -> None:
    """Milliseconds until each exit, and dashed those of the net without exits: label -> (per exit, without exits)."""
    for place, (label, (until, without)) in enumerate(series.items()):
        axes.plot(names, until, marker="o", color=f"C{place}", label=label)
        axes.axhline(without, color=f"C{place}", linestyle="--", linewidth=1)
    axes.set(ylabel="milliseconds (dashed: without exits)", yscale="log")
    axes.legend(fontsize=8)


def draw_calibration(axes: Any, names: Sequence[str], logits: Tensor, labels: Tensor, taken: Tensor) -> None:
    """Calibration error of each exit over all images and over those that leave there; logits (N, exits, C), taken (N,)."""
    for exit in range(len(names)):
        rows = taken == exit
        axes.bar(exit - 0.2, equal_mass_ece(logits[:, exit], labels), 0.4, color="C0", label="all images" if not exit else None)
        left = equal_mass_ece(logits[rows, exit], labels[rows]) if rows.any() else 0.0
        axes.bar(exit + 0.2, left, 0.4, color="C1", label="images that leave here" if not exit else None)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("calibration error")
    axes.legend(fontsize=8)
