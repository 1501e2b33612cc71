"""How a classifier enters a run's final table and pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stillroom.data.images import Split
from stillroom.metrics.classification import ClassificationMetrics, Reliability, evaluate, reliability
from stillroom.metrics.cost import cost

if TYPE_CHECKING:
    from stillroom.core.run import Run


def classifier(run: Run, name: str, net: nn.Module, test: Split) -> dict[str, float]:
    """Measure a classifier on the test split: its row of the final table (quality and cost) and, for the student, the reliability
    diagram and the images that it gets wrong with the most confidence. Returns the quality metrics."""
    net = run.unwrap(net)
    logits, labels = evaluate(net, test)
    metrics = ClassificationMetrics.of(logits, labels).dict()
    costs = cost(net, test.take(torch.arange(min(64, len(test)))).images) if run.plots and not run.rank else {}
    shown = {k: metrics[k] for k in ("accuracy", "ece", "nll")}
    run.row(name, **shown, **{k: costs[k] for k in ("parameters", "bytes", "latency_ms") if k in costs})
    if name == "student" and run.plots:
        table = reliability(logits, labels)
        run.figure("reliability", lambda axes: draw_reliability(axes, table))
        confidence, prediction = logits.softmax(-1).max(-1)
        worst = torch.where(prediction != labels, confidence, -1.0).topk(min(16, len(labels)))
        mistakes = worst.indices[worst.values >= 0]
        if len(mistakes):
            run.image("most confident mistakes", test.take(mistakes).images)
    return metrics


def draw_reliability(axes: Any, table: Reliability) -> None:
    """Accuracy against confidence per bin; the dot's size is its share of the samples."""
    bins = table.count > 0
    share: Tensor = (table.count / table.count.sum())[bins]
    axes.plot([0, 1], [0, 1], color="#888888", linewidth=1, linestyle="--", label="calibrated")
    axes.plot(table.confidence[bins].tolist(), table.accuracy[bins].tolist(), linewidth=1.2)
    axes.scatter(table.confidence[bins].tolist(), table.accuracy[bins].tolist(), s=(20 + 400 * share).tolist(), alpha=0.6)
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.set_title("reliability on the test images", fontsize=10, loc="left")
