"""Claims: a paper's sentences as numbers that can come out wrong, and the ledger of how they came out here.

`verify` runs every arm of a recipe over the same seeds and judges each claim by the 95 % interval of the paired difference
(Student's t): it *holds* when the whole interval lies beyond the margin, *fails* when the whole interval lies short of it, and
is *undecided* otherwise. Every arm, seed and metric is written down, whatever the verdict.
"""

from __future__ import annotations

import functools
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any, Literal

from stillroom.catalogue import cards
from stillroom.catalogue.closure import code_of
from stillroom.catalogue.execute import execute
from stillroom.catalogue.idle import some_flags_idle
from stillroom.core import config as configs
from stillroom.core.errors import UserError, needs

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

    from stillroom.core.store import fingerprint

    recipe = cards.load(name)
    code = code_of(Path(recipe.__file__))
    chosen = range(first_seed, first_seed + seeds)
    work, parent = [], os.getpid() if backend == "loky" else None
    for arm in recipe.ARMS:
        config = cards.config_of(recipe, arm, configs.override(recipe.Config(), changes or {}))
        # Named by what it ran, so that changed code or a changed config never meets old results.
        place = folder / name / f"{arm}-{fingerprint(code, config)[:8]}"
        work += [(arm, seed, joblib.delayed(_arm_seed)(name, arm, config, seed, place / f"seed{seed}", cache, parent)) for seed in chosen]
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
        "source": code,
        **{k: v for k, v in results[0][2].items() if k in ("versions", "processor")},
        # Several, if there was a commit between interrupted verifications.
        "commit": ", ".join(dict.fromkeys(result["commit"] for _, _, result in results if result["commit"])) or None,
    }


def _arm_seed(name: str, arm: str, config: Any, seed: int, folder: Path, cache: Path | None, parent: int | None) -> dict[str, Any]:
    import torch

    from stillroom.core.run import Run
    from stillroom.core.store import Store

    if parent not in (None, os.getpid()):
        _end_with(parent)
    torch.set_num_threads(1)
    with some_flags_idle(), Run(folder, seed, store=Store(cache), plots=False) as run:
        return execute(name, config, run, arm=arm)


@functools.cache
def _end_with(parent: int) -> None:
    """Let this worker process end when its parent was killed, rather than hold the folder of its run until that is done."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
