"""The ledger: the committed record of claims checked, one file a recipe, and the page written from it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from importlib import util
from pathlib import Path
from typing import Any

from stillroom.catalogue import cards
from stillroom.catalogue.closure import code_of

FRESH = "fresh-seeds"


def ledger_folder() -> Path:
    """Where ledgers are written: this checkout's `ledger/`, or `./ledger` when Stillroom is an installed package."""
    checkout = Path(__file__).parents[2] / "ledger"
    return checkout if (checkout.parent / "pyproject.toml").exists() else Path("ledger")


def read_ledger(folder: Path | None = None, *, fresh: bool = False) -> dict[str, dict[str, Any]]:
    """Ledger entries by recipe: those that came with the package, and those in `folder` over them; or those from fresh seeds."""
    entries = {}
    for place in (Path(__file__).parents[1] / "ledger", folder or ledger_folder()):
        for file in sorted((place / FRESH if fresh else place).glob("*.json")):
            entries[file.stem] = json.loads(file.read_text())
    return entries


def deciding(folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """By recipe the entry whose verdicts count: that of fresh seeds, by which nothing was chosen, where there is one."""
    return {**read_ledger(folder), **read_ledger(folder, fresh=True)}


def stale(folder: Path | None = None) -> list[str]:
    """Entries, as NAME or FRESH/NAME, that other code than today's made: the recipe, or something that it rests on, has changed since."""
    first, fresh = read_ledger(folder), read_ledger(folder, fresh=True)
    today = {name: _code(name) for name in {*first, *fresh}}
    found = [name for name, entry in first.items() if entry.get("source") != today[name]]
    return found + [f"{FRESH}/{name}" for name, entry in fresh.items() if entry.get("source") != today[name]]


def _code(name: str) -> str:
    """The digest of a recipe's code as it is; "" for a recipe that the catalogue lacks."""
    spec = util.find_spec(cards.cards()[name].module) if name in cards.cards() else None
    return code_of(Path(spec.origin)) if spec is not None and spec.origin is not None else ""


def write_ledger(entry: dict[str, Any], folder: Path | None = None) -> Path:
    """NAME.json, or FRESH/NAME.json when the seeds did not start at 0: what the ledger says is only replaced on its own seeds."""
    from stillroom.core.store import write_atomic  # with torch, which reading does without

    folder = (folder or ledger_folder()) / (FRESH if entry["first_seed"] else "")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{entry['recipe']}.json"
    write_atomic(file, json.dumps(entry, indent=1, default=float) + "\n")
    return file


def number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def interval(claim: Mapping[str, Any]) -> str:
    """A claim's mean difference with its 95 % interval, for people."""
    low = "-∞" if claim["low"] is None else number(claim["low"])
    high = "∞" if claim["high"] is None else number(claim["high"])
    return f"{number(claim['difference'])} [{low}, {high}]"


def as_markdown(entries: dict[str, dict[str, Any]], fresh: dict[str, dict[str, Any]] | None = None) -> str:
    """docs/ledger.md: per recipe its claims, paper beside ours, and the means of every arm. Where there are fresh seeds they give the
    verdict and the means, and the first ones stand beside it."""
    lines = [
        "# The ledger",
        "",
        "Written by `stillroom ledger` from `ledger/*.json`, which `stillroom verify` writes. *Difference* is the mean paired difference "
        "in the claimed direction with its 95 % interval; a claim *holds* when the whole interval lies beyond the margin. The verdict is "
        "that of fresh seeds, by which nothing was chosen (`stillroom verify NAME --first-seed 5`); *first seeds* are those that settings "
        "were chosen on. A recipe without fresh seeds shows the first ones, and says so.",
    ]
    for name in sorted({*entries, *(fresh or {})}):
        first, again = entries.get(name, {}), (fresh or {}).get(name, {})
        entry, other = (again, first) if again else (first, {})
        beside = {claim["text"]: claim for claim in other.get("claims", [])}
        seeds = f"{entry['seeds']} fresh seeds from {entry['first_seed']}" if again else f"{entry['seeds']} seeds, none of them fresh"
        lines += ["", f"## {name}", "", f"{seeds}, {entry['processor']}, torch {entry['versions']['torch']}.", ""]
        lines += ["| claim | metric | arm | versus | difference | margin | verdict | first seeds | paper |", "|---" * 9 + "|"]
        for c in entry["claims"]:
            versus = c["versus"] if isinstance(c["versus"], str) else number(c["versus"])
            cells = [c["text"], f"{c['metric']} ({c['better']})", c["arm"], versus, interval(c), number(c["margin"]), f"**{c['verdict']}**"]
            cells += [f"{o['verdict']}, {interval(o)}" if (o := beside.get(c["text"])) else "", c["paper"]]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        names = list(dict.fromkeys(k for arm in entry["arms"].values() for m in arm["metrics"].values() for k in m))
        lines += ["", "| arm | " + " | ".join(names) + " | seconds |", "|---|" + "---|" * (len(names) + 1)]
        for arm, record in entry["arms"].items():
            columns = [[m[k] for m in record["metrics"].values() if k in m] for k in names]
            cells = [_spread(column) for column in columns]
            lines.append(f"| {arm} | " + " | ".join(cells) + f" | {record['seconds']} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float | None]) -> str:
    finite = [value for value in values if value is not None]
    if len(finite) < len(values):
        return "not finite"
    return f"{statistics.fmean(finite):.4g} ± {statistics.stdev(finite) if len(finite) > 1 else 0:.2g}" if finite else ""
