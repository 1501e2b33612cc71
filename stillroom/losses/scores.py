"""Score gaps: what a frozen teacher ("real") and a model of the generator's own output ("fake") say about a generated sample.

Both speak as clean predictions D at one noised sample y, since s_fake - s_real = (alpha / sigma^2)(D_fake - D_real).
"""

from __future__ import annotations

import torch
from torch import Tensor


def per_sample_mean(values: Tensor) -> Tensor:
    """[B, 1, ...] mean over everything but the batch, kept broadcastable."""
    return values.flatten(1).mean(1).reshape(-1, *[1] * (values.ndim - 1))


def dmd_weight(x: Tensor, real: Tensor, floor: float = 1e-4) -> Tensor:
    """[B, 1, ...] 1 / mean|x - D_real| per sample, detached, in float32 at least (DMD's normaliser)."""
    with torch.no_grad():
        wide = torch.promote_types(x.dtype, torch.float32)
        return 1 / per_sample_mean((x.to(wide) - real.to(wide)).abs()).clamp_min(floor)


def pushed(x: Tensor, gradient: Tensor) -> Tensor:
    """[B] half mean squared distance to sg(x - gradient): its gradient in x is gradient / (elements per sample).

    Non-finite entries of the gradient count as zero, as in DMD2.
    """
    goal = (x - torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)).detach()
    return 0.5 * ((x - goal) ** 2).flatten(1).mean(1)


def vsd(x: Tensor, fake: Tensor, real: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """[B] Diff-Instruct / DMD: dL/dx = weight (D_fake - D_real) / elements. No gradient through D_fake or D_real, given or not."""
    return pushed(x, weight * (fake - real).detach())


def sid(x: Tensor, fake: Tensor, real: Tensor, alpha: float = 1.0) -> Tensor:
    """[B] score identity distillation: sum of (D_r - D_f)((D_r - x) - alpha (D_r - D_f)) / sg(mean|x - D_r|, at least 1e-5).

    Gradient must flow through both predictions into their input y and through x, never into the predictors' parameters: call the
    predictors with autograd on and step the generator alone. Without their graph it is another, wrong method, so that raises ValueError.
    """
    if torch.is_grad_enabled() and x.requires_grad and not (fake.requires_grad and real.requires_grad):
        raise ValueError("SiD needs the gradient through D_fake and D_real into their noised input; they were computed without it")
    gap = real - fake
    scale = per_sample_mean((x - real).abs()).clamp_min(1e-5).detach()
    return (gap * ((real - x) - alpha * gap) / scale).flatten(1).sum(1)
