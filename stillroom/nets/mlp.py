"""A multilayer perceptron on flattened images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from stillroom.nets.parts import Normalise, kaiming


class Mlp(nn.Module):
    """Linear layers with ReLU of the given hidden `widths`, then the head. Images (B, C, size, size) in [0, 1] to logits."""

    def __init__(self, classes: int, channels: int, size: int, mean: Sequence[float], std: Sequence[float], widths: Sequence[int]):
        super().__init__()
        name = f"mlp-{'x'.join(map(str, widths))}"
        self.spec: dict[str, Any] = {"name": name, "classes": classes, "channels": channels, "size": size, "mean": mean, "std": std}
        sizes = [channels * size * size, *widths]
        layers = [layer for wide, narrow in pairwise(sizes) for layer in (nn.Linear(wide, narrow), nn.ReLU())]
        self.body = nn.Sequential(Normalise(mean, std), nn.Flatten(), *layers)
        self.head = nn.Linear(sizes[-1], classes)
        kaiming(self)

    def features(self, images: Tensor) -> Tensor:
        """(B, widths[-1]), after the last ReLU."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))
