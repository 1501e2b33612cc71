"""A residual multilayer perceptron whose blocks all work on one width, so that a classifier can be attached after each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import gelu

from stillroom.nets.parts import Normalise


class MlpBlock(nn.Module):
    """x + linear(gelu(linear(layer norm(x)))), both of width `width`."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(gelu(self.inner(self.norm(x))))


class ResidualMlp(nn.Module):
    """`depth` residual blocks of `width` units, a final layer norm and the head. Images (B, C, size, size) in [0, 1] to logits."""

    def __init__(
        self, classes: int, channels: int, size: int, mean: Sequence[float], std: Sequence[float], width: int = 16, depth: int = 6
    ):
        super().__init__()
        name = f"residual-mlp-w{width}-d{depth}"
        self.spec: dict[str, Any] = {"name": name, "classes": classes, "channels": channels, "size": size, "mean": mean, "std": std}
        self.stem = nn.Sequential(Normalise(mean, std), nn.Flatten(), nn.Linear(channels * size * size, width))
        self.blocks = nn.Sequential(*(MlpBlock(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def features(self, images: Tensor) -> Tensor:
        """(B, width), after the final norm."""
        return self.norm(self.blocks(self.stem(images)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))
