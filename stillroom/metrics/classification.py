"""Accuracy, likelihood, calibration and confidence ranking of a classifier, from its logits on a labelled split."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillroom.data.images import Split
from stillroom.metrics.modes import eval_mode


@dataclass(frozen=True)
class Reliability:
    """Predictions grouped by confidence in equal bins over (0, 1]; empty bins hold zeros. All (bins,) float64."""

    confidence: Tensor
    """Mean largest probability."""
    accuracy: Tensor
    count: Tensor


@dataclass(frozen=True)
class ClassificationMetrics:
    """Shares and nats per sample, none of them in percent."""

    accuracy: float
    nll: float
    """Mean cross-entropy in nats."""
    ece: float
    """Expected calibration error: sum over bins of |accuracy - confidence| times the bin's share of samples."""
    aurc: float
    """Area under the risk-coverage curve: mean over k of the error rate among the k most confident."""
    e_aurc: float
    """aurc above that of the best possible ranking of the same errors."""

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, bins: int = 10) -> ClassificationMetrics:
        """From logits (N, C) and labels (N,), as in the PS-KD reference (Kim et al. 2021): computed in float64, ties in confidence
        are ranked in the order given."""
        logits = logits.double()
        probability, prediction = logits.softmax(-1).max(-1)
        wrong = (prediction != labels).double()
        table = reliability(logits, labels, bins)
        ranks = torch.arange(1, len(labels) + 1, device=labels.device, dtype=torch.float64)
        aurc = float((wrong[probability.argsort(descending=True, stable=True)].cumsum(0) / ranks).mean())
        errors = int(wrong.sum())
        best = float(((ranks - len(labels) + errors).clamp_min(0) / ranks).mean())
        return cls(
            accuracy=1 - errors / len(labels),
            nll=float(F.cross_entropy(logits, labels)),
            ece=float(((table.accuracy - table.confidence).abs() * table.count).sum() / len(labels)),
            aurc=aurc,
            e_aurc=aurc - best,
        )

    def dict(self) -> dict[str, float]:
        return asdict(self)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the rows (N, C) whose largest logit is that of the label (N,)."""
    return 1 - int((logits.argmax(-1) != labels).sum()) / len(labels)


def reliability(logits: Tensor, labels: Tensor, bins: int = 10) -> Reliability:
    """Accuracy and mean confidence per bin; a bin excludes its lower and includes its upper bound."""
    confidence, prediction = logits.double().softmax(-1).max(-1)
    place = torch.bucketize(confidence, torch.linspace(0, 1, bins + 1, device=logits.device, dtype=torch.float64)[1:-1])
    count, right, mass = (
        torch.zeros(bins, dtype=torch.float64, device=logits.device).index_add_(0, place, values)
        for values in (torch.ones_like(confidence), (prediction == labels).double(), confidence)
    )
    return Reliability(mass / count.clamp_min(1), right / count.clamp_min(1), count)


def evaluate(net: nn.Module, split: Split, batch: int = 512) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and labels (N,) of the whole split in its order. The net is in eval mode meanwhile."""
    with eval_mode(net), torch.no_grad():
        logits = [net(split.take(index).images) for index in torch.arange(len(split)).split(batch)]
    return torch.cat(logits), split.labels
