"""The state of a search over agents: who descends from whom, and how often each passed.

An *agent* is anything that can be modified and tested: a prompt, a config, a program. Its clade is the agent and all its
descendants. All counts are integers, changed by `Archive.finish` alone; clade sums are taken bottom-up when asked for.

Conventions, stated because small budgets feel them (the paper leaves them open; the released code of Wang et al. 2025 decides them so):
- N, the evaluations done, and the budget B leave out the root's own first pass over the task list;
- |T| - 1, the size compared with N**alpha, leaves out the root and counts modifications still under way;
- an agent meets each task at most once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Expand(NamedTuple):
    """Ask `parent` for a modified copy of itself."""

    parent: int


class Evaluate(NamedTuple):
    """Try `agent` on one task."""

    agent: int
    task: int


Action = Expand | Evaluate


class Trial(NamedTuple):
    """One finished evaluation, as a modification gets to see it. `note` is what the evaluation said, or its error."""

    task: int
    passed: bool
    note: str


class Log(NamedTuple):
    """What a modification may look at: the trials of the agent to modify, and the archive that it belongs to."""

    trials: list[Trial]
    agents: list[tuple[int | None, Any, int, int]]
    """One (parent, artefact, passed, failed) per agent of the search so far, the root first."""
    agent: int
    """Which of them is to be modified."""


@dataclass
class Agent:
    """One node of the tree."""

    artefact: Any
    parent: int | None
    seed: int
    """Names this agent's place in the tree: its k-th modification draws from (seed, k), whatever the policy did elsewhere."""
    untried: list[int]
    trials: list[Trial] = field(default_factory=list)
    passed: int = 0
    failed: int = 0
    children: int = 0
    attempts: int = 0
    """Modifications started from this agent, the failed ones included."""


@dataclass
class Archive:
    """Agents in the order of their birth, so that a parent always comes before its children."""

    tasks: int
    budget: int
    patience: int = 20
    """After so many failed modifications in a row no more are asked for."""
    agents: list[Agent] = field(default_factory=list)
    submitted: int = 0
    """Evaluations asked for, the root's first pass left out."""
    finished: int = 0
    """N: those of them that have reported."""
    expanding: int = 0
    failed_modifications: int = 0
    failed_in_a_row: int = 0

    def add(self, artefact: Any, parent: int | None, seed: int) -> int:
        """Add an agent without evaluations; its number."""
        self.agents.append(Agent(artefact, parent, seed, list(range(self.tasks))))
        if parent is not None:
            self.agents[parent].children += 1
        return len(self.agents) - 1

    def start(self, action: Action) -> None:
        """Book a job that is about to run."""
        if isinstance(action, Expand):
            self.agents[action.parent].attempts += 1
            self.expanding += 1
        else:
            self.agents[action.agent].untried.remove(action.task)
            self.submitted += action.agent > 0

    def finish(self, action: Action, *, child: Any = None, seed: int = 0, passed: bool = False, note: str = "") -> None:
        """Enter the result of a started job; for a modification, `child` is the new artefact or None when it failed."""
        if isinstance(action, Expand):
            self.expanding -= 1
            if child is None:
                self.failed_modifications += 1
                self.failed_in_a_row += 1
            else:
                self.failed_in_a_row = 0
                self.add(child, action.parent, seed)
        else:
            agent = self.agents[action.agent]
            agent.trials.append(Trial(action.task, passed, note))
            agent.passed += passed
            agent.failed += not passed
            self.finished += action.agent > 0

    @property
    def exhausted(self) -> bool:
        """So many modifications failed in a row that asking for more is pointless."""
        return self.failed_in_a_row >= self.patience

    def counts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Each agent's own (passed, failed)."""
        both = np.array([(agent.passed, agent.failed) for agent in self.agents], dtype=np.int64)
        return both[:, 0], both[:, 1]

    def clade_counts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(passed, failed) of each agent together with all its descendants: n_s^C and n_f^C."""
        passed = [agent.passed for agent in self.agents]
        failed = [agent.failed for agent in self.agents]
        for child in range(len(self.agents) - 1, 0, -1):
            parent = self.agents[child].parent
            assert parent is not None
            passed[parent] += passed[child]
            failed[parent] += failed[child]
        return np.array(passed), np.array(failed)

    def log(self, agent: int) -> Log:
        """What a modification of `agent` may look at."""
        others = [(a.parent, a.artefact, a.passed, a.failed) for a in self.agents]
        return Log(list(self.agents[agent].trials), others, agent)

    def lineage(self, agent: int) -> list[int]:
        """The root, ..., `agent`."""
        path: list[int] = []
        step: int | None = agent
        while step is not None:
            path.append(step)
            step = self.agents[step].parent
        return path[::-1]
