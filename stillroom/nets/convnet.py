"""Small convolutional networks for images of 8 to 64 pixels."""

from __future__ import annotations

from collections.abc import Sequence

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


def average_convnet(channels: int, size: int, widths: Sequence[int]) -> tuple[list[nn.Module], int]:
    """The network of the data-distillation papers: a stage per entry of `widths`, of 3x3 convolution with bias, batch norm, ReLU and
    average-pooling by 2, then all positions side by side; and the number of features. 2 to the number of stages divides `size`."""
    layers: list[nn.Module] = []
    for out in widths:
        layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.AvgPool2d(2)]
        channels = out
    return [*layers, nn.Flatten()], channels * (size // 2 ** len(widths)) ** 2
