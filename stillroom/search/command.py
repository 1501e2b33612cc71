"""`stillroom search NAME`: search the flags of a recipe, and say what came of it."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from stillroom.catalogue import cards, report
from stillroom.core import config as configs
from stillroom.core.config import Count, Natural, Positive, Seed
from stillroom.core.errors import UserError
from stillroom.core.store import write_atomic
from stillroom.search.archive import Archive
from stillroom.search.configs import Mutate, Propose, Seeds, flags_of, middle, server
from stillroom.search.loop import Found, search
from stillroom.search.picture import tree
from stillroom.search.policies import POLICIES
from stillroom.search.sandbox import Limits
from stillroom.search.workers import Report, guarded, processes


@dataclasses.dataclass(frozen=True)
class Options:
    """What a search takes; the recipe's own flags are given as --config.FLAG and hold for every agent that does not change them."""

    budget: Count = 200
    """Evaluations: runs of the recipe with one config and one seed. The start config's own runs come on top."""
    tasks: Count = 12
    """Seeds that a config can be tried on, 0 to TASKS - 1."""
    metric: str | None = None
    """Which metric of the recipe; default: that of its first claim."""
    better: Literal["higher", "lower"] | None = None
    """Which way is better; default: as in the first claim on this metric."""
    threshold: float | None = None
    """A run passes when its metric is at least this good; default: the median of the start config over the tasks."""
    tune: tuple[str, ...] = ()
    """Flags that may change; default: all choices, switches and numbers with a fraction."""
    arm: str | None = None
    """The arm to start from; default: the method's."""
    policy: Literal["hgm", "own-score", "dgm", "greedy", "random"] = "hgm"
    """Which config to change and which to test; random draws every flag anew and tests it on all seeds."""
    proposer: str = "mutate"
    """What changes configs: `mutate`, or a language model as openai:URL#MODEL (its key in $OPENAI_API_KEY)."""
    fresh: Natural = 0
    """Seeds that the search never saw, on which start and result are compared at the end; default: as many as tasks."""
    seed: Seed = 0
    """Of the search's own draws."""
    workers: Count = 2
    """Runs at the same time, each on one thread."""
    seconds: Positive = 3600.0
    """Time limit of one run; a run that takes longer is a failed task."""
    out: Path | None = None
    """Folder of the journal and the report; a search that was stopped is continued there. Default: runs/search-NAME."""
    runs: Path | None = None
    """Folder of the runs themselves, which searches may share; default: OUT/runs."""
    cache: Path | None = None
    """The store; default: $STILLROOM_CACHE, else the platform's cache folder."""


def main(name: str, args: list[str]) -> None:
    """Parse the flags, search, print and write what was found."""
    recipe = cards.load(name)
    fields: list[Any] = [("options", Annotated[Options, tyro.conf.arg(name="")]), ("config", recipe.Config)]
    kind: Any = dataclasses.make_dataclass("Flags", fields, namespace={"__doc__": f"Search the flags of {name}.\n\n{Options.__doc__}"})
    flags = tyro.cli(kind, args=args, default=kind(Options(), recipe.Config()), prog=f"stillroom search {name}")
    configs.check(flags.options)
    configs.check(flags.config)
    tuned(name, flags.options, flags.config)


def tuned(name: str, options: Options, config: Any) -> Found:
    """Search from `config`; journal.jsonl and report.html in the out folder. UserError when the start config itself cannot run."""
    recipe = cards.load(name)
    arm = options.arm or (recipe.CLAIMS[0].arm if recipe.CLAIMS else next(iter(recipe.ARMS)))
    base = cards.config_of(recipe, arm, config)
    flags = tuple(flags_of(base, options.tune))
    metric, better = _goal(recipe, options)
    host = server(options.proposer) if options.proposer != "mutate" else None
    out = options.out or Path("runs") / f"search-{name}"
    measure = Seeds(name, arm, base, metric, better, math.nan, options.runs or out / "runs", options.cache)
    threshold = options.threshold if options.threshold is not None else middle(_start(measure, options))
    evaluate = dataclasses.replace(measure, threshold=threshold)
    goal = f"{metric} of at {'least' if better == 'higher' else 'most'} {threshold:.4g} on as many seeds as possible"
    modify: Any = Mutate(base, flags, anywhere=options.policy == "random")
    if host:
        modify = Propose(base, flags, (recipe.__doc__ or name).strip(), goal, *host)
    print(f"{name} ({arm}): {goal}; changing {', '.join(flag.name for flag in flags)}")
    with _bar(options) as bar:
        found = search(
            {},
            modify,
            evaluate,
            range(options.tasks),
            options.budget,
            policy=POLICIES[options.policy],
            seed=options.seed,
            workers=options.workers,
            limits=Limits(seconds=options.seconds),
            journal=out / "journal.jsonl",
            about={
                "goal": goal,
                "recipe": name,
                "start": configs.flatten(base),
                "tune": [flag.name for flag in flags],
                "by": options.proposer,
            },
            watch=lambda archive: _tick(bar, archive),
        )
    _conclude(found, evaluate, options, out, goal)
    return found


