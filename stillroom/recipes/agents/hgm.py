"""HGM: agents that rewrite themselves, chosen by the success of their whole lineage (Wang, Piękos et al. 2025, arXiv 2510.21614).

    modify   a ~ Thompson sampling on the clade's counts:  Beta(tau (1 + n_s^C(a)), tau (1 + n_f^C(a))),  tau = B / b
    test     a ~ Thompson sampling on its own counts;  modify rather than test while N^0.6 >= |T| - 1
    return   the highest 1st percentile of Beta(1 + n_s(a), 1 + n_f(a))

A *clade* is an agent with all its descendants; the baseline `own-score` differs only in modifying by the agent's own counts.

Two problems. `simulator`: agents have a skill and a hidden gift for improving, and the true utility is known; how far the two pull
apart is set by their correlation, so that the same table holds the contrast (skilled parents are gifted parents: nothing to gain).
`program`: a small Python program that forms English plurals, whose text holds its rules, its habits of rewriting itself
and the code that does both; it runs in a sandbox and is judged on nouns that the search never saw.

One seed is a block of `repeats` searches: seed s holds the worlds s * repeats, s * repeats + 1, …  Arms are paired inside each: they
meet the same worlds, and attempt k on the same agent gives the same child under every policy.

Exact: the three policies, the widening rule and the cool-down; the conventions on N and |T| are in `stillroom.search.archive`.
Interpretation, unconfirmed: the percentile. Shrunk: the agents (the paper's are coding agents on top of language models).
`stillroom search` applies the same search to the configs of a recipe.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from stillroom.catalogue.claims import Claim
from stillroom.core.config import Count, Natural, Positive
from stillroom.core.run import Run
from stillroom.data.plurals import plurals
from stillroom.search import POLICIES, Archive, Found, Log, Policy, Sandbox, SandboxError, hgm, run_function, search
from stillroom.search.picture import patch, tree

# (correlation of a modification's effects on skill and on the gift for improving, spread of the latter)
CONDITIONS = {"mismatch": (-0.7, 0.35), "mild": (-0.7, 0.2), "independent": (0.0, 0.2), "aligned": (0.7, 0.2)}


@dataclass(frozen=True)
class Config:
    """Laptop defaults: ten seeds are 480 simulated worlds."""

    problem: Literal["simulator", "program"] = "simulator"
    """Simulated agents whose true worth is known, or programs that rewrite themselves."""
    policy: Literal["hgm", "own-score", "dgm", "greedy", "random"] = "hgm"
    """Which agent to modify and which to test."""
    repeats: Count = 48
    """Independent searches of one seed; metrics are means over them."""
    budget: Count = 600
    """Evaluations of one search, the root's first pass over the tasks not counted."""
    tasks: Count = 60
    """Tasks, each given at most once to the same agent."""
    widening: Positive = 0.6
    """Exponent of the evaluations done that the tree may grow to (hgm, own-score; paper and released code)."""
    initial: Natural = 5
    """Modifications of the root to begin with (hgm, own-score; paper and released code)."""
    cooldown: bool = True
    """Sharpen the posteriors by budget / remaining (hgm, own-score; in the paper, off in the released code's defaults)."""


def full() -> Config:
    """The paper's budget for 60 tasks."""
    return Config(budget=800)


ARMS: dict[str, dict[str, Any]] = {
    "hgm": {},
    "own-score": {"policy": "own-score"},
    "dgm": {"policy": "dgm"},
    "greedy": {"policy": "greedy"},
    "hgm without cool-down": {"cooldown": False},
    "program: hgm": {"problem": "program", "repeats": 4, "budget": 300},
    "program: own-score": {"problem": "program", "repeats": 4, "budget": 300, "policy": "own-score"},
    "program: greedy": {"problem": "program", "repeats": 4, "budget": 300, "policy": "greedy"},
}
_PAPER = "SWE-Verified-60: HGM 56.7 %, DGM 53.3 %, SICA 50.0 % solved after 800 evaluations"
CLAIMS = [
    Claim("where skill and potential part, the clade is the better guide", metric="mismatch", arm="hgm", versus="own-score"),
    Claim("also where potential varies less", metric="mild", arm="hgm", versus="own-score"),
    Claim("also where they are independent", metric="independent", arm="hgm", versus="own-score"),
    Claim("contrast: where they agree it is not better", metric="aligned", arm="own-score", versus="hgm", margin=-0.03),
    Claim("contrast: nor is it worse there", metric="aligned", arm="hgm", versus="own-score", margin=-0.03),
    Claim("the advantage comes from the mismatch", metric="mismatch_minus_aligned", arm="hgm", versus="own-score"),
    Claim("better than DGM at the same budget", metric="mismatch", arm="hgm", versus="dgm", paper=_PAPER),
    Claim("better than greedy (SICA) at the same budget", metric="mismatch", arm="hgm", versus="greedy", paper=_PAPER),
    Claim(
        "the clade foretells the best descendant better than the own score, without leaks", metric="correlation_gain", arm="hgm",
        versus=0.0, paper="weighted correlation on SWE-Verified-60: HGM's estimate 0.778, SICA 0.444, DGM 0.285",
    ),
    Claim("programs that rewrite themselves: better than greedy", metric="unseen", arm="program: hgm", versus="program: greedy"),
    Claim("the same: better than by own score", metric="unseen", arm="program: hgm", versus="program: own-score"),
]  # fmt: skip


