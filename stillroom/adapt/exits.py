"""Exits inside a frozen classifier, by module path: features at each exit, and inference that really stops there.

The exits need nothing of the classifier but a stack of blocks through which every image passes alone (residual networks,
transformers): the batch is cut inside the forward pass, after a block, to the images that go on, and the pass is left when none do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.core.errors import UserError
from stillroom.data.images import Split
from stillroom.nets.hooks import hooked, matching


class _Left(Exception):
    """No image is left in the batch."""


def find_exits(net: nn.Module, paths: Sequence[str] = ()) -> list[str]:
    """The module paths of a net's exits, in its order of modules.

    A path with `*` (`model.vit.layers.*`) names a stack of blocks: exits follow all of them but the last, after which the net's own head
    stands. A path without it is an exit itself. Without paths, the longest row of modules of one class (torch's own layers aside) that
    stand side by side is the stack. UserError for a path that names nothing, and when there is no such row.
    """
    names = [name for name, _ in net.named_modules() if name]
    if not paths:
        stacks = [_row(path, module) for path, module in net.named_modules() if isinstance(module, nn.Sequential | nn.ModuleList)]
        longest = max(stacks, key=len, default=[])
        if len(longest) < 2:
            raise UserError(f"{type(net).__name__} has no row of equal blocks: name its exits with --exits. Its modules: {_some(names)}.")
        return longest[:-1]
    found: set[str] = set()
    for path in paths:
        if not (matches := matching(net, path)):
            raise UserError(f"--exits {path}: {type(net).__name__} has no such module. It has {_some(names)}.")
        found |= set(matches[:-1] if "*" in path and len(matches) > 1 else matches)
    return [name for name in names if name in found]


def _row(path: str, stack: nn.Module) -> list[str]:
    """Paths of the children of the stack's commonest class that is not one of torch's layers."""
    kinds = [type(child) for child in stack.children() if not type(child).__module__.startswith("torch.nn")]
    kind = max(kinds, key=kinds.count, default=None)
    return [f"{path}.{name}".lstrip(".") for name, child in stack.named_children() if type(child) is kind]


def _some(names: list[str]) -> str:
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "")


def final_norm(net: nn.Module, block: nn.Module) -> nn.Module | None:
    """The layer norm that the net's own head reads through: the last one outside of modules of the block's class; None without any."""
    inside = {part for module in net.modules() if type(module) is type(block) for part in module.modules()}
    return next((m for m in reversed(list(net.modules())) if isinstance(m, nn.LayerNorm) and m not in inside), None)


class Exits(nn.Module):
    """A frozen classifier tapped after the modules at `paths`.

    The feature of an exit is one vector an image: of tokens (B, T, d) the class token where the net has one, else their mean; of maps
    (B, C, H, W) the mean over positions; it passes the net's own final layer norm where that has its width. The classifier stays in
    eval mode whatever `train()` says, or its dropout and batch statistics would change what the exits see.
    """

    def __init__(self, net: nn.Module, paths: Sequence[str]):
        super().__init__()
        self.net, self.paths = net.eval().requires_grad_(False), list(paths)
        self._taps = [net.get_submodule(path) for path in self.paths]
        self._norm: list[Any] = [final_norm(net, self._taps[-1])]  # in a list: it is the net's already, not a part of its own
        self._class_token = any("cls_token" in name for name, _ in net.named_parameters())

    def train(self, mode: bool = True) -> Exits:
        return super().train(False)

    def feature(self, output: Any) -> Tensor:
        """(B, d) of what a tapped module returned."""
        x = output[0] if isinstance(output, tuple) else output
        if x.ndim == 4:
            x = x.mean((2, 3))
        elif x.ndim == 3:
            x = x[:, 0] if self._class_token else x.mean(1)
        norm = self._norm[0]
        return norm(x) if norm is not None and tuple(norm.normalized_shape) == x.shape[-1:] else x

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Images (B, C, H, W) to the features of every exit, [(B, d_l)], and the net's own logits (B, classes)."""
        features: list[Tensor] = []
        with hooked(self._taps, lambda exit, given, output: features.append(self.feature(output))):
            logits = self.net(images)
        return features, logits

    @torch.no_grad()
    def lazily(self, images: Tensor, decide: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Logits (B, classes) and the exit (B,) that each image took, without the work behind it; len(paths) is the net's own head.

        decide(exit, features (b, d), rows (b,)) -> logits (b, classes) and which leave, (b,) bool, for the images still under way,
        whose positions in the batch are `rows`.
        """
        rows = torch.arange(len(images), device=images.device)
        taken = torch.full_like(rows, len(self.paths))
        parts: list[tuple[Tensor, Tensor]] = []

        def visit(exit: int, given: tuple, output: Any) -> Any:
            nonlocal rows
            logits, leaves = decide(exit, self.feature(output), rows)
            if not leaves.any():
                return None
            parts.append((rows[leaves], logits[leaves]))
            taken[rows[leaves]] = exit
            rows = rows[~leaves]
            if not len(rows):
                raise _Left
            return (output[0][~leaves], *output[1:]) if isinstance(output, tuple) else output[~leaves]

        with contextlib.suppress(_Left), hooked(self._taps, visit):
            rest = self.net(images)  # which rebinds `rows`
            parts.append((rows, rest))
        left, logits = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        return logits[left.argsort()], taken


@dataclass(frozen=True)
class Table:
    """What a frozen net makes of a split: features of every exit [(N, d_l)], its own logits (N, C), labels (N,)."""

    features: list[Tensor]
    final: Tensor
    labels: Tensor

    @torch.no_grad()
    def logits(self, heads: nn.Module) -> Tensor:
        """(N, G + 1, C): of every exit, by heads from features [(N, d_l)] to logits [(N, C)], and of the net's own head."""
        return torch.stack([*heads(self.features), self.final], 1)


def features_of(net: nn.Module, paths: tuple[str, ...], split: Split) -> dict[str, Tensor]:
    """The features (N, d_l) of every exit of a split under the exit's number, and the net's own logits (N, classes) under "final"."""
    exits, parts = Exits(net, paths), []
    for rows in torch.arange(len(split)).split(512):
        features, final = exits(split.take(rows).images)
        parts.append([*features, final])
    joined = [torch.cat(column) for column in zip(*parts, strict=True)]
    return {str(exit): feature for exit, feature in enumerate(joined[:-1])} | {"final": joined[-1]}
