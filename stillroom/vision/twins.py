"""Image encoders that learn without labels from two views of every image (Barlow Twins, Zbontar et al. 2021, arXiv 2103.03230)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.core.config import Count, NonNegative
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.data.augment import Augmentation, augmenter
from stillroom.data.batches import Batches
from stillroom.data.images import ImageData
from stillroom.losses.twins import barlow_twins
from stillroom.nets.build import build
from stillroom.nets.wrapped import Encoder


@dataclass(frozen=True)
class BarlowTwins:
    """How a small network becomes a self-supervised teacher: with its name and the images, all that decides its weights."""

    steps: Count = 300
    batch_size: Count = 128
    optimizer: Optimizer = Optimizer("adamw", 2e-3, weight_decay=1e-4, schedule="cosine")
    augment: Augmentation = "shift"
    """Augmentation of each view, before noise and scaling."""
    redundancy_weight: NonNegative = 5e-3
    """Weight of the off-diagonal terms of the loss."""
    noise: NonNegative = 0.3
    """Deviation of the pixel noise in a view, in deviations of the data; half as much scales each image."""

    def encoder(self, run: Run, net: str, data: ImageData) -> nn.Module:
        """The network of this name (images to features), trained on the training images once for all runs that want the same."""
        with run.stage("teacher", shared=(train, self, net, data.train, data.mean, data.std)) as stage:
            return train(stage, self, net, data)


class Twin(nn.Module):
    """A network's features and the projection that the Barlow Twins loss looks at."""

    def __init__(self, net: Any):
        super().__init__()
        self.encoder = Encoder(net)
        width = net.head.in_features
        self.projector = nn.Sequential(
            nn.Linear(width, 2 * width, bias=False), nn.BatchNorm1d(2 * width), nn.ReLU(), nn.Linear(2 * width, 2 * width)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.encoder(images))


def train(stage: Run, cfg: BarlowTwins, net: str, data: ImageData) -> nn.Module:
    """The features of `net` after training on the images of `data.train`; its head, which nothing looks at, has two outputs."""
    fresh = build(net, classes=2, channels=data.channels, size=data.size, mean=data.mean, std=data.std)
    twin, optimizer = stage.trainable("teacher", Twin(fresh), cfg.optimizer)
    augment, batches = augmenter(cfg.augment, data.size), Batches(data.train, cfg.batch_size, stage.seed)
    std = torch.tensor(data.std, device=stage.device).view(-1, 1, 1)
    for step in stage.steps(cfg.steps):
        images = stage.shard(batches(step)).images
        views = []
        for _ in range(2):
            scale = torch.randn(len(images), 1, 1, 1, device=images.device)
            views.append(view(augment(images), scale, torch.randn_like(images), cfg.noise, std))
        one, two = twin(torch.cat(views)).chunk(2)
        stage.update(optimizer, barlow_twins(one, two, cfg.redundancy_weight))
    return stage.unwrap(twin).encoder


def view(images: Tensor, scale: Tensor, eps: Tensor, noise: float, std: Tensor) -> Tensor:
    """What the teacher's loss sees of images (B, C, H, W): each scaled by 1 + noise / 2 scale, with pixel noise of `noise` deviations `std`
    of the data. scale (B, 1, 1, 1) and eps (B, C, H, W) are standard normal."""
    return images * (1 + noise / 2 * scale) + noise * std * eps
