"""What to do next: plain functions `policy(archive, rng) -> Expand | Evaluate | None`.

None means that nothing useful can start now: the search waits for a job under way, and ends if there is none.
Options are bound with `functools.partial`, e.g. `partial(hgm, cooldown=False)`.

Sources: Wang, Piękos et al. 2025 (arXiv 2510.21614) for `hgm` and for `own_score`, its ablation; `dgm` follows the parent sampling of
the Darwin Gödel Machine, its stage thresholds unconfirmed; `greedy` is the rule of SICA.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from stillroom.core.errors import UserError
from stillroom.search.archive import Action, Archive, Evaluate, Expand

Policy = Callable[[Archive, np.random.Generator], Action | None]


def thompson(passed: NDArray, failed: NDArray, rng: np.random.Generator, tau: float = 1.0) -> int:
    """Argmax of one draw of each theta ~ Beta(tau (1 + passed), tau (1 + failed)); the tau also multiplies the prior's ones."""
    return int(rng.beta(tau * (1.0 + passed), tau * (1.0 + failed)).argmax())


def best_belief(archive: Archive, percentile: float = 1.0) -> int:
    """The agent to hand out: the highest low quantile of Beta(1 + passed, 1 + failed) on its *own* counts.

    The paper writes I_eps(1 + n_s, 1 + n_f) with eps = 1; read here as the 1st percentile, which is the inverse of the regularised
    incomplete beta function at 0.01 (an interpretation, unconfirmed).
    """
    from scipy.special import betaincinv

    passed, failed = archive.counts()
    return int(betaincinv(1.0 + passed, 1.0 + failed, percentile / 100).argmax())


def hgm(
    archive: Archive, rng: np.random.Generator, *, guidance: str = "clade", widening: float = 0.6, cooldown: bool = True, initial: int = 5
) -> Action | None:
    """The Huxley-Gödel Machine: modify by the success of the whole clade, test by the agent's own.

    Select: modify while N**widening >= |T| - 1 + pending modifications, else test. Modify: Thompson sampling on clade counts among
    agents that passed something. Test: Thompson sampling on own counts among agents with untried tasks, on one of those, uniformly.
    The first `initial` modifications are the root's. `cooldown` sharpens both draws by B / b, b the evaluations that remain.
    `guidance="own"` modifies by own counts as well. UserError for a widening outside (0, 1]: beyond 1 the tree outgrows the tests.
    """
    if not 0 < widening <= 1:
        raise UserError(f"widening must be greater than 0 and at most 1, not {widening:g}: beyond 1 the tree outgrows the tests.")
    tau = archive.budget / max(1, archive.budget - archive.finished) if cooldown else 1.0
    passed, failed = archive.counts()
    parents = np.flatnonzero(passed) if not archive.exhausted else np.array([], dtype=int)

    def expand() -> Action:
        if archive.agents[0].attempts < initial and passed[0]:
            return Expand(0)
        pool = archive.clade_counts() if guidance == "clade" else (passed, failed)
        return Expand(int(parents[thompson(pool[0][parents], pool[1][parents], rng, tau)]))

    due = archive.agents[0].attempts < initial or archive.finished**widening >= len(archive.agents) - 1 + archive.expanding
    if due and len(parents):
        return expand()
    open_ = np.array([i for i, agent in enumerate(archive.agents) if agent.untried], dtype=int)
    if len(open_):
        chosen = int(open_[thompson(passed[open_], failed[open_], rng, tau)])
        return Evaluate(chosen, int(rng.choice(archive.agents[chosen].untried)))
    return expand() if len(parents) and not archive.expanding else None


own_score: Policy = partial(hgm, guidance="own")


def dgm(archive: Archive, rng: np.random.Generator, *, stage: int = 10, threshold: float = 0.4) -> Action | None:
    """Darwin Gödel Machine: every new agent is tested at once, on `stage` tasks and on all others if it passed `threshold` of those.

    The parent is drawn in proportion to sigmoid(10 (accuracy - 1/2)) / (1 + children).
    """
    for i, agent in enumerate(archive.agents):
        asked, done = archive.tasks - len(agent.untried), agent.passed + agent.failed
        promoted = asked > stage or (done >= stage and agent.passed >= threshold * done)
        if agent.untried and (asked < stage or promoted):
            return Evaluate(i, int(rng.choice(agent.untried)))
    parents = [(i, agent) for i, agent in enumerate(archive.agents) if agent.passed + agent.failed]
    if archive.exhausted or not parents:
        return None
    weight = np.array([1 / (1 + math.exp(-10 * (a.passed / (a.passed + a.failed) - 0.5))) / (1 + a.children) for _, a in parents])
    return Expand(parents[int(rng.choice(len(parents), p=weight / weight.sum()))][0])


def greedy(archive: Archive, rng: np.random.Generator) -> Action | None:
    """SICA: modify the best agent so far, test its child on everything."""
    return _tested_in_full(archive, rng) or (None if archive.exhausted else Expand(int(np.argmax(_means(archive)))))


def random_search(archive: Archive, rng: np.random.Generator) -> Action | None:
    """No tree: every agent is modified from the root and tested on everything."""
    return _tested_in_full(archive, rng) or (None if archive.exhausted else Expand(0))


def _tested_in_full(archive: Archive, rng: np.random.Generator) -> Action | None:
    for i, agent in enumerate(archive.agents):
        if agent.untried:
            return Evaluate(i, int(rng.choice(agent.untried)))
    return None


def _means(archive: Archive) -> NDArray:
    """Accuracy of every agent that has met all tasks, 0 for the others (with several workers some are half tested)."""
    passed, failed = archive.counts()
    return np.where(passed + failed == archive.tasks, passed / archive.tasks, 0.0)


POLICIES: dict[str, Policy] = {"hgm": hgm, "own-score": own_score, "dgm": dgm, "greedy": greedy, "random": random_search}
