"""The catalogue of recipes, read from the folder tree (and from entry points of other packages).

Listing reads only the first line of each file, so that it needs neither torch nor the recipes' own imports.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import re
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillroom.core import config as configs
from stillroom.core.errors import UserError

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Card:
    """What the catalogue knows of a recipe without importing it."""

    name: str
    family: str
    module: str
    title: str
    baseline: bool
    """A well-known method that others are held against, not one of the published systems."""


def _card(name: str, family: str, module: str, file: Path) -> Card:
    head = file.read_text()
    title = head.lstrip().removeprefix('r"""').removeprefix('"""').partition("\n")[0].rstrip('" ')
    title = re.sub(r" \([^()]*\)\.?$", "", title)  # the list has no room for authors; the card shows them
    return Card(name, family, module, title, "\nBASELINE = True" in head)


@functools.cache
def cards() -> dict[str, Card]:
    """All recipes by name: those of this package by family folder, then those that other packages add."""
    root = Path(__file__).parents[1] / "recipes"
    found = {
        file.stem.replace("_", "-"): _card(
            file.stem.replace("_", "-"), file.parent.name, f"stillroom.recipes.{file.parent.name}.{file.stem}", file
        )
        for file in sorted(root.glob("*/*.py"))
        if file.stem != "__init__"
    }
    for point in metadata.entry_points(group="stillroom.recipes"):
        try:
            spec = util.find_spec(point.value)
        except ImportError:  # a package half removed: the others must go on working
            continue
        if spec is not None and spec.origin is not None:
            found[point.name] = _card(point.name, point.value.partition(".")[0], point.value, Path(spec.origin))
    return found


def find(name: str) -> Card:
    """UserError, with near matches, for a name that the catalogue lacks."""
    name = name.replace(".", "-")  # a file's name holds no dot: system-1.5 is system_1_5.py
    if name in cards():
        return cards()[name]
    near = difflib.get_close_matches(name.lower(), cards(), n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else "`stillroom list` shows all."
    raise UserError(f"there is no recipe called {name!r}. {hint}", code=2)


def load(name: str) -> Any:
    """Import a recipe. UserError when a package of an extra is missing."""
    card = find(name)
    try:
        return importlib.import_module(card.module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("stillroom", card.module.partition(".")[0]):
            raise
        raise UserError(
            f"the recipe {name} needs the package {error.name}: pip install it, or the extra of stillroom that brings it."
        ) from None


def config_of(recipe: Any, arm: str | None = None, base: Any = None) -> Any:
    """The recipe's config, or `base`, with the overrides of an arm."""
    base = recipe.Config() if base is None else base
    if arm is None:
        return base
    if arm not in recipe.ARMS:
        raise UserError(f"there is no arm {arm!r}; this recipe has {', '.join(recipe.ARMS)}.", code=2)
    return configs.override(base, recipe.ARMS[arm])
