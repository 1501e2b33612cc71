"""One recipe in one folder: config.json says what was asked for, result.json what came out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from stillroom.catalogue.cards import load
from stillroom.core import config as configs
from stillroom.core.environment import environment
from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.core.store import write_atomic


def execute(name: str, config: Any, run: Run, *, arm: str | None = None, **keywords: Any) -> dict[str, Any]:
    """Run a recipe in the run's folder and write config.json and result.json; a finished run only reloads its result.

    UserError for a value out of range, when the folder holds another recipe, seed or config, and for FSDP2 with a recipe that does not
    declare it (`FSDP2 = METRIC`: the metric by which tests see that a sharded run learns what another one does).
    """
    configs.check(config)
    recipe = load(name)
    if run.engine.sharded and not hasattr(recipe, "FSDP2"):
        raise UserError(f"{name} does not run under FSDP2 (docs/running.md); use --engine ddp.", code=2)
    given = {"recipe": name, "arm": arm, "seed": run.seed, "precision": run.engine.precision, "config": configs.flatten(config)}
    given = json.loads(json.dumps(given, default=str))
    before = read_config(run.folder)
    if before is not None:
        _refuse_other(before, given, run.folder)
    elif not run.rank:
        write_atomic(run.folder / "config.json", json.dumps(given, indent=1))
    done = run.folder / "result.json"
    if done.exists():
        return read_result(run.folder)
    metrics = recipe.main(config, run, **keywords)
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


def read_result(folder: Path) -> dict[str, Any]:
    """A finished run's result.json. UserError when there is none, or when it is damaged."""
    file = folder / "result.json"
    if not file.exists():
        raise UserError(f"{folder} holds no finished run (no result.json); continue it with its `stillroom run` command first.")
    try:
        found = json.loads(file.read_text())
    except ValueError:
        found = None
    shape = {
        "recipe": str,
        "arm": str | None,
        "seed": int,
        "precision": str,
        "config": dict,
        "metrics": dict,
        "rows": list,
        "seconds": float | int,
    }
    if not isinstance(found, dict) or not all(key in found and isinstance(found[key], kind) for key, kind in shape.items()):
        raise UserError(f"{file} is damaged. Delete it, and give the run's command again: its checkpoints are still there.")
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
