"""A multilayer perceptron on flattened images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def mlp(inputs: int, widths: Sequence[int]) -> tuple[list[nn.Module], int]:
    """Linear layers with ReLU, from `inputs` values an image through the given hidden widths; and the width of the last."""
    layers: list[nn.Module] = [nn.Flatten()]
    for wide, narrow in pairwise([inputs, *widths]):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    return layers, widths[-1]
