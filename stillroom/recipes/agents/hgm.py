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

Exact: the three policies, the widening rule, the cool-down, and the released code's conventions on N and |T| (stated in
`stillroom.search.archive`); clade counts are sums made anew, where the released code extends a list in place and counts descendants
again at every call. Correlations are the paper's leak-free ones, plain and weighted.
Shrunk: the agents (the paper's are coding agents on top of language models), and the budget, 600 evaluations for 800.
Ours: the percentile of the returned agent read as 1 %, DGM's stage thresholds, and what the weighted correlation weighs by (the
evaluations that a prediction rests on), all three unconfirmed; both problems and their sizes.
Left out: asynchronous search (`stillroom search` has it), and the cap on an agent's own evaluations, which the released code sets to none.
`stillroom search` applies the same search to the configs of a recipe.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from stillroom.catalogue import idle
from stillroom.catalogue.claims import Claim
from stillroom.core.config import Count, Natural, Positive
from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.data.plurals import plurals
from stillroom.lm import sandbox as isolation
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


TINY = {"repeats": 2, "budget": 30, "tasks": 12}

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
_UNCOOLED = "hgm without cool-down"
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
    *[Claim(f"the cool-down pays: {name}", metric=name, arm="hgm", versus=_UNCOOLED) for name in CONDITIONS],
    Claim(
        "the clade foretells the best descendant better than the own score, without leaks", metric="correlation_gain", arm="hgm",
        versus=0.0, paper="SWE-Verified-60, unweighted: HGM's estimate 0.512, SICA 0.444, DGM 0.406",
    ),
    Claim(
        "the same, weighted by evaluations", metric="weighted_correlation_gain", arm="hgm", versus=0.0,
        paper="SWE-Verified-60, weighted: HGM's estimate 0.778, SICA 0.444, DGM 0.285",
    ),
    Claim("programs that rewrite themselves: better than greedy", metric="unseen", arm="program: hgm", versus="program: greedy"),
    Claim("the same: better than by own score", metric="unseen", arm="program: hgm", versus="program: own-score"),
]  # fmt: skip


def main(cfg: Config, run: Run, *, sandbox: Sandbox | None = None) -> dict[str, float]:
    """Run `repeats` searches. `sandbox` runs a function of a program's text (default: `strictest`).

    UserError for flags of hgm and own-score beside another policy, and for so many tasks that no noun is left unseen.
    """
    refuse_idle(cfg)
    if cfg.problem == "simulator":
        return simulate(cfg, run)
    with strictest() if sandbox is None else nullcontext(sandbox) as runs:
        return rewrite_programs(cfg, run, runs)


def refuse_idle(cfg: Config) -> None:
    """UserError for a flag that would change nothing."""
    usual = Config()
    for name in ("widening", "initial", "cooldown"):
        if cfg.policy not in ("hgm", "own-score") and getattr(cfg, name) != getattr(usual, name):
            idle.refuse(f"--{name} {getattr(cfg, name)} changes nothing under --policy {cfg.policy}: it is for hgm and own-score.")
    if cfg.problem == "program" and cfg.tasks >= len(plurals()):
        raise UserError(f"--tasks {cfg.tasks} leaves no noun unseen: --problem program has {len(plurals())}, so give fewer.", code=2)


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
        rng = np.random.default_rng(seed)
        return self.born(*offspring(agent.skill, agent.gift, rng.standard_normal(2), self.correlation, self.spread), rng)


def offspring(s: float, m: float, eps: np.ndarray, correlation: float, spread: float) -> tuple[float, float]:
    """(s', m'): s' = s + m + 0.35 e1 and m' = m + spread e2 with corr(e1, e2) = correlation, from two independent normal draws `eps`."""
    first, other = eps
    second = correlation * first + np.sqrt(1 - correlation**2) * other
    return s + m + 0.35 * first, m + spread * second


