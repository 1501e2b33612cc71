"""Sets that need no download: scikit-learn's digits, generated coloured shapes, and points on the arms of a spiral."""

from __future__ import annotations

import math

import torch

from stillroom.core.errors import UserError
from stillroom.data.images import ImageData, MemorySplit, keep_labels, spoil_labels


def digits(seed: int = 0, labelled: int = 50, transfer: int = 900, noise: float = 0.0) -> ImageData:
    """scikit-learn's 1797 digits, (1, 8, 8) in [0, 1]: `labelled` for training, `transfer` without labels, the rest for testing.

    The split is drawn from `seed`; the labelled images are balanced over the classes. A share `noise` of the training labels (rounded
    to whole images) is replaced by labels drawn uniformly from all ten classes, so a replaced label may be the true one; test labels
    stay clean. `transfer=0` gives no transfer set. UserError when nothing is left for training or testing, or noise is not in [0, 1].
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels, labels = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(bunch.target)
    pool = labelled + transfer
    if labelled < 1 or transfer < 0 or pool >= len(labels):
        raise UserError(
            f"The digits set has {len(labels)} images: {labelled} labelled and {transfer} transfer images must leave some for testing "
            "and at least one for training."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    train, unlabelled = keep_labels(MemorySplit(pixels[order[:pool]], labels[order[:pool]]), labelled, generator)
    train = spoil_labels(train, noise, 10, generator)
    test = MemorySplit(pixels[order[pool:]], labels[order[pool:]])
    return ImageData.of("digits", train, test, tuple(str(digit) for digit in range(10)), unlabelled)


SHAPES = ("disc", "ring", "square", "cross", "stripes", "checks")


def shapes(seed: int = 0, count: int = 600, size: int = 32) -> ImageData:
    """Generated colour images, (3, size, size) uint8: shapes and textures of random colour, place and scale on a noisy ground.

    `count` training images and half as many for testing, of six classes; colour tells nothing about the class.
    """
    generator = torch.Generator().manual_seed(seed)
    total = count + max(count // 2, len(SHAPES))

    def draw(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand((total, *shape), generator=generator) * (high - low) + low

    labels = torch.randperm(total, generator=generator) % len(SHAPES)
    ticks = torch.linspace(-1, 1, size)
    radius = draw(0.35, 0.7, 1, 1)
    y, x = ((ticks.view(view) - draw(-0.25, 0.25, 1, 1)) / radius for view in ((1, size, 1), (1, 1, size)))
    x, y = x.expand(-1, size, -1), y.expand(-1, -1, size)
    distance, reach, bar = torch.hypot(x, y), torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    waves = [torch.sin(2 * math.pi * 1.5 * axis) > 0 for axis in (x + y, x, y)]
    masks = torch.stack(
        [
            distance < 1,
            (distance < 1) & (distance > 0.6),
            reach < 0.85,
            (reach < 1) & (bar < 0.3),
            (reach < 1) & waves[0],
            (reach < 1) & (waves[1] ^ waves[2]),
        ]
    )
    mask = masks[labels, torch.arange(total)].unsqueeze(1)
    ground, paint = draw(0.0, 0.45, 3, 1, 1), draw(0.55, 1.0, 3, 1, 1)
    images = torch.where(mask, paint, ground) + 0.06 * torch.randn((total, 3, size, size), generator=generator)
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return ImageData.of("shapes", MemorySplit(pixels[:count], labels[:count]), MemorySplit(pixels[count:], labels[count:]), SHAPES)


def spiral(seed: int = 0, count: int = 8000, arms: int = 5, twist: float = 12.0, spread: float = 0.25) -> ImageData:
    """Points on the arms of a spiral as images of one pixel, (2, 1, 1) in [0, 1]; the arm is the class. A quarter as many test points.

    Radius r = U^0.7 and angle 2 pi k / arms + twist r + spread N(0, 1): a task on which a network's depth matters.
    """
    generator = torch.Generator().manual_seed(seed)
    total = count + max(count // 4, arms)
    labels = torch.randperm(total, generator=generator) % arms
    radius = torch.rand(total, generator=generator) ** 0.7
    angle = 2 * math.pi / arms * labels + twist * radius + spread * torch.randn(total, generator=generator)
    points = (1 + torch.stack([radius * angle.cos(), radius * angle.sin()], 1)) / 2
    pixels = points[:, :, None, None]
    train, test = MemorySplit(pixels[:count], labels[:count]), MemorySplit(pixels[count:], labels[count:])
    return ImageData.of("spiral", train, test, tuple(f"arm {k + 1}" for k in range(arms)))