def main(cfg: Config, run: Run, *, sandbox: Sandbox = run_function) -> dict[str, float]:
    """Run `repeats` searches. `sandbox` runs a function of a program's text (see `stillroom.search.sandbox`)."""
    return simulate(cfg, run) if cfg.problem == "simulator" else rewrite_programs(cfg, run, sandbox)


def policy_of(cfg: Config) -> Policy:
    if cfg.policy in ("hgm", "own-score"):
        guidance = "clade" if cfg.policy == "hgm" else "own"
        return partial(hgm, guidance=guidance, widening=cfg.widening, cooldown=cfg.cooldown, initial=cfg.initial)
    return POLICIES[cfg.policy]


# -- the simulator -----------------------------------------------------------------------------------------------------------------
@dataclass(eq=False, frozen=True)
class Simulated:
    """An agent whose worth is known."""

    skill: float
    gift: float
    """Mean gain in skill of its modifications: its metaproductivity."""
    passes: np.ndarray = field(repr=False)
    """The outcome of every task, drawn once."""


@dataclass(frozen=True)
class World:
    """Tasks and how modification works in one simulated world."""

    correlation: float
    spread: float
    difficulty: np.ndarray

    @classmethod
    def of(cls, seed: int, condition: str, tasks: int) -> World:
        return cls(*CONDITIONS[condition], np.random.default_rng((seed, 0)).normal(0.3, 1.2, tasks))

    def chances(self, skill: float) -> np.ndarray:
        """Probability of passing each task; their mean is the true utility."""
        return 1 / (1 + np.exp(self.difficulty - skill))

    def born(self, skill: float, gift: float, rng: np.random.Generator) -> Simulated:
        return Simulated(skill, gift, rng.random(len(self.difficulty)) < self.chances(skill))

    def modify(self, agent: Simulated, log: Log | None, seed: int) -> Simulated:
        """s' = s + m + 0.35 e1 and m' = m + spread e2 with corr(e1, e2) = correlation."""
        rng = np.random.default_rng(seed)
        first, other = rng.standard_normal(2)
        second = self.correlation * first + np.sqrt(1 - self.correlation**2) * other
        return self.born(agent.skill + agent.gift + 0.35 * first, agent.gift + self.spread * second, rng)


def simulate(cfg: Config, run: Run) -> dict[str, float]:
    """True utility of the agent handed out, per condition, and how well clades and own scores foretell the best descendant."""
    utility = torch.zeros(len(CONDITIONS), cfg.repeats, dtype=torch.float64)
    moments = torch.zeros(4, 6, dtype=torch.float64)
    agents = torch.zeros((), dtype=torch.float64)
    run.track(utility=utility, moments=moments, agents=agents)
    for repeat in run.steps(cfg.repeats):
        number = run.seed * cfg.repeats + repeat
        for row, condition in enumerate(CONDITIONS):
            world, found = explore(cfg, number, condition)
            utility[row, repeat] = world.chances(found.artefact.skill).mean()
            if condition == "mismatch":
                agents += len(found.archive.agents)
                moments += torch.tensor(np.stack([moments_of(*pairs) for pairs in predictions(found.archive, world)]))
        run.log(**{condition: float(utility[row, : repeat + 1].mean()) for row, condition in enumerate(CONDITIONS)})
    metrics = {condition: float(utility[row].mean()) for row, condition in enumerate(CONDITIONS)}
    metrics["mismatch_minus_aligned"] = metrics["mismatch"] - metrics["aligned"]
    own, clade, metrics["leaky_own_correlation"], metrics["leaky_clade_correlation"] = (correlation(m) for m in moments.numpy())
    metrics |= {"own_correlation": own, "clade_correlation": clade, "correlation_gain": clade - own}
    metrics["agents"] = float(agents) / cfg.repeats
    run.row("student", **{name: metrics[name] for name in (*CONDITIONS, "own_correlation", "clade_correlation", "agents")})
    if run.plots:
        world, found = explore(cfg, run.seed * cfg.repeats, "mismatch")
        run.html("tree of the first search", tree(found.archive, found.best, lambda parent, child: describe(world, child)))
    return metrics


