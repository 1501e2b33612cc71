"""Small denoising networks `net(x, time, cond)`: an MLP for points, a U-Net for small images.

time: [B] of order one (use a process time scale that keeps it there). cond: class labels [B], -1 or None for no class. Each network has
`spec` (`build(**net.spec)` makes its like), `hidden` (patterns of the layers that LoRA adapts), `middle` and `features` (the module whose
output an adversarial head reads, and its width).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.core.errors import UserError


class Embedding(nn.Module):
    """Sine and cosine of the time at geometric frequencies, plus a learned class (the last row is "no class")."""

    frequencies: Tensor

    def __init__(self, width: int, classes: int = 0, fastest: float = 30.0):
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(-1, math.log10(fastest), 16) * math.pi, persistent=False)
        self.time = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width) if classes else None

    def forward(self, time: Tensor, cond: Tensor | None) -> Tensor:
        angle = time[:, None] * self.frequencies.to(time)
        out = self.time(torch.cat([angle.sin(), angle.cos()], 1))
        if self.label is None:
            return out
        none = self.label.num_embeddings - 1
        label = torch.full((len(time),), none, device=time.device) if cond is None else torch.where(cond < 0, none, cond)
        return out + self.label(label)


class Block(nn.Module):
    """Residual MLP block whose hidden layer is shifted by the embedding."""

    def __init__(self, width: int, dropout: float = 0.0):
        super().__init__()
        self.first, self.shift, self.second = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        return h + self.second(self.dropout(F.silu(self.first(h) + self.shift(embedding))))


class PointNet(nn.Module):
    """[B, D] -> [B, D]."""

    hidden = ("blocks.*.*",)

    def __init__(self, dim: int = 2, width: int = 64, depth: int = 3, classes: int = 0, dropout: float = 0.0):
        super().__init__()
        self.spec = {"kind": "points", "dim": dim, "width": width, "depth": depth, "classes": classes, "dropout": dropout}
        self.embedding = Embedding(width, classes)
        self.enter, self.leave = nn.Linear(dim, width), nn.Linear(width, dim)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.features = width

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        embedding, h = self.embedding(time, cond), self.enter(x)
        for block in self.blocks:
            h = block(h, embedding)
        return self.leave(F.silu(h))

    @property
    def middle(self) -> nn.Module:
        return self.blocks[len(self.blocks) // 2]


class ConvBlock(nn.Module):
    """Residual convolutions, group-normalised, scaled and shifted by the embedding."""

    def __init__(self, enter: int, leave: int, embedding: int, dropout: float = 0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, enter), nn.GroupNorm(4, leave)
        self.conv1, self.conv2 = nn.Conv2d(enter, leave, 3, padding=1), nn.Conv2d(leave, leave, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * leave)
        self.skip = nn.Conv2d(enter, leave, 1) if enter != leave else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.film(embedding)[..., None, None].chunk(2, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(self.dropout(F.silu(self.norm2(h) * (1 + scale) + shift)))


class UNet(nn.Module):
    """[B, C, H, W] -> [B, C, H, W] with one halving; `width` channels outside, 2 width inside. H and W even."""

    hidden = ("down.*", "middle.*", "up.*")

    def __init__(self, channels: int = 1, width: int = 16, classes: int = 0, dropout: float = 0.0):
        super().__init__()
        self.spec = {"kind": "images", "channels": channels, "width": width, "classes": classes, "dropout": dropout}
        emb = 4 * width
        self.embedding = Embedding(emb, classes)
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.down = ConvBlock(width, width, emb, dropout)
        self.halve = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = ConvBlock(2 * width, 2 * width, emb, dropout)
        self.grow = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.up = ConvBlock(2 * width, width, emb, dropout)
        self.leave = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1))
        self.features = 2 * width

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        if x.shape[-1] % 2 or x.shape[-2] % 2:
            raise UserError(f"image size {x.shape[-2]}x{x.shape[-1]} is not divisible by 2, the factor of this network.")
        embedding, h = self.embedding(time, cond), self.enter(x)
        outer = self.down(h, embedding)
        inner = self.middle(self.halve(outer), embedding)
        return self.leave(self.up(torch.cat([outer, self.grow(inner)], 1), embedding))


def build(kind: str, **sizes: Any) -> PointNet | UNet:
    """The network that a `spec` describes. KeyError for an unknown kind."""
    return {"points": PointNet, "images": UNet}[kind](**sizes)
