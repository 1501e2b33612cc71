"""A small vision transformer, and its masked auto-encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillroom.nets.parts import Classifier


class Block(nn.Module):
    """Self-attention and a GELU perceptron of four times the width, each after a layer norm and added to its input."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.drop(self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        return x + self.drop(self.mlp(self.norm2(x)))


class ViT(Classifier):
    """Patches of `patch` pixels a side, a class token, learned positions, `depth` blocks, a layer norm, and the head on the class token
    (Dosovitskiy et al. 2021, arXiv 2010.11929). Images (B, C, size, size) in [0, 1] to logits; `patch` divides `size`."""

    def __init__(self, name: str, patch: int, width: int, depth: int, *, channels: int, size: int, **shape: Any):
        super().__init__(name, [], width, channels=channels, size=size, **shape)  # the body only normalises
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.token = nn.Parameter(torch.empty(1, 1, width).normal_(0, 0.02))
        self.positions = nn.Parameter(torch.empty(1, (size // patch) ** 2 + 1, width).normal_(0, 0.02))
        self.blocks = nn.Sequential(*(Block(width, max(1, width // 16)) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def patches(self, images: Tensor) -> Tensor:
        """(B, N, width): every patch with its position, without the class token."""
        return self.embed(self.body(images)).flatten(2).transpose(1, 2) + self.positions[:, 1:]

    def encode(self, patches: Tensor) -> Tensor:
        """(B, n, width), any n of the patches in any order, to (B, 1 + n, width) after the last norm, the class token first."""
        token = (self.token + self.positions[:, :1]).expand(len(patches), -1, -1)
        return self.norm(self.blocks(torch.cat([token, patches], 1)))

    def features(self, images: Tensor) -> Tensor:
        """(B, width): the class token."""
        return self.encode(self.patches(images))[:, 0]


class MaskedDecoder(nn.Module):
    """Predicts the pixels of every patch from the visible ones: a narrower transformer with one learned token for all that is hidden
    (He et al. 2022, arXiv 2111.06377)."""

    def __init__(self, encoder: ViT, width: int = 16, depth: int = 1):
        super().__init__()
        pixels = encoder.embed.in_channels * encoder.embed.kernel_size[0] * encoder.embed.kernel_size[1]
        self.embed = nn.Linear(encoder.embed.out_channels, width)
        self.mask = nn.Parameter(torch.empty(1, 1, width).normal_(0, 0.02))
        self.positions = nn.Parameter(torch.empty_like(encoder.positions[..., :1]).expand(-1, -1, width).clone().normal_(0, 0.02))
        self.blocks = nn.Sequential(*(Block(width, max(1, width // 16)) for _ in range(depth)))
        self.norm, self.predict = nn.LayerNorm(width), nn.Linear(width, pixels)

    def forward(self, latent: Tensor, kept: Tensor) -> Tensor:
        """latent (B, 1 + n, encoder width), class token first; kept (B, n), the visible patches' numbers -> (B, N, pixels of a patch)."""
        x = self.embed(latent)
        every = self.mask.to(x.dtype).expand(len(x), self.positions.shape[1] - 1, -1)  # half precision has made x half, not the weights
        every = every.scatter(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[-1]), x[:, 1:])
        x = torch.cat([x[:, :1], every], 1) + self.positions
        return self.predict(self.norm(self.blocks(x)))[:, 1:]
