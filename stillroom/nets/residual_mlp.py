"""A residual multilayer perceptron whose blocks all work on one width, so that a classifier can be attached after each of them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import gelu


class MlpBlock(nn.Module):
    """x + linear(gelu(linear(layer norm(x)))), four times as wide inside as transformers are."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(gelu(self.inner(self.norm(x))))


def residual_mlp(inputs: int, width: int, depth: int) -> tuple[list[nn.Module], int]:
    """Images flattened to `inputs` values, `depth` blocks of `width` units, a final layer norm; the body's layers and its width."""
    return [nn.Flatten(), nn.Linear(inputs, width), *(MlpBlock(width) for _ in range(depth)), nn.LayerNorm(width)], width
