"""The search itself: ask the policy, run the job, enter the result, until the budget is spent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stillroom.core.errors import UserError
from stillroom.search.archive import Action, Archive, Evaluate, Expand, Log
from stillroom.search.journal import Journal
from stillroom.search.policies import Policy, best_belief, hgm
from stillroom.search.sandbox import Limits
from stillroom.search.workers import Report, attempt, guarded, processes

Modify = Callable[[Any, Log, int], Any]
"""(artefact, log, seed) -> another artefact. None, an equal artefact or an exception is a failed modification."""
Evaluation = Callable[[Any, Any], Any]
"""(artefact, task) -> passed, or (passed, note). An exception or anything that is not 0, 1, True or False is a failed task."""


class Job(NamedTuple):
    """One thing to do, and the seed of the agent that it may give birth to."""

    number: int
    action: Action
    seed: int


@dataclass(frozen=True)
class Found:
    """What a search ends with."""

    archive: Archive
    best: int
    """The best-belief agent: highest 1st percentile of the posterior on its own evaluations."""
    reason: str
    """Why the search ended before its budget was spent; empty when it did not."""

    @property
    def artefact(self) -> Any:
        return self.archive.agents[self.best].artefact


def search(
    root: Any,
    modify: Modify,
    evaluate: Evaluation,
    tasks: Sequence[Any],
    budget: int,
    *,
    policy: Policy = hgm,
    seed: int = 0,
    workers: int = 0,
    limits: Limits = Limits(),
    journal: str | Path | None = None,
    executor: Executor | None = None,
    patience: int = 20,
    about: Any = None,
    watch: Callable[[Archive], Any] | None = None,
) -> Found:
    """Grow a tree of modified copies of `root`; `budget` evaluations, the root's own pass over all `tasks` on top.

    With `workers=0` every job runs here, one after the other, without limits: for functions that are fast and trusted. Otherwise that
    many jobs run at the same time in worker processes (`executor`, by default joblib's), each under `limits`, and each decision is
    made with the newest counts. `journal` is a JSONL file from which the same call continues; artefacts must then be JSON, and so must
    `about`, which says what else makes this search the same (the functions cannot be compared). `watch(archive)` is
    called after each result. Modification k of an agent gets the same seed whatever the policy did before, so that policies with the
    same `seed` are paired.

    Raises UserError for a budget or task list that is empty, and for a journal that is taken, damaged or of another search.
    """
    if budget < 1 or not len(tasks):
        raise UserError(f"A search needs at least one task and a budget of at least 1 evaluation; it got {len(tasks)} and {budget}.")
    header = {
        "tasks": len(tasks),
        "tasks_digest": _digest(tasks),
        "seed": seed,
        "policy": _name(policy),
        "patience": patience,
        "root": root,
        "about": about,
    }
    with closing(Journal(journal, header)) if journal is not None else nullcontext() as book:
        state = _State(Archive(len(tasks), budget, patience), seed, book)
        state.archive.add(root, None, seed)
        state.replay()
        if workers == 0:
            _here(state, modify, evaluate, tasks, policy, watch)
        else:
            _in_processes(state, modify, evaluate, tasks, policy, watch, workers, limits, executor)
        return Found(state.archive, best_belief(state.archive), _reason(state))


@dataclass
class _State:
    """The archive, and the journal that it can be rebuilt from."""

    archive: Archive
    seed: int
    journal: Journal | None
    jobs: int = 0
    open: dict[int, Job] = field(default_factory=dict)
    error: str = ""
    """What the last failed modification said."""

    def book(self, action: Action) -> Job:
        parent = self.archive.agents[action.parent] if isinstance(action, Expand) else None
        job = Job(self.jobs, action, child_seed(parent.seed, parent.attempts) if parent else 0)
        self.jobs += 1
        self.open[job.number] = job
        self.archive.start(action)
        return job

    def start(self, action: Action) -> Job:
        if self.journal is not None:
            what: dict[str, Any] = {"expand": action.parent} if isinstance(action, Expand) else {"evaluate": list(action)}
            self.journal.write({"job": self.jobs, **what})
        return self.book(action)

    def enter(self, job: Job, *, child: Any = None, passed: bool = False, note: str = "") -> None:
        del self.open[job.number]
        self.archive.finish(job.action, child=child, seed=job.seed, passed=passed, note=note)
        if isinstance(job.action, Expand) and child is None:
            self.error = note

    def finish(self, job: Job, report: Report) -> None:
        if isinstance(job.action, Expand):
            child, note = _child(report, self.archive.agents[job.action.parent].artefact, as_json=self.journal is not None)
            result: dict[str, Any] = {"child": child, "note": note}
        else:
            passed, note = _passed(report)
            result = {"passed": passed, "note": note}
        if self.journal is not None:
            self.journal.write({"job": job.number, **result})
        self.enter(job, **result)

    def replay(self) -> None:
        """Rebuild the archive from the journal's lines."""
        for line in self.journal.lines if self.journal is not None else []:
            if "expand" in line:
                self.book(Expand(line["expand"]))
            elif "evaluate" in line:
                self.book(Evaluate(*line["evaluate"]))
            else:
                self.enter(self.open[line["job"]], **{key: value for key, value in line.items() if key != "job"})

    def ask(self, policy: Policy) -> Job | None:
        """The next job: first the root on every task, then what the policy says. None: nothing can start now."""
        archive = self.archive
        root = archive.agents[0]
        if root.untried:
            return self.start(Evaluate(0, root.untried[0]))
        if len(root.trials) < archive.tasks or archive.submitted >= archive.budget:
            return None
        action = policy(archive, np.random.default_rng((self.seed, self.jobs)))
        return None if action is None else self.start(action)

    def call(self, job: Job, modify: Modify, evaluate: Evaluation, tasks: Sequence[Any]) -> tuple[Callable[..., Any], tuple]:
        if isinstance(job.action, Expand):
            return modify, (self.archive.agents[job.action.parent].artefact, self.archive.log(job.action.parent), job.seed)
        return evaluate, (self.archive.agents[job.action.agent].artefact, tasks[job.action.task])


def _here(state: _State, modify: Modify, evaluate: Evaluation, tasks: Sequence, policy: Policy, watch: Callable | None) -> None:
    left = list(state.open.values())
    while (job := left.pop(0) if left else state.ask(policy)) is not None:
        state.finish(job, attempt(*state.call(job, modify, evaluate, tasks)))
        if watch:
            watch(state.archive)


def _in_processes(
    state: _State,
    modify: Modify,
    evaluate: Evaluation,
    tasks: Sequence,
    policy: Policy,
    watch: Callable | None,
    workers: int,
    limits: Limits,
    executor: Executor | None,
) -> None:
    pool = executor or processes(workers)
    running: dict[Future, Job] = {}
    left = list(state.open.values())
    try:
        while True:
            while len(running) < workers and (job := left.pop(0) if left else state.ask(policy)) is not None:
                running[pool.submit(guarded, *state.call(job, modify, evaluate, tasks), limits)] = job
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                state.finish(running.pop(future), future.result())
                if watch:
                    watch(state.archive)
    except BrokenExecutor as error:
        raise UserError(f"A worker process was killed from outside ({error}). With a journal, the same command continues.") from error
    except BaseException:
        for future in running:
            future.cancel()
        if executor is None:
            pool.shutdown(wait=False, kill_workers=True)  # type: ignore[call-arg]
        raise


def _passed(report: Report) -> tuple[bool, str]:
    if report.error:
        return False, report.error
    value = report.value
    passed, note = value if isinstance(value, tuple) and len(value) == 2 else (value, "")
    if not isinstance(passed, bool | int | float | np.bool_ | np.integer) or passed not in (0, 1):
        return False, f"evaluate returned {value!r:.80}, which is neither 0, 1, True, False nor (passed, note)"
    return bool(passed), str(note)


def _child(report: Report, parent: Any, *, as_json: bool) -> tuple[Any, str]:
    if report.error:
        return None, report.error
    child = report.value
    if as_json:
        try:
            child = json.loads(json.dumps(child, allow_nan=False))
        except (TypeError, ValueError) as error:
            return None, f"modify returned {report.value!r:.80}, which is not JSON ({error})"
    return (None, "modify changed nothing") if child is None or _same(child, parent) else (child, "")


def _same(child: Any, parent: Any) -> bool:
    try:
        return child is parent or bool(child == parent)
    except Exception:  # artefacts that cannot be compared, arrays for one
        return False


def _reason(state: _State) -> str:
    archive = state.archive
    if archive.finished >= archive.budget:
        return ""
    if archive.agents[0].passed == 0:
        return f"The root passed none of its {archive.tasks} tasks: with no success to follow, start from a better root or easier tasks."
    if archive.exhausted:
        return f"The last {archive.failed_in_a_row} modifications failed, the last one with: {state.error}"
    return "Every agent was tested on every task, and the policy asked for no other."


def child_seed(parent: int, attempt: int) -> int:
    """The seed of an agent's modification number `attempt`: a hash of its place in the tree."""
    return int.from_bytes(hashlib.blake2b(f"{parent}.{attempt}".encode(), digest_size=7).digest(), "big")


def _digest(tasks: Sequence[Any]) -> str:
    text = json.dumps(list(tasks), default=lambda task: type(task).__qualname__)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _name(policy: Any) -> str:
    bound = getattr(policy, "keywords", {})
    name = getattr(getattr(policy, "func", policy), "__name__", type(policy).__name__)
    return name + (f"({', '.join(f'{key}={value!r}' for key, value in sorted(bound.items()))})" if bound else "")
