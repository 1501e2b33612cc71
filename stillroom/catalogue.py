"""The catalogue of recipes, read from the folder tree (and from entry points of other packages), and how one recipe is executed.

Listing reads only the first line of each file, so that it needs neither torch nor the recipes' own imports.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillroom import __version__
from stillroom import config as configs
from stillroom.errors import UserError

if TYPE_CHECKING:
    from stillroom.run import Run

PACKAGES = ("torch", "numpy", "scikit-learn", "safetensors", "transformers", "diffusers", "accelerate", "peft", "kornia")


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
    root = Path(__file__).parent / "recipes"
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


def execute(name: str, config: Any, run: Run, *, arm: str | None = None, **keywords: Any) -> dict[str, Any]:
    """Run a recipe in the run's folder and write config.json and result.json; a finished run only reloads its result.

    UserError for a value out of range, and when the folder holds another recipe, seed or config.
    """
    from stillroom.store import write_atomic

    configs.check(config)
    given = {"recipe": name, "arm": arm, "seed": run.seed, "precision": run.engine.precision, "config": configs.flatten(config)}
    given = json.loads(json.dumps(given, default=str))
    before = read_config(run.folder)
    if before is not None:
        _refuse_other(before, given, run.folder)
    elif not run.rank:
        write_atomic(run.folder / "config.json", json.dumps(given, indent=1))
    done = run.folder / "result.json"
    if done.exists():
        return json.loads(done.read_text())
    try:
        metrics = load(name).main(config, run, **keywords)
    except RuntimeError as error:
        if hasattr(run.engine, "mesh"):
            raise UserError(
                f"{name} stopped under FSDP2, which cannot run every recipe (docs/running.md); use --engine ddp. ({error})"
            ) from error
        raise
    result = {
        **given,
        "metrics": {k: _number(v) for k, v in metrics.items()},
        "rows": [{k: _number(v) for k, v in row.items()} for row in run.rows],
        "seconds": round(run.seconds, 2),
        **environment(),
    }
    if not run.rank:
        write_atomic(done, json.dumps(result, indent=1, default=float))
    run.engine.barrier()
    return result


def _number(value: Any) -> Any:
    """As JSON has it: no tensors, and null for what is not finite."""
    if isinstance(value, str | int):
        return value
    return float(value) if math.isfinite(value) else None


def read_config(folder: Path) -> dict[str, Any] | None:
    """The config.json of a run folder; None when there is none. UserError when it is something else's."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict) or not {"recipe", "arm", "seed", "config"} <= found.keys():
        raise UserError(f"{folder} does not look like a run folder (its config.json is not a run's): choose another --out.", code=2)
    return found


def _refuse_other(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    if before == now:
        return
    if before["recipe"] != now["recipe"]:
        raise UserError(f"{folder} holds a run of {before['recipe']}, not {now['recipe']}; choose another --out.", code=2)
    old, new = ({k: v for k, v in d.items() if k not in ("recipe", "config")} | d["config"] for d in (before, now))
    changed = [f"{k}: {old.get(k)} there, {new.get(k)} now" for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    raise UserError(
        f"{folder} holds a run with another config ({'; '.join(changed)}). Choose another --out, or --overwrite it.", code=2
    )  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions of the main packages, commit, processor, peak memory: what a reader needs to place a result."""
    return {"versions": versions(), "commit": commit(), "processor": processor(), "peak_memory_mb": peak_memory_mb()}


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "stillroom": __version__} | dict(_versions())


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            continue


@functools.cache
def commit() -> str | None:
    """The checkout's commit, marked + when files differ from it; None for an installed package, or without git."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    git = lambda *words: subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False).stdout.strip()
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "stillroom")
    return (git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")) or None


def processor() -> str:
    import torch

    if torch.accelerator.is_available() and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    )
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def peak_memory_mb() -> float:
    """Of this process, the device's included."""
    import sys

    import torch

    device = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    try:
        import resource
    except ImportError:  # no such module on Windows
        return round(device, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return round(peak + device, 1)
