"""A small convolutional network for images of 8 to 64 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from stillroom.nets.parts import Normalise, kaiming


class ConvNet(nn.Module):
    """Three stages of 3x3 convolution, batch norm and ReLU with `width`, 2 and 4 times `width` channels, max-pooling between them,
    then the average over all positions and the head. Images (B, C, size, size) in [0, 1] to logits."""

    def __init__(self, classes: int, channels: int, size: int, mean: Sequence[float], std: Sequence[float], width: int = 16):
        super().__init__()
        name = f"convnet-w{width}"
        self.spec: dict[str, Any] = {"name": name, "classes": classes, "channels": channels, "size": size, "mean": mean, "std": std}
        layers: list[nn.Module] = [Normalise(mean, std)]
        for stage in range(3):
            out = width * 2**stage
            layers += [nn.MaxPool2d(2)] if stage else []
            layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)
        kaiming(self)

    def features(self, images: Tensor) -> Tensor:
        """(B, 4 * width), averaged over positions."""
        return self.body(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))
