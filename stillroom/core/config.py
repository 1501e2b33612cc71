"""Recipe configs: frozen dataclasses whose annotations declare the range of each value.

A range is the standard `annotated_types` metadata, so that the command line, the Python API and a search over configs all read
the same declaration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval, Le, Lt

from stillroom.core.errors import UserError

Share = Annotated[float, Interval(ge=0.0, le=1.0)]
Positive = Annotated[float, Gt(0.0)]
NonNegative = Annotated[float, Ge(0.0)]
Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Seed = Annotated[int, Interval(ge=0, lt=2**63)]

C = TypeVar("C")


def bounds(hint: Any) -> Iterator[Ge | Gt | Le | Lt]:
    """The elementary bounds declared on one annotation (or inside it: `Count | None`, `tuple[Share, ...]`), intervals taken apart."""
    if get_origin(hint) is not Annotated:
        for inner in get_args(hint):
            yield from bounds(inner)
    for mark in getattr(hint, "__metadata__", ()):
        for bound in mark if isinstance(mark, Interval) else (mark,):
            if isinstance(bound, Ge | Gt | Le | Lt):
                yield bound


def _broken(value: Any, bound: Ge | Gt | Le | Lt) -> str | None:
    for kind, name, sign, holds in (
        (Ge, "ge", "at least", lambda v, b: v >= b),
        (Gt, "gt", "greater than", lambda v, b: v > b),
        (Le, "le", "at most", lambda v, b: v <= b),
        (Lt, "lt", "less than", lambda v, b: v < b),
    ):
        if isinstance(bound, kind):
            limit = getattr(bound, name)
            return None if holds(value, limit) else f"{sign} {limit:g}"
    return None


def check(config: Any, prefix: str = "") -> None:
    """Raise UserError for the first value of `config` (nested dataclasses included) outside its declared range."""
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), f"{prefix}{field.name}".replace("_", "-")
        if dataclasses.is_dataclass(value):
            check(value, f"{prefix}{field.name}.")
            continue
        for bound in bounds(hints[field.name]):
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and (wanted := _broken(number, bound)) is not None:
                    raise UserError(f"--{flag} {number} is out of range: it must be {wanted}.", code=2)


def override(config: C, changes: Mapping[str, Any]) -> C:
    """A copy of `config` with `changes` by dotted name, e.g. {"optimizer.lr": 0.1}. KeyError for a name it lacks."""
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        if not dataclasses.is_dataclass(config) or head not in {f.name for f in dataclasses.fields(config)}:
            raise KeyError(f"{type(config).__qualname__} has no field {head!r}")
        # The type checker does not carry the check above over to C.
        config = dataclasses.replace(config, **{head: override(getattr(config, head), {rest: value}) if rest else value})  # type: ignore[type-var]
    return config


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """The config as one flat dict by dotted name, nested dataclasses taken apart."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flat |= flatten(value, f"{prefix}{field.name}.") if dataclasses.is_dataclass(value) else {prefix + field.name: value}
    return flat
