"""A small convolutional network for images of 8 to 64 pixels."""

from __future__ import annotations

from torch import nn

from stillroom.nets.parts import pooled


def convnet(channels: int, width: int) -> tuple[list[nn.Module], int]:
    """Three stages of 3x3 convolution, batch norm and ReLU with `width`, 2 and 4 times `width` channels, max-pooling between them,
    then the average over all positions; and the number of features, 4 * width."""
    layers: list[nn.Module] = []
    for stage in range(3):
        out = width * 2**stage
        layers += [nn.MaxPool2d(2)] if stage else []
        layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        channels = out
    return layers + pooled(), channels
