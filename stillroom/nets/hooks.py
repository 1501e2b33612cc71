"""Looking into a network, and changing what passes through it, without touching its code: the one kind of hook that everything uses."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def hooked(modules: Sequence[nn.Module], visit: Callable[[int, tuple, Any], Any]) -> Iterator[None]:
    """While the block runs, `visit(place, inputs, output)` after every call of modules[place]; what it returns, if not None, takes the
    output's place."""
    handles = [
        module.register_forward_hook(lambda _, given, output, place=place: visit(place, given, output))  # type: ignore[misc]
        for place, module in enumerate(modules)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def outputs(*modules: nn.Module) -> Iterator[list[Any]]:
    """Collects what the modules return during the block, in the order of their calls, with gradient."""
    seen: list[Any] = []
    with hooked(modules, lambda place, given, output: seen.append(output)):
        yield seen


def matching(net: nn.Module, pattern: str) -> list[str]:
    """Paths of the modules that match a pattern such as `layers.*.attention`; * stands for one part of a path."""
    paths = [path for path, _ in net.named_modules() if path]
    return [path for path in paths if fnmatch.fnmatchcase(path, pattern) and path.count(".") == pattern.count(".")]


def swap(net: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """Put `new` in the place of the module at `path`, and return the one that was there."""
    parent, _, name = path.rpartition(".")
    holder, old = net.get_submodule(parent), net.get_submodule(path)
    setattr(holder, name, new)
    return old