def explore(cfg: Config, seed: int, condition: str) -> tuple[World, Found]:
    """One search in one world."""
    world = World.of(seed, condition, cfg.tasks)
    root = world.born(-0.5, 0.1, np.random.default_rng((seed, 1)))
    evaluate = lambda agent, task: agent.passes[task]
    return world, search(root, world.modify, evaluate, range(cfg.tasks), cfg.budget, policy=policy_of(cfg), seed=seed)


def describe(world: World, agent: Simulated) -> str:
    return f"skill {agent.skill:+.2f}, gift {agent.gift:+.2f}\ntrue utility {world.chances(agent.skill).mean():.3f}"


def predictions(archive: Archive, world: World) -> list[tuple[list[float], list[float]]]:
    """(predictor, target) over an archive's parents: own and clade mean without leaks, then both with the leak.

    Without leaks the target is the best empirical mean among strict descendants, and the clade's counts leave out the agent's own and
    the whole branch that holds this maximum; parents that keep no evaluation then are left out for both predictors.
    With the leak the clade's counts are whole, and the target is the best true utility among strict descendants.
    """
    passed, failed = archive.counts()
    clade_passed, clade_failed = archive.clade_counts()
    tried, clade_tried = passed + failed, clade_passed + clade_failed
    utility = [float(world.chances(agent.artefact.skill).mean()) for agent in archive.agents]
    best_mean: dict[int, tuple[float, int]] = {}  # per agent: best mean below it, and the child whose branch holds it
    best_utility: dict[int, float] = {}
    for i in range(len(archive.agents) - 1, 0, -1):
        parent = archive.agents[i].parent
        assert parent is not None
        mean = max(passed[i] / tried[i] if tried[i] else -1.0, best_mean.get(i, (-1.0, 0))[0])
        best_mean[parent] = max(best_mean.get(parent, (-1.0, 0)), (mean, i))
        best_utility[parent] = max(best_utility.get(parent, -1.0), utility[i], best_utility.get(i, -1.0))
    own: tuple[list, list] = ([], [])
    clade: tuple[list, list] = ([], [])
    for i, (target, branch) in best_mean.items():
        left = clade_tried[i] - tried[i] - clade_tried[branch]
        if left and tried[i] and target >= 0:
            own[0].append(passed[i] / tried[i])
            clade[0].append((clade_passed[i] - passed[i] - clade_passed[branch]) / left)
            own[1].append(target)
            clade[1].append(target)
    parents = [i for i in best_utility if tried[i]]
    targets = [best_utility[i] for i in parents]
    return [own, clade, ([passed[i] / tried[i] for i in parents], targets), ([clade_passed[i] / clade_tried[i] for i in parents], targets)]


def moments_of(x: list[float], y: list[float]) -> np.ndarray:
    """n, and the sums of x, y, x^2, y^2 and x y: additive over searches, so that parents of all worlds are pooled."""
    a, b = np.array(x), np.array(y)
    return np.array([len(a), a.sum(), b.sum(), (a * a).sum(), (b * b).sum(), (a * b).sum()])


def correlation(moments: np.ndarray) -> float:
    """Pearson's, 0 when one side does not vary."""
    n, x, y, xx, yy, xy = moments
    scale = (n * xx - x * x) * (n * yy - y * y)
    return float((n * xy - x * y) / np.sqrt(scale)) if scale > 0 else 0.0


