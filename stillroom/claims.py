"""Claims: a paper's sentences as numbers that can come out wrong, and the ledger of how they came out here.

`verify` runs every arm of a recipe over the same seeds and judges each claim by the 95 % interval of the paired difference
(Student's t): it *holds* when the whole interval lies beyond the margin, *fails* when the whole interval lies short of it, and
is *undecided* otherwise. Every arm, seed and metric is written down, whatever the verdict.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any, Literal

from stillroom import catalogue
from stillroom.errors import UserError, needs

Verdict = Literal["holds", "fails", "undecided"]


@dataclass(frozen=True)
class Claim:
    """`metric` of `arm` is better than that of `versus` (an arm, or a fixed number) by more than `margin`.

    A negative margin states "no worse than by". `paper` quotes what the paper reports, for the reader to set beside our figures.
    """

    text: str
    metric: str
    arm: str
    versus: str | float
    better: Literal["lower", "higher"] = "higher"
    margin: float = 0.0
    paper: str = ""


def judge(differences: Sequence[float], margin: float = 0.0) -> tuple[float, float, float, Verdict]:
    """Mean, 95 % interval and verdict of paired differences, larger being better. One pair decides nothing; one that is not finite
    fails."""
    if not all(map(math.isfinite, differences)):
        return math.nan, -math.inf, math.inf, "fails"
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, -math.inf, math.inf, "undecided"
    from scipy.stats import t

    half = float(t.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences) / math.sqrt(len(differences))
    low, high = mean - half, mean + half
    return mean, low, high, "holds" if low > margin else "fails" if high <= margin else "undecided"


def outcome(claim: Claim, results: Mapping[str, Sequence[Mapping[str, float | None]]]) -> dict[str, Any]:
    """The claim's ledger record from the metrics of each arm, seed by seed; None is a metric that is not finite."""

    def values(arm: str) -> list[float]:
        return [math.nan if (value := m[claim.metric]) is None else value for m in results[arm]]

    mine = values(claim.arm)
    theirs = values(claim.versus) if isinstance(claim.versus, str) else [claim.versus] * len(mine)
    sign = 1.0 if claim.better == "higher" else -1.0
    mean, low, high, verdict = judge([sign * (a - b) for a, b in zip(mine, theirs, strict=True)], claim.margin)
    numbers = {"difference": mean, "low": low, "high": high}
    return {**claim.__dict__, **{k: v if math.isfinite(v) else None for k, v in numbers.items()}, "verdict": verdict}