def _goal(recipe: Any, options: Options) -> tuple[str, Literal["higher", "lower"]]:
    if options.metric is None and not recipe.CLAIMS:
        raise UserError("this recipe makes no claim that could name the metric: give --metric and --better.", code=2)
    metric = options.metric or recipe.CLAIMS[0].metric
    claimed = [claim.better for claim in recipe.CLAIMS if claim.metric == metric]
    if options.better is None and not claimed:
        raise UserError(f"no claim says which way {metric} is better: give --better higher or --better lower.", code=2)
    return metric, options.better or claimed[0]


def _start(measure: Seeds, options: Options) -> list[float]:
    """The start config's metric on every task. UserError when it cannot run or lacks the metric."""
    reports = _measured(measure.measure, {}, range(options.tasks), options)
    for seed, result in enumerate(reports):
        if result.error:
            raise UserError(f"the start config failed at seed {seed}: {result.error}")
    return [result.value for result in reports]


def _measured(call: Callable[..., Any], artefact: dict[str, Any], seeds: Sequence[int], options: Options) -> list[Report]:
    pool = processes(options.workers)
    limits = Limits(seconds=options.seconds)
    return [future.result() for future in [pool.submit(guarded, call, (artefact, seed), limits) for seed in seeds]]


def _bar(options: Options) -> Any:
    from tqdm import tqdm

    return tqdm(total=options.budget, desc="evaluations", disable=None, leave=False)


def _tick(bar: Any, archive: Archive) -> None:
    bar.n = archive.finished
    bar.set_postfix_str(f"{len(archive.agents)} configs, {archive.failed_modifications} failed modifications")


def _conclude(found: Found, evaluate: Seeds, options: Options, out: Path, goal: str) -> None:
    """Compare start and result on fresh seeds; print, and write report.html."""
    seeds = range(options.tasks, options.tasks + (options.fresh or options.tasks))
    rows = []
    for label, agent in (("start", 0), ("found", found.best)):
        node = found.archive.agents[agent]
        values = [result.value for result in _measured(evaluate.measure, node.artefact, seeds, options) if not result.error]
        tried = node.passed + node.failed
        row = {"name": label, "passed": node.passed / tried, "tried": tried}
        rows.append(row | ({f"{evaluate.metric} on {len(values)} fresh seeds": statistics.fmean(values)} if values else {}))
    archive = found.archive
    text = (
        f"A search over the flags of {evaluate.recipe}\n\nGoal: {goal}. Policy {options.policy}, changes by {options.proposer}; "
        f"{len(archive.agents)} configs, {archive.finished} evaluations, {archive.failed_modifications} failed modifications. "
        f"{found.reason}\n\n" + "".join(f"  {key} = {value}\n" for key, value in found.artefact.items())
    )
    (out / "samples").mkdir(parents=True, exist_ok=True)
    write_atomic(out / "samples" / "tree.html", tree(archive, found.best))
    result = _measured(evaluate.run, found.artefact, [0], options)[0]
    write_atomic(out / "report.html", report.page(text, rows, [("search", out)], [] if result.error else [result.value]))
    report.print_table(rows)
    if found.reason:
        print(found.reason)
    print(
        "found: "
        + (" ".join(f"--{key.replace('_', '-')} {value}" for key, value in found.artefact.items()) or "nothing better than the start")
    )
    print(f"report: {out / 'report.html'}")