# -- programs that rewrite themselves ----------------------------------------------------------------------------------------------
PROGRAM = r"""
RULES = [["", "s"]]
HABITS = {"look": 0.5, "edits": 2.0, "context": 0.5, "restless": 0.5}


def solve(word):
    ending, new = max((rule for rule in RULES if word.endswith(rule[0])), key=lambda rule: len(rule[0]), default=("", ""))
    return word[: len(word) - len(ending)] + new


def rewrite(source, failures, seed):
    import random

    draw = random.Random(seed)
    rules, habits = [list(rule) for rule in RULES], dict(HABITS)
    for _ in range(1 + int(draw.expovariate(1 / habits["edits"]))):
        if failures and draw.random() < habits["look"]:
            word, wanted = draw.choice(failures)
            keep = 0
            while keep < min(len(word), len(wanted)) and word[keep] == wanted[keep]:
                keep += 1
            start = max(0, keep - int(draw.expovariate(1 / habits["context"])))
            rules = [rule for rule in rules if rule[0] != word[start:]] + [[word[start:], wanted[start:]]]
        elif rules and draw.random() < 0.5:
            rules.pop(draw.randrange(len(rules)))
        else:
            ending = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(0, 2)))
            rules = [rule for rule in rules if rule[0] != ending] + [[ending, ending + draw.choice(["s", "es", "a", "i"])]]
    for name in habits:
        habits[name] *= 2.718281828 ** draw.gauss(0, habits["restless"])
    habits["look"], habits["edits"] = min(habits["look"], 1.0), min(habits["edits"], 8.0)
    lines = source.splitlines(keepends=True)
    lines = [f"RULES = {rules!r}\n" if line.startswith("RULES = ") else line for line in lines]
    return "".join(f"HABITS = {habits!r}\n" if line.startswith("HABITS = ") else line for line in lines)
"""


def rewrite_programs(cfg: Config, run: Run, sandbox: Sandbox) -> dict[str, float]:
    """Accuracy on nouns that no evaluation showed, of the program handed out and of the one at the start."""
    unseen = torch.zeros(cfg.repeats, dtype=torch.float64)
    start, agents, lost = torch.zeros_like(unseen), torch.zeros_like(unseen), torch.zeros_like(unseen)
    run.track(unseen=unseen, start=start, agents=agents, lost=lost)
    for repeat in run.steps(cfg.repeats):
        number = run.seed * cfg.repeats + repeat
        nouns = plurals()
        order = np.random.default_rng(number).permutation(len(nouns))
        tasks, others = [nouns[i] for i in order[: cfg.tasks]], [nouns[i] for i in order[cfg.tasks :]]

        def modify(source: str, log: Log, seed: int, tasks: list = tasks) -> str:
            failures = [list(tasks[trial.task]) for trial in log.trials if not trial.passed]
            child = sandbox(source, "rewrite", [source, failures, seed])
            sandbox(child, "solve", ["book"])  # a program that does not run is no child
            return child

        def evaluate(source: str, task: tuple[str, str]) -> tuple[bool, str]:
            answer = sandbox(source, "solve", [task[0]])
            return answer == task[1], f"{task[0]}: {answer}"

        found = search(
            PROGRAM, modify, evaluate, tasks, cfg.budget, policy=policy_of(cfg), seed=number, journal=run.folder / f"search-{repeat}.jsonl"
        )
        unseen[repeat], start[repeat] = accuracy(found.artefact, others, sandbox), accuracy(PROGRAM, others, sandbox)
        agents[repeat], lost[repeat] = len(found.archive.agents), found.archive.failed_modifications
        run.log(unseen=float(unseen[: repeat + 1].mean()))
        if repeat == 0:
            run.html("tree of the first search", tree(found.archive, found.best, patch))
    metrics = {"unseen": unseen, "unseen_at_start": start, "agents": agents, "failed_modifications": lost}
    run.row("student", **{name: float(values.mean()) for name, values in metrics.items()})
    return {name: float(values.mean()) for name, values in metrics.items()}


def accuracy(source: str, nouns: list[tuple[str, str]], sandbox: Sandbox) -> float:
    """Share of right plurals; a program that fails is wrong."""
    try:
        answers = sandbox(
            source + "\n\ndef solve_all(words):\n    return [solve(word) for word in words]\n", "solve_all", [[n for n, _ in nouns]]
        )
    except SandboxError:
        return 0.0
    return float(np.mean([answer == plural for answer, (_, plural) in zip(answers, nouns, strict=True)]))
