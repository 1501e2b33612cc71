"""What the small networks share: their shape as classifiers, the normalising first layer and the initial weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """Images in [0, 1] to zero mean and unit deviation per channel. Mean and std are saved with the weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class Classifier(nn.Module):
    """A body of layers that ends in (B, width) features, and a linear head. Images (B, C, size, size) in [0, 1] to logits.

    `spec` holds the name and arguments from which `nets.build.build(**spec)` builds its like.
    """

    def __init__(
        self,
        name: str,
        body: Sequence[nn.Module],
        width: int,
        *,
        classes: int,
        channels: int,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        super().__init__()
        self.spec: dict[str, Any] = {"name": name, "classes": classes, "channels": channels, "size": size, "mean": mean, "std": std}
        self.body = nn.Sequential(Normalise(mean, std), *body)
        self.head = nn.Linear(width, classes)
        kaiming(self.body)

    def features(self, images: Tensor) -> Tensor:
        """(B, width): what the head sees."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def kaiming(body: nn.Module) -> None:
    """He et al. 2015 for ReLU: convolutions by their outgoing, linear layers by their incoming connections. (A head keeps torch's
    default, which starts near uniform predictions.)"""
    for layer in body.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)


def pooled() -> list[nn.Module]:
    """(B, C, H, W) to (B, C), the average over positions."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
