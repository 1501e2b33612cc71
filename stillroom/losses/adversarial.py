"""Adversarial losses on logits, and small heads that judge features of a denoiser. One value per sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _flat(values: Tensor) -> Tensor:
    """[B] mean over everything but the batch (patch logits give one value per sample)."""
    return values.reshape(len(values), -1).mean(1)


def softplus_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(-real) + softplus(fake): the non-saturating game of DMD2."""
    return _flat(F.softplus(-real)) + _flat(F.softplus(fake))


def softplus_generator(fake: Tensor) -> Tensor:
    """softplus(-fake)."""
    return _flat(F.softplus(-fake))


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """relu(1 - real) + relu(1 + fake)."""
    return _flat(F.relu(1 - real)) + _flat(F.relu(1 + fake))


def hinge_generator(fake: Tensor) -> Tensor:
    """-fake."""
    return -_flat(fake)


def approximate_r1(clean: Tensor, jittered: Tensor, std: float) -> Tensor:
    """Squared slope of the logits on real data between inputs and inputs + std * noise, without a second derivative (FastGen)."""
    return _flat((jittered - clean) ** 2) / std**2


class Head(nn.Module):
    """One logit per sample from features [B, F], tokens [B, N, F] or maps [B, F, H, W]; tokens and places are judged, then averaged."""

    def __init__(self, features: int, width: int = 64):
        super().__init__()
        self.judge = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, features: Tensor) -> Tensor:
        if features.ndim == 4:
            features = features.flatten(2).transpose(1, 2)
        return torch.atleast_2d(self.judge(features)).reshape(len(features), -1).mean(1)
