"""Flags that a recipe's mode would ignore: refused, but where one set of flags serves several arms."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from stillroom.core.config import flatten
from stillroom.core.errors import UserError

_SERVES_SEVERAL = contextvars.ContextVar("_SERVES_SEVERAL", default=False)


@contextlib.contextmanager
def some_flags_idle() -> Iterator[None]:
    """While the block runs, idle flags are let through: a baseline, or every arm of a verification, gets the flags of the method."""
    before = _SERVES_SEVERAL.set(True)
    try:
        yield
    finally:
        _SERVES_SEVERAL.reset(before)


def refuse(message: str) -> None:
    """UserError saying that a flag would do nothing; nothing happens inside of `some_flags_idle`."""
    if not _SERVES_SEVERAL.get():
        raise UserError(message, code=2)


def refuse_idle(config: Any, presets: Iterable[Any], why: str, *names: str) -> None:
    """`refuse` the first of `names` (fields, or groups of them) that holds a value which no preset gives it: it was asked for, and would
    be ignored, for the reason `why`."""
    usual = [flatten(preset) for preset in presets]
    for key, value in flatten(config).items():
        if any(key == name or key.startswith(f"{name}.") for name in names) and all(value != preset[key] for preset in usual):
            refuse(f"--{key.replace('_', '-')} {value} has no effect {why}: leave it out.")


def refuse_unread(config: Any, unread: Mapping[str, str]) -> None:
    """`refuse` the first of these fields that is not at its default; `unread` gives the reason why each would do nothing."""
    for field in dataclasses.fields(config):
        if field.name in unread and getattr(config, field.name) != field.default:
            refuse(f"--{field.name.replace('_', '-')} does nothing here: {unread[field.name]}.")
