"""How close a set of samples is to a reference set: kernel, Frechet and neighbour statistics, modes, straightness. Plain tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mmd(a: Tensor, b: Tensor, bandwidths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)) -> float:
    """Unbiased squared maximum mean discrepancy of [N, D] and [M, D] under a mean of Gaussian kernels exp(-d^2 / 2h^2).

    Bandwidths are in units of the data. Being unbiased it may be slightly negative.
    """
    a, b = a.flatten(1).double(), b.flatten(1).double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        squared = torch.cdist(x, y) ** 2
        return torch.stack([(-squared / (2 * h * h)).exp() for h in bandwidths]).mean(0)

    within = [(k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in (kernel(a, a), kernel(b, b))]
    return float(within[0] + within[1] - 2 * kernel(a, b).mean())


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| with unbiased means; needs no bandwidth."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    within = [torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b)]
    return float(2 * torch.cdist(a, b).mean() - within[0] - within[1])


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of Gaussian fits to features [N, F] and [M, F]; NaN for
    sets of one, which have no covariance."""
    if min(len(a), len(b)) < 2:
        return math.nan
    a, b = a.flatten(1).double(), b.flatten(1).double()
    cov_a, cov_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(a.shape[1], -1)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def coverage(real: Tensor, fake: Tensor, k: int = 5) -> dict[str, float]:
    """precision, recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020) on features [N, F], [M, F].

    A point's ball reaches its k-th nearest neighbour within its own set, or its farthest where there are fewer; NaN for sets of one.
    """
    real, fake = real.flatten(1).double(), fake.flatten(1).double()
    k = min(k, len(real) - 1, len(fake) - 1)
    if k < 1:
        return dict.fromkeys(("precision", "recall", "density", "coverage"), math.nan)

    def radius(x: Tensor) -> Tensor:
        return torch.cdist(x, x).kthvalue(k + 1, dim=1).values

    between, real_radius, fake_radius = torch.cdist(real, fake), radius(real), radius(fake)
    inside = between <= real_radius[:, None]
    return {
        "precision": float(inside.any(0).double().mean()),
        "recall": float((between <= fake_radius[None]).any(1).double().mean()),
        "density": float(inside.double().sum(0).mean() / k),
        "coverage": float((between.min(1).values <= real_radius).double().mean()),
    }


def modes(x: Tensor, centres: Tensor, radius: float) -> dict[str, float]:
    """modes: how many centres [K, D] have a sample within `radius`; effective_modes: exp(entropy) of the nearest-centre counts;
    on_mode: share of samples within `radius` of their centre."""
    distance, nearest = torch.cdist(x.flatten(1).double(), centres.flatten(1).double()).min(1)
    close = nearest[distance <= radius]
    share = torch.bincount(nearest, minlength=len(centres)) / len(x)
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    return {
        "modes": float(close.unique().numel()),
        "effective_modes": float(entropy.exp()),
        "on_mode": len(close) / len(x),
    }


def straightness(velocities: Tensor, chord: Tensor) -> float:
    """mean over steps and samples of |chord - v_t|^2, velocities [T, N, D], chord [N, D] = (end - start) / span; 0 is straight."""
    return float(((velocities - chord) ** 2).flatten(2).sum(2).mean())


def diversity(x: Tensor) -> float:
    """Mean pairwise Euclidean distance of [N, D]."""
    x = x.flatten(1).double()
    return float(torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)))


def gap_closed(x: Tensor, without: Tensor, goal: Tensor) -> float:
    """1 - median |x - goal|^2 / median |without - goal|^2 over samples [N, ...] paired by their noise: 1 is the goal, 0 no better than
    without. Medians, since a few diverging trajectories carry the means."""
    missed, at_first = (float(((y - goal) ** 2).flatten(1).mean(1).median()) for y in (x, without))
    return 1 - missed / at_first