def verify(
    name: str,
    seeds: int = 5,
    jobs: int = 1,
    *,
    first_seed: int = 0,
    folder: Path = Path("runs/verify"),
    cache: Path | None = None,
    backend: str = "loky",
    changes: dict[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run all arms of a recipe over `seeds` seeds from `first_seed` on; the ledger entry. What an interrupted verification finished is
    not run again.

    jobs: arm-seeds at once, each on one thread. backend: joblib's "loky" (processes here), "ray" or "dask" (a cluster).
    changes: overrides of every arm's config, by dotted name (a smaller size for a test, say).
    """
    import joblib

    from stillroom.store import fingerprint

    recipe = catalogue.load(name)
    source = Path(recipe.__file__).read_text()
    code = fingerprint(source, *(file.read_text() for file in sorted(Path(__file__).parent.rglob("*.py"))))
    chosen = range(first_seed, first_seed + seeds)
    work = []
    for arm in recipe.ARMS:
        config = catalogue.config_of(recipe, arm, catalogue.configs.override(recipe.Config(), changes or {}))
        # Named by what it ran, so that changed code or a changed config never meets old results.
        place = folder / name / f"{arm}-{fingerprint(code, config)[:8]}"
        work += [(arm, seed, joblib.delayed(_arm_seed)(name, arm, config, seed, place / f"seed{seed}", cache)) for seed in chosen]
    work.sort(key=lambda item: item[1])  # seed by seed, so that an early look shows whole pairs
    if backend == "ray":
        needs("ray.util.joblib", "ray", "--backend ray").register_ray()
    if backend == "dask" and util.find_spec("distributed") is None:
        raise UserError("--backend dask needs dask: pip install 'dask[distributed]'", code=2)
    with joblib.parallel_config(backend=backend, n_jobs=jobs):
        if backend == "loky":
            stream = joblib.Parallel(return_as="generator")(call for _, _, call in work)
        else:
            stream = joblib.Parallel()(call for _, _, call in work)
        results = []
        for (arm, seed, _), result in zip(work, stream, strict=True):
            results.append((arm, seed, result))
            if progress:
                progress(f"{name} {arm} seed {seed}: {result['seconds']:.1f} s")
    by_arm = {arm: [(seed, result) for a, seed, result in results if a == arm] for arm in recipe.ARMS}
    metrics = {arm: [result["metrics"] for _, result in runs] for arm, runs in by_arm.items()}
    return {
        "recipe": name,
        "claims": [outcome(claim, metrics) for claim in recipe.CLAIMS],
        "seeds": seeds,
        "first_seed": first_seed,
        "changes": changes or {},
        "arms": {
            arm: {
                "config": recipe.ARMS[arm],
                "seconds": round(statistics.fmean(result["seconds"] for _, result in runs), 1),
                "metrics": {str(seed): result["metrics"] for seed, result in runs},
            }
            for arm, runs in by_arm.items()
        },
        "source": fingerprint(source),
        **{k: v for k, v in results[0][2].items() if k in ("versions", "processor")},
        # Several, if there was a commit between interrupted verifications.
        "commit": ", ".join(dict.fromkeys(result["commit"] for _, _, result in results if result["commit"])) or None,
    }


def _arm_seed(name: str, arm: str, config: Any, seed: int, folder: Path, cache: Path | None) -> dict[str, Any]:
    import torch

    from stillroom.run import Run
    from stillroom.store import Store

    torch.set_num_threads(1)
    with Run(folder, seed, store=Store(cache), plots=False) as run:
        return catalogue.execute(name, config, run, arm=arm)


FRESH = "fresh-seeds"


def ledger_folder() -> Path:
    """Where ledgers are written: this checkout's `ledger/`, or `./ledger` when Stillroom is an installed package."""
    checkout = Path(__file__).parents[1] / "ledger"
    return checkout if (checkout.parent / "pyproject.toml").exists() else Path("ledger")


def read_ledger(folder: Path | None = None, *, fresh: bool = False) -> dict[str, dict[str, Any]]:
    """Ledger entries by recipe: those that came with the package, and those in `folder` over them; or those from fresh seeds."""
    entries = {}
    for place in (Path(__file__).parent / "ledger", folder or ledger_folder()):
        for file in sorted((place / FRESH if fresh else place).glob("*.json")):
            entries[file.stem] = json.loads(file.read_text())
    return entries


def write_ledger(entry: dict[str, Any], folder: Path | None = None) -> Path:
    """NAME.json, or FRESH/NAME.json when the seeds did not start at 0: what the ledger says is only replaced on its own seeds."""
    from stillroom.store import write_atomic

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
    """docs/ledger.md: per recipe its claims, paper beside ours, and the means of every arm; beside each claim its verdict on fresh seeds
    where there is one."""
    lines = [
        "# The ledger",
        "",
        "Written by `stillroom ledger` from `ledger/*.json`, which `stillroom verify` writes. *Difference* is the mean paired difference "
        "in the claimed direction with its 95 % interval; a claim *holds* when the whole interval lies beyond the margin. *Fresh seeds*: "
        "the same on others, by which nothing was chosen (`stillroom verify NAME --first-seed 5`).",
    ]
    for name, entry in entries.items():
        lines += ["", f"## {name}", "", f"{entry['seeds']} seeds, {entry['processor']}, torch {entry['versions']['torch']}.", ""]
        again = {c["text"]: c for c in (fresh or {}).get(name, {}).get("claims", [])}
        lines += ["| claim | metric | arm | versus | difference | margin | verdict | fresh seeds | paper |", "|---" * 9 + "|"]
        for c in entry["claims"]:
            versus = c["versus"] if isinstance(c["versus"], str) else number(c["versus"])
            cells = [c["text"], f"{c['metric']} ({c['better']})", c["arm"], versus, interval(c), number(c["margin"]), f"**{c['verdict']}**"]
            cells += [f"{other['verdict']}, {interval(other)}" if (other := again.get(c["text"])) else "", c["paper"]]
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
