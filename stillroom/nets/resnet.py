"""Residual networks for small images: CIFAR ResNets of 6n+2 layers and the pre-activation ResNet-18."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import pad, relu

from stillroom.nets.parts import pooled


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


def resnet(channels: int, depth: int) -> tuple[list[nn.Module], int]:
    """`depth` = 6n+2 layers with 16, 32 and 64 channels (He et al. 2015, section 4.2, shortcut A); and the 64 features."""
    stem: list[nn.Module] = [nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return stem + _stages(Block, 16, 3, (depth - 2) // 6) + pooled(), 64


def preact_resnet18(channels: int) -> tuple[list[nn.Module], int]:
    """Four stages of two blocks with 64 to 512 channels, norm and ReLU at the end (He et al. 2016), with the stem for small images
    and not for ImageNet's; and the 512 features."""
    stem: list[nn.Module] = [nn.Conv2d(channels, 64, 3, 1, 1, bias=False)]
    return stem + _stages(PreActBlock, 64, 4, 2) + [nn.BatchNorm2d(512), nn.ReLU(), *pooled()], 512


def _stages(block: type[Block] | type[PreActBlock], width: int, stages: int, blocks: int) -> list[nn.Module]:
    """Stages of equal blocks; from the second on, the first block halves the resolution and doubles the channels."""
    widths = [width * 2**stage for stage in range(stages) for _ in range(blocks)]
    return [block(before, after, 1 if before == after else 2) for before, after in zip([width, *widths], widths)]
