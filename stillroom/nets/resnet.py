"""Residual networks for small images: CIFAR ResNets of 6n+2 layers and the pre-activation ResNet-18."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad, relu

from stillroom.nets.parts import Normalise, kaiming


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut without weights: every `stride`-th position, new channels zero."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.stride, self.added = stride, out - channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(relu(self.norm1(self.conv1(x)))))
        half = self.added // 2
        shortcut = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.added - half)) if self.added else x
        return relu(y + shortcut)


class ResNet(nn.Module):
    """ResNet of `depth` = 6n+2 layers with 16, 32 and 64 channels (He et al. 2015, section 4.2, shortcut A).

    Images (B, C, size, size) in [0, 1] to logits.
    """

    def __init__(self, classes: int, channels: int, size: int, mean: Sequence[float], std: Sequence[float], depth: int):
        super().__init__()
        name = f"resnet{depth}"
        self.spec: dict[str, Any] = {"name": name, "classes": classes, "channels": channels, "size": size, "mean": mean, "std": std}
        layers: list[nn.Module] = [Normalise(mean, std), nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        channels = 16
        for stage in range(3):
            for block in range((depth - 2) // 6):
                layers.append(Block(channels, 16 * 2**stage, 2 if stage and not block else 1))
                channels = 16 * 2**stage
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)
        kaiming(self)

    def features(self, images: Tensor) -> Tensor:
        """(B, 64), averaged over positions."""
        return self.body(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class PreActBlock(nn.Module):
    """Norm and ReLU before each convolution; where the shape changes, the shortcut is a 1x1 convolution of the activated input."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(out), nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False) if stride > 1 or channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        active = relu(self.norm1(x))
        y = self.conv2(relu(self.norm2(self.conv1(active))))
        return y + (x if self.shortcut is None else self.shortcut(active))


class PreActResNet18(nn.Module):
    """Four stages of two blocks with 64 to 512 channels, norm and ReLU at the end (He et al. 2016), stem for small images.

    Images (B, C, size, size) in [0, 1] to logits.
    """

    def __init__(self, classes: int, channels: int, size: int, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        name = "preact-resnet18"
        self.spec: dict[str, Any] = {"name": name, "classes": classes, "channels": channels, "size": size, "mean": mean, "std": std}
        layers: list[nn.Module] = [Normalise(mean, std), nn.Conv2d(channels, 64, 3, 1, 1, bias=False)]
        channels = 64
        for stage in range(4):
            out = 64 * 2**stage
            layers += [PreActBlock(channels, out, 2 if stage else 1), PreActBlock(out, out, 1)]
            channels = out
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU())
        self.head = nn.Linear(channels, classes)
        kaiming(self)

    def features(self, images: Tensor) -> Tensor:
        """(B, 512), averaged over positions."""
        return self.body(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))
