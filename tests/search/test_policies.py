"""Counts, posteriors and decisions against brute force and closed forms."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from scipy import integrate, stats

from stillroom.core.errors import UserError
from stillroom.search import Archive, Evaluate, Expand, best_belief, dgm, greedy, hgm, own_score, random_search, thompson


def archive(nodes: list[tuple[int | None, int, int]], *, tasks: int = 60, budget: int = 600) -> Archive:
    """An archive from (parent, passed, failed) rows."""
    made = Archive(tasks, budget)
    for i, (parent, passed, failed) in enumerate(nodes):
        made.add(f"agent {i}", parent, i)
        for task in range(passed + failed):
            action = Evaluate(i, task)
            made.start(action)
            made.finish(action, passed=task < passed)
    made.agents[0].attempts = 5  # the initial modifications are past
    return made


def decide(policy, state: Archive, draws: int = 400):
    return [policy(state, np.random.default_rng(i)) for i in range(draws)]


def test_clade_counts_are_sums_over_descendants_and_asking_twice_changes_nothing():
    rng = np.random.default_rng(0)
    nodes = [(None if i == 0 else int(rng.integers(i)), int(rng.integers(5)), int(rng.integers(5))) for i in range(30)]
    state = archive(nodes)
    below = [[j for j in range(30) if i in state.lineage(j)] for i in range(30)]
    for _ in range(2):  # the released code extends a node's own list in place, so that each call adds its descendants again
        passed, failed = state.clade_counts()
        assert passed.tolist() == [sum(nodes[j][1] for j in clade) for clade in below]
        assert failed.tolist() == [sum(nodes[j][2] for j in clade) for clade in below]
        assert [(p, f) for _, p, f in nodes] == list(zip(*(c.tolist() for c in state.counts()), strict=True))


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_thompson_chooses_with_the_probability_that_each_posterior_is_the_largest(tau):
    passed, failed = np.array([3, 6, 1]), np.array([3, 9, 0])
    a, b, c = (stats.beta(tau * (1 + s), tau * (1 + f)) for s, f in zip(passed, failed, strict=True))  # the prior is heated too
    first = integrate.quad(lambda x: a.pdf(x) * b.cdf(x) * c.cdf(x), 0, 1)[0]
    second = integrate.quad(lambda x: b.pdf(x) * a.cdf(x) * c.cdf(x), 0, 1)[0]
    rng = np.random.default_rng(0)
    share = np.bincount([thompson(passed, failed, rng, tau) for _ in range(8000)], minlength=3) / 8000
    assert share == pytest.approx([first, second, 1 - first - second], abs=0.02)


def test_the_agent_handed_out_has_the_highest_first_percentile_of_its_own_posterior():
    nodes = [(None, 24, 36), (0, 1, 0), (0, 30, 20), (2, 33, 27), (1, 9, 3)]
    state = archive(nodes)
    quantiles = [stats.beta(1 + s, 1 + f).ppf(0.01) for _, s, f in nodes]
    assert best_belief(state) == int(np.argmax(quantiles)) == 2
    assert best_belief(archive([(None, 40, 20), (0, 1, 0)])) == 0  # by mean, a newcomer with 1 of 1 would win


def test_the_best_belief_ignores_the_clade():
    assert best_belief(archive([(None, 20, 20), (0, 8, 10), (1, 50, 2), (0, 25, 20)])) == 2


def test_an_agent_is_modified_by_its_clade_and_tested_by_its_own_counts():
    # Agent 1 failed mostly and its child 3 passes; agent 2 passed mostly and its child fails.
    state = archive([(None, 5, 55), (0, 2, 6), (0, 6, 2), (1, 9, 1), (2, 0, 12)])
    grown = partial(hgm, widening=1.0, cooldown=False)
    clade = [action.parent for action in decide(grown, state)]
    own = [action.parent for action in decide(partial(grown, guidance="own"), state)]
    assert clade.count(1) > 3 * clade.count(2)
    assert own.count(2) > 3 * own.count(1)
    tested = [action.agent for action in decide(partial(hgm, widening=0.01, cooldown=False), state)]
    assert tested.count(2) > 3 * tested.count(1)


def test_the_tree_may_grow_while_n_to_the_alpha_is_at_least_its_size_without_the_root():
    nodes = [(None, 30, 30)] + [(0, 5, 5)] * 3  # N = 30 without the root's own 60
    for widening, grows in ((math.log(3.01) / math.log(30), True), (math.log(2.99) / math.log(30), False)):
        assert isinstance(hgm(archive(nodes), np.random.default_rng(0), widening=widening), Expand) == grows
    state = archive(nodes)
    state.start(Expand(0))  # one more under way counts
    assert isinstance(hgm(state, np.random.default_rng(0), widening=math.log(3.01) / math.log(30)), Evaluate)


@pytest.mark.parametrize("widening", [0.0, -1.0, 1.01, 2.84])
def test_a_tree_that_would_outgrow_the_tests_is_refused(widening):
    with pytest.raises(UserError, match="widening"):
        hgm(archive([(None, 30, 30)]), np.random.default_rng(0), widening=widening)


def test_the_root_is_modified_first():
    state = archive([(None, 30, 30)])
    state.agents[0].attempts = 0
    actions = []
    for _ in range(5):
        actions.append(hgm(state, np.random.default_rng(0)))
        state.start(actions[-1])
    assert actions == [Expand(0)] * 5


def test_agents_without_success_are_never_modified():
    state = archive([(None, 1, 59), (0, 0, 3), (0, 0, 1), (0, 0, 0)])
    for policy in (hgm, own_score):
        chosen = decide(partial(policy, widening=1.0), state)
        assert {action.parent for action in chosen} == {0}
    assert hgm(archive([(None, 0, 60)]), np.random.default_rng(0)) is None


def test_an_agent_with_all_tasks_done_is_not_tested_but_may_be_modified():
    state = archive([(None, 3, 0), (0, 2, 1)], tasks=3)
    assert {type(action) for action in decide(partial(hgm, widening=0.01), state)} == {Expand}
    assert {action.parent for action in decide(partial(hgm, widening=0.01), state)} == {0, 1}


def test_cooling_down_sharpens_towards_the_end_and_is_defined_at_the_end():
    nodes = [(None, 30, 30), (0, 30, 29), (0, 24, 25)]
    late = archive(nodes, tasks=120, budget=109)
    chosen = [action.agent for action in decide(partial(hgm, widening=0.01), late)]
    flat = [action.agent for action in decide(partial(hgm, widening=0.01, cooldown=False), late)]
    assert chosen.count(1) > flat.count(1)
    late.finished = late.budget
    hgm(late, np.random.default_rng(0))


def test_dgm_tests_in_stages_and_favours_good_parents_with_few_children():
    low, high = [(None, 30, 30), (0, 3, 7)], [(None, 30, 30), (0, 4, 6)]
    assert isinstance(dgm(archive(low), np.random.default_rng(0)), Expand)
    assert isinstance(dgm(archive(high), np.random.default_rng(0)), Evaluate)
    state = archive([(None, 30, 30), (0, 36, 24)])
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    weights = sigmoid(10 * (0.5 - 0.5)) / 2, sigmoid(10 * (0.6 - 0.5))
    share = np.mean([action.parent for action in decide(dgm, state, 3000)])
    assert share == pytest.approx(weights[1] / sum(weights), abs=0.03)


def test_greedy_modifies_the_best_of_those_tested_in_full():
    assert greedy(archive([(None, 30, 30), (0, 40, 20), (1, 35, 25)]), np.random.default_rng(0)) == Expand(1)
    half = archive([(None, 30, 30), (0, 40, 20)])
    half.add("new", 1, 7)
    assert greedy(half, np.random.default_rng(0)).agent == 2
    assert random_search(archive([(None, 30, 30), (0, 40, 20)]), np.random.default_rng(0)) == Expand(0)
