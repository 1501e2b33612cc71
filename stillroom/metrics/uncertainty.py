"""Calibration in bins of equal mass, and conformal prediction sets, from plain tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def equal_mass_ece(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error of logits (N, C) over `bins` groups of equally many predictions, sorted by confidence: the mean over
    predictions of |accuracy - mean confidence| of their group. A share; float64."""
    confidence, prediction = logits.double().softmax(-1).max(-1)
    order = confidence.argsort(stable=True)
    gap = (prediction == labels).double()[order] - confidence[order]
    return float(sum(group.sum().abs() for group in gap.tensor_split(bins) if len(group))) / len(labels)


def conformal_threshold(probabilities: Tensor, labels: Tensor, alpha: float) -> float:
    """Split-conformal threshold q of the scores 1 - p(true class), from calibration probabilities (N, C) and labels (N,).

    The ceil((n + 1)(1 - alpha)) / n quantile, an observed score ("higher"). Level above one: the largest score, so that for very few
    calibration samples coverage is not guaranteed. ValueError without samples.
    """
    if not len(labels):
        raise ValueError("a conformal threshold needs calibration samples")
    scores = 1 - probabilities.double().gather(1, labels[:, None]).squeeze(1)
    level = min(1.0, math.ceil((len(scores) + 1) * (1 - alpha)) / len(scores))
    return float(torch.quantile(scores, level, interpolation="higher"))


def conformal_sets(probabilities: Tensor, threshold: float | Tensor) -> Tensor:
    """(N, C) bool: the classes whose probability is at least 1 - threshold; one threshold, or one per sample (N,)."""
    threshold = torch.as_tensor(threshold, dtype=torch.float64, device=probabilities.device)
    return probabilities.double() >= 1 - (threshold[:, None] if threshold.ndim else threshold)
