"""Self-supervision by two views of one input."""

from __future__ import annotations

from torch import Tensor


def barlow_twins(one: Tensor, two: Tensor, redundancy_weight: float) -> Tensor:
    """sum_i (1 - C_ii)^2 + weight sum_i!=j C_ij^2 of the views' cross-correlation C over the batch (Zbontar et al. 2021): a scalar."""
    one, two = ((x - x.mean(0)) / x.std(0, correction=0).clamp_min(1e-6) for x in (one, two))
    correlation = one.T @ two / len(one)
    diagonal = correlation.diagonal()
    return (1 - diagonal).square().sum() + redundancy_weight * (correlation.square().sum() - diagonal.square().sum())
