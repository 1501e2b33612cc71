"""The convolutional network of the data-distillation papers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from stillroom.nets.parts import Normalise


class AvgConvNet(nn.Module):
    """A stage per entry of `widths`: 3x3 convolution with bias, batch norm, ReLU, average-pooling by 2; then all positions side by side
    and the head (Lee et al. 2023, arXiv 2310.06511, and its predecessors). Torch's default initial weights.

    Images (B, C, size, size) in [0, 1] to logits; `size` is divisible by 2 to the number of stages.
    """

    def __init__(self, classes: int, channels: int, size: int, mean: Sequence[float], std: Sequence[float], widths: Sequence[int]):
        super().__init__()
        name = f"convnet-avg-{'x'.join(map(str, widths))}"
        self.spec: dict[str, Any] = {"name": name, "classes": classes, "channels": channels, "size": size, "mean": mean, "std": std}
        layers: list[nn.Module] = [Normalise(mean, std)]
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.AvgPool2d(2)]
            channels = width
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(channels * (size // 2 ** len(widths)) ** 2, classes)

    def features(self, images: Tensor) -> Tensor:
        """(B, widths[-1] * s^2), s being the size after the last pooling."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))
