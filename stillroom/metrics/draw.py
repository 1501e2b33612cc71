"""The plots that most recipes want, on matplotlib axes: `run.figure(name, lambda axes: lines(axes, …))`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Points = tuple[Sequence[float], Sequence[float]]
"""Places along x and the values there."""


def lines(axes: Any, series: Mapping[str, Points], xlabel: str, ylabel: str, marker: str = "", **limits: Any) -> None:
    """One line per name, with a legend where there are several. limits: xlim, ylim, xscale, yscale as `axes.set` takes them."""
    for name, (x, y) in series.items():
        axes.plot(list(x), list(y), label=name, linewidth=1.4, marker=marker)
    axes.set(xlabel=xlabel, ylabel=ylabel, **limits)
    if len(series) > 1:
        axes.legend(fontsize=8)


def bars(axes: Any, values: Mapping[str, float], ylabel: str, **limits: Any) -> None:
    """One bar per name, labelled under it; long names are slanted."""
    axes.bar(range(len(values)), list(values.values()), tick_label=list(values))
    axes.set(ylabel=ylabel, **limits)
    axes.grid(axis="x", visible=False)
    if sum(map(len, values)) > 40:
        axes.tick_params(axis="x", labelrotation=20)