def simulate(cfg: Config, run: Run) -> dict[str, float]:
    """True utility of the agent handed out, per condition, and how well clades and own scores foretell the best descendant."""
    utility = torch.zeros(len(CONDITIONS), cfg.repeats, dtype=torch.float64)
    moments = torch.zeros(len(PREDICTORS), 6, dtype=torch.float64)
    agents = torch.zeros((), dtype=torch.float64)
    run.track(utility=utility, moments=moments, agents=agents)
    for repeat in run.steps(cfg.repeats):
        number = run.seed * cfg.repeats + repeat
        for row, condition in enumerate(CONDITIONS):
            world, found = explore(cfg, number, condition)
            utility[row, repeat] = world.chances(found.artefact.skill).mean()
            if condition == "mismatch":
                agents += len(found.archive.agents)
                pairs = predictions(found.archive, world)
                moments += torch.tensor(np.stack([moments_of(*pairs[name]) for name in PREDICTORS]))
        run.log(**{condition: float(utility[row, : repeat + 1].mean()) for row, condition in enumerate(CONDITIONS)})
    metrics = {condition: float(utility[row].mean()) for row, condition in enumerate(CONDITIONS)}
    metrics["mismatch_minus_aligned"] = metrics["mismatch"] - metrics["aligned"]
    metrics |= {f"{name}_correlation": correlation(m) for name, m in zip(PREDICTORS, moments.numpy(), strict=True)}
    for kind in ("", "weighted_"):
        metrics[f"{kind}correlation_gain"] = metrics[f"{kind}clade_correlation"] - metrics[f"{kind}own_correlation"]
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


class Pairs(NamedTuple):
    """What predicts, what is predicted, and the weight of each pair: one entry per parent."""

    x: list[float]
    y: list[float]
    weight: list[float]


PREDICTORS = ("own", "clade", "weighted_own", "weighted_clade", "leaky_own", "leaky_clade")


def predictions(archive: Archive, world: World) -> dict[str, Pairs]:
    """By name of `PREDICTORS`, over an archive's parents: the own and the clade's mean as predictors of the best descendant.

    Without leaks the target is the best empirical mean among strict descendants, and the clade's counts leave out the agent's own and
    the whole branch that holds this maximum; parents that keep no evaluation then are left out for both predictors. Weighted: by the
    evaluations that the prediction rests on. With the leak the clade's counts are whole, and the target is the best true utility
    among strict descendants.
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
    own, clade, targets, weights = [], [], [], []
    for i, (target, branch) in best_mean.items():
        left = clade_tried[i] - tried[i] - clade_tried[branch]
        if left and tried[i] and target >= 0:
            own.append(passed[i] / tried[i])
            clade.append((clade_passed[i] - passed[i] - clade_passed[branch]) / left)
            targets.append(target)
            weights.append((tried[i], left))
    parents = [i for i in best_utility if tried[i]]
    best, ones = [best_utility[i] for i in parents], [1.0] * len(parents)
    return {
        "own": Pairs(own, targets, [1.0] * len(own)),
        "clade": Pairs(clade, targets, [1.0] * len(own)),
        "weighted_own": Pairs(own, targets, [weight for weight, _ in weights]),
        "weighted_clade": Pairs(clade, targets, [weight for _, weight in weights]),
        "leaky_own": Pairs([passed[i] / tried[i] for i in parents], best, ones),
        "leaky_clade": Pairs([clade_passed[i] / clade_tried[i] for i in parents], best, ones),
    }


def moments_of(x: list[float], y: list[float], weight: list[float]) -> np.ndarray:
    """Weighted sums of 1, x, y, x^2, y^2 and x y: additive over searches, so that parents of all worlds are pooled."""
    a, b, w = np.array(x), np.array(y), np.array(weight)
    return np.array([w.sum(), (w * a).sum(), (w * b).sum(), (w * (a * a)).sum(), (w * (b * b)).sum(), (w * (a * b)).sum()])


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


@contextmanager
def strictest() -> Iterator[Sandbox]:
    """The strictest sandbox of this system: namespaces and a system call filter where there are some, else limits on a process."""
    try:
        box = isolation.Sandbox(limits=isolation.Limits(output=1_000_000))  # answers are printed
        box.run("")
    except UserError:
        yield run_function
        return
    with box:
        yield partial(isolated, box)


def isolated(box: isolation.Sandbox, source: str, name: str, args: list) -> Any:
    """`name(*args)` of the program `source`, which prints its value as a literal; SandboxError for whatever goes wrong inside."""
    outcome = box.run(f"{source}\n\nprint(); print(repr({name}(*{args!r})))")
    if outcome.error:
        raise SandboxError(outcome.error)
    try:
        return ast.literal_eval(outcome.output.splitlines()[-1])
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise SandboxError(f"no usable answer ({type(error).__name__})") from None


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
