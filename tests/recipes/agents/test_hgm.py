"""HGM: worlds and predictions by hand, policies held apart on paired worlds, programs that rewrite themselves."""

from __future__ import annotations

import dataclasses
from unittest import mock

import numpy as np
import pytest
from scipy import stats

from stillroom import cli
from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.data.plurals import plurals
from stillroom.lm import sandbox as isolation
from stillroom.recipes.agents import hgm
from stillroom.search import Archive, Evaluate, SandboxError, run_function
from stillroom.testing import trace
from tests.recipes.common import Killed, finish

CHANCE = 1 / (1 + np.exp(1.0))  # of passing a task that is one harder than the skill


def test_conditions_and_budget_are_the_sheets():
    assert hgm.CONDITIONS == {"mismatch": (-0.7, 0.35), "mild": (-0.7, 0.2), "independent": (0.0, 0.2), "aligned": (0.7, 0.2)}
    assert (hgm.Config().budget, hgm.Config().tasks, hgm.full().budget) == (600, 60, 800)


@pytest.mark.parametrize(
    ("correlation", "eps", "expected"),
    [
        (0.0, (0.0, 0.0), (0.5, 0.2)),  # the gift is the mean gain
        (0.0, (2.0, 0.0), (1.2, 0.2)),  # 0.35 e1 moves the skill alone
        (0.0, (0.0, 2.0), (0.5, 1.2)),  # spread e2 moves the gift alone
        (-1.0, (1.0, 5.0), (0.85, -0.3)),  # wholly opposed: the second draw is not used
        (0.6, (1.0, 1.0), (0.85, 0.2 + 0.5 * (0.6 + 0.8))),
    ],
)
def test_offspring_by_hand(correlation, eps, expected):
    assert hgm.offspring(0.3, 0.2, np.array(eps), correlation, 0.5) == pytest.approx(expected)


def test_a_child_is_born_from_its_own_seed_and_the_worlds_correlation_and_spread():
    world = hgm.World(-0.7, 0.35, np.array([1.3, -0.7] * 2000))
    parent = hgm.Simulated(0.3, 0.2, np.zeros(0))
    child = world.modify(parent, None, 7)
    draws = np.random.default_rng(7)
    assert (child.skill, child.gift) == hgm.offspring(0.3, 0.2, draws.standard_normal(2), -0.7, 0.35)
    assert (child.passes == (draws.random(4000) < world.chances(child.skill))).all()
    assert world.chances(0.3)[:2] == pytest.approx([CHANCE, 1 - CHANCE])
    assert world.modify(parent, None, 8).skill != child.skill


def test_worlds_draw_their_tasks_and_start_as_the_sheet_says():
    world = hgm.World.of(3, "mild", 20_000)
    assert (world.correlation, world.spread) == hgm.CONDITIONS["mild"]
    assert world.difficulty.mean() == pytest.approx(0.3, abs=0.03)
    assert world.difficulty.std() == pytest.approx(1.2, abs=0.03)
    world, found = hgm.explore(hgm.Config(budget=1, tasks=30), 3, "mild")
    root = found.archive.agents[0].artefact
    assert (root.skill, root.gift, len(world.difficulty)) == (-0.5, 0.1, 30)
    assert (root.passes == world.born(-0.5, 0.1, np.random.default_rng((3, 1))).passes).all()


def test_an_agents_trials_are_the_outcomes_that_it_was_born_with():
    world, found = hgm.explore(hgm.Config(budget=40, tasks=20), 4, "aligned")
    for agent in found.archive.agents:
        assert all(trial.passed == agent.artefact.passes[trial.task] for trial in agent.trials)
        if agent.parent is not None:
            again = world.modify(found.archive.agents[agent.parent].artefact, None, agent.seed)
            assert (again.skill, again.gift) == (agent.artefact.skill, agent.artefact.gift)


@pytest.mark.parametrize(
    ("flags", "name", "words"),
    [
        ({}, "hgm", {"guidance": "clade", "widening": 0.6, "cooldown": True, "initial": 5}),
        ({"policy": "own-score"}, "hgm", {"guidance": "own", "widening": 0.6, "cooldown": True, "initial": 5}),
        ({"cooldown": False, "initial": 2}, "hgm", {"guidance": "clade", "widening": 0.6, "cooldown": False, "initial": 2}),
        ({"widening": 0.5}, "hgm", {"guidance": "clade", "widening": 0.5, "cooldown": True, "initial": 5}),
        ({"policy": "dgm"}, "dgm", {}), ({"policy": "greedy"}, "greedy", {}), ({"policy": "random"}, "random_search", {}),
    ],
)  # fmt: skip
def test_policies_are_bound_to_their_flags(flags, name, words):
    policy = hgm.policy_of(hgm.Config(**flags))
    assert getattr(policy, "func", policy).__name__ == name
    assert getattr(policy, "keywords", {}) == words


def test_flags_without_effect_are_refused(tmp_path):
    for flags, message in (
        ({"policy": "dgm", "widening": 0.5}, "--widening 0.5 changes nothing under --policy dgm"),
        ({"policy": "greedy", "initial": 3}, "--initial 3 changes nothing"),
        ({"policy": "random", "cooldown": False}, "--cooldown False changes nothing"),
        ({"problem": "program", "tasks": len(plurals())}, f"--problem program has {len(plurals())}"),
    ):
        with Run(tmp_path / "r", 0, plots=False) as run, pytest.raises(UserError, match=message):
            hgm.main(hgm.Config(**flags), run, sandbox=here)
    hgm.refuse_idle(hgm.Config(tasks=len(plurals())))
    hgm.refuse_idle(hgm.Config(problem="program", tasks=len(plurals()) - 1))
    hgm.refuse_idle(hgm.Config(policy="own-score", widening=0.5, initial=0, cooldown=False))


def test_all_policies_meet_the_same_worlds():
    first, second = (hgm.explore(hgm.Config(policy=policy), 3, "mild") for policy in ("hgm", "greedy"))
    assert (first[0].difficulty == second[0].difficulty).all()
    roots = [found.archive.agents[0].artefact for _, found in (first, second)]
    assert (roots[0].passes == roots[1].passes).all()
    children = [next(a.artefact for a in found.archive.agents if a.parent == 0) for _, found in (first, second)]
    assert children[0].skill == children[1].skill


def test_predictions_leave_out_the_agents_own_trials_and_the_branch_of_the_best_descendant():
    archive = Archive(20, 100)
    world = hgm.World.of(0, "mismatch", 20)
    #         parent, passed, failed, skill
    rows = [(None, 4, 6, 0.0), (0, 3, 7, 0.1), (0, 5, 5, 0.2), (1, 9, 1, 0.3), (1, 2, 8, 2.0), (2, 0, 0, 0.5)]
    for i, (parent, passed, failed, skill) in enumerate(rows):
        archive.add(world.born(skill, 0.0, np.random.default_rng(i)), parent, i)
        for task in range(passed + failed):
            archive.start(Evaluate(i, task))
            archive.finish(Evaluate(i, task), passed=task < passed)
    found = hgm.predictions(archive, world)
    # Root: the best descendant is 3 (9 of 10), in the branch of 1, so that 2 with 5 of 10 is left; agent 1: 3 again, so that 4 is left.
    # Agent 2: its only child was never tried.
    as_pairs = lambda pairs: np.array(sorted(zip(*pairs, strict=True)))
    assert list(found) == list(hgm.PREDICTORS)
    assert as_pairs(found["own"]) == pytest.approx(np.array([(0.3, 0.9, 1), (0.4, 0.9, 1)]))
    assert as_pairs(found["clade"]) == pytest.approx(np.array([(2 / 10, 0.9, 1), (5 / 10, 0.9, 1)]))
    utility = lambda skill: world.chances(skill).mean()
    assert as_pairs(found["leaky_own"]) == pytest.approx(np.array([(0.3, utility(2.0), 1), (0.4, utility(2.0), 1), (0.5, utility(0.5), 1)]))
    assert as_pairs(found["leaky_clade"]) == pytest.approx(
        np.array([(23 / 50, utility(2.0), 1), (14 / 30, utility(2.0), 1), (5 / 10, utility(0.5), 1)])
    )
    for kind in ("own", "clade"):
        assert found[f"weighted_{kind}"][:2] == found[kind][:2]


def test_weights_are_the_evaluations_that_a_prediction_rests_on():
    archive = Archive(20, 100)
    world = hgm.World.of(0, "mismatch", 20)
    # parent, passed, failed: the root's best descendant is 3 (mean 1, never mind its two trials), in the branch of 1
    for i, (parent, passed, failed) in enumerate([(None, 4, 2), (0, 0, 0), (0, 1, 2), (1, 2, 0), (2, 3, 5)]):
        archive.add(world.born(0.0, 0.0, np.random.default_rng(i)), parent, i)
        for task in range(passed + failed):
            archive.start(Evaluate(i, task))
            archive.finish(Evaluate(i, task), passed=task < passed)
    found = hgm.predictions(archive, world)
    # Agent 1 was never tried and agent 2 keeps nothing beside its best child, so that the root alone is left.
    assert found["weighted_own"] == ([4 / 6], [1.0], [6])
    assert found["weighted_clade"] == ([4 / 11], [1.0], [11])
    assert [len(found[kind].x) for kind in ("leaky_own", "leaky_clade")] == [2, 2]


def test_correlation_from_summed_moments():
    rng = np.random.default_rng(0)
    x = rng.normal(size=50)
    y = x + rng.normal(size=50)
    ones = [1.0] * 50
    moments = hgm.moments_of(list(x[:20]), list(y[:20]), ones[:20]) + hgm.moments_of(list(x[20:]), list(y[20:]), ones[20:])
    assert hgm.correlation(moments) == pytest.approx(stats.pearsonr(x, y).statistic)
    weight = rng.integers(1, 5, size=50)  # a weight is so many equal pairs
    whole = stats.pearsonr(np.repeat(x, weight), np.repeat(y, weight)).statistic
    assert hgm.correlation(hgm.moments_of(list(x), list(y), list(weight))) == pytest.approx(whole)
    assert hgm.correlation(hgm.moments_of([0.0, 0.01], [0.01, 0.0], [1.0, 1.0])) == pytest.approx(-1.0)
    assert hgm.correlation(hgm.moments_of([1.0, 1.0], [1.0, 2.0], [1.0, 1.0])) == 0.0
    assert hgm.correlation(hgm.moments_of([1.0, 2.0], [1.0, 1.0], [1.0, 1.0])) == 0.0
    assert hgm.correlation(hgm.moments_of([], [], [])) == 0.0


def test_one_seed_is_a_block_of_worlds_met_under_every_condition(tmp_path):
    with Run(tmp_path / "r", 3, plots=False) as run:
        seen = trace(hgm, run, {"repeats": 2}, watch=["explore", "predictions"])
        (row,) = run.rows
    cfg = hgm.Config(**hgm.TINY)
    searches = seen.calls("explore")
    assert [call.args[1:] for call in searches] == [(3 * 2 + repeat, condition) for repeat in (0, 1) for condition in hgm.CONDITIONS]
    for condition in hgm.CONDITIONS:
        found = [call.result for call in searches if call.args[2] == condition]
        utilities = [world.chances(each.artefact.skill).mean() for world, each in found]
        assert seen.metrics[condition] == pytest.approx(np.mean(utilities), abs=1e-12)
        assert seen.logged[0][condition] == pytest.approx(utilities[0])
    assert seen.metrics["mismatch_minus_aligned"] == seen.metrics["mismatch"] - seen.metrics["aligned"]
    mismatch = [call.result[1].archive for call in searches if call.args[2] == "mismatch"]
    assert [call.args[0].agents for call in seen.calls("predictions")] == [archive.agents for archive in mismatch]
    assert seen.metrics["agents"] == np.mean([len(archive.agents) for archive in mismatch])
    for name in hgm.PREDICTORS:
        pooled = [call.result[name] for call in seen.calls("predictions")]
        x, y, weight = ([value for pairs in pooled for value in pairs[k]] for k in range(3))
        assert seen.metrics[f"{name}_correlation"] == pytest.approx(hgm.correlation(hgm.moments_of(x, y, weight)), abs=1e-12)
    for kind in ("", "weighted_"):
        gain = seen.metrics[f"{kind}clade_correlation"] - seen.metrics[f"{kind}own_correlation"]
        assert seen.metrics[f"{kind}correlation_gain"] == gain
    assert row["mismatch"] == seen.metrics["mismatch"]
    assert all(archive.finished == cfg.budget for archive in mismatch)


def frail(source, name, args):
    if name == "rewrite" and args[2] % 2:
        raise SandboxError("every other rewrite fails")
    return here(source, name, args)


@pytest.mark.parametrize("problem", ["simulator", "program"])
def test_killed_in_its_second_search_it_continues(tmp_path, problem):
    words = {"changes": {"problem": problem}} | ({"sandbox": frail} if problem == "program" else {})
    straight = finish("hgm", tmp_path / "straight", **words)
    with mock.patch.object(Run, "log", side_effect=[None, Killed]), pytest.raises(Killed):
        finish("hgm", tmp_path / "killed", **words)
    assert finish("hgm", tmp_path / "killed", **words)["metrics"] == straight["metrics"]


def here(source, name, args):
    """The programs of this file are trusted."""
    space: dict = {}
    try:
        exec(source, space)
        return space[name](*args)
    except Exception as error:
        raise SandboxError(str(error)) from None


def test_the_program_solves_and_rewrites_its_own_text():
    assert [here(hgm.PROGRAM, "solve", [word]) for word in ("book", "box")] == ["books", "boxs"]
    child = hgm.PROGRAM
    for seed in range(30):
        child = here(child, "rewrite", [child, [["box", "boxes"], ["city", "cities"], ["man", "men"]], seed])
        assert isinstance(here(child, "solve", ["book"]), str)
    assert child != hgm.PROGRAM
    assert [line for line in child.splitlines() if not line.startswith(("RULES", "HABITS"))] == [
        line for line in hgm.PROGRAM.splitlines() if not line.startswith(("RULES", "HABITS"))
    ]
    space: dict = {}
    exec(child, space)
    assert space["HABITS"].keys() == {"look", "edits", "context", "restless"}


def test_looking_at_a_failure_makes_the_rule_for_it():
    eager = hgm.PROGRAM.replace('"look": 0.5', '"look": 1.0')
    child = here(eager, "rewrite", [eager, [["box", "boxes"]], 0])
    assert here(child, "solve", ["box"]) == "boxes"


def test_programs_are_shown_their_failures_and_judged_on_unseen_nouns(tmp_path):
    calls = []

    def recording(source, name, args):
        calls.append((source, name, args))
        return here(source, name, args)

    with Run(tmp_path / "r", 2, plots=False) as run, mock.patch.object(run, "html") as html:
        seen = trace(hgm, run, {"problem": "program"}, watch=["accuracy", "search"], sandbox=recording)
        (row,) = run.rows
    assert html.call_count == 1
    nouns, budget, tasks = plurals(), hgm.TINY["budget"], hgm.TINY["tasks"]
    searches = seen.calls("search")
    for repeat, call in enumerate(searches):
        number = 2 * hgm.TINY["repeats"] + repeat
        order = np.random.default_rng(number).permutation(len(nouns))
        assert call.args[3] == [nouns[i] for i in order[:tasks]]
        assert (call.args[0], call.args[4], call.keywords["seed"]) == (hgm.PROGRAM, budget, number)
        assert call.keywords["policy"].keywords["guidance"] == "clade"
        assert (tmp_path / "r" / f"search-{repeat}.jsonl").exists()
        judged = seen.calls("accuracy", step=repeat)
        assert [each.args[0] for each in judged] == [call.result.artefact, hgm.PROGRAM]
        assert all(each.args[1] == [nouns[i] for i in order[tasks:]] for each in judged)
        for agent in call.result.archive.agents:
            for trial in agent.trials:
                word, wanted = call.args[3][trial.task]
                answer = here(agent.artefact, "solve", [word])
                assert trial.passed == (answer == wanted)
                assert trial.note == f"{word}: {answer}"
    found = [(call.result.archive, *(each.result for each in seen.calls("accuracy", step=i))) for i, call in enumerate(searches)]
    expected = {"agents": [len(a.agents) for a, _, _ in found], "failed_modifications": [a.failed_modifications for a, _, _ in found]}
    expected |= {"unseen": [b for _, b, _ in found], "unseen_at_start": [c for _, _, c in found]}
    assert seen.metrics == {name: pytest.approx(np.mean(values)) for name, values in expected.items()}
    assert {name: row[name] for name in expected} == seen.metrics
    assert [logged["unseen"] for logged in seen.logged] == pytest.approx(list(np.cumsum(expected["unseen"]) / [1, 2]))
    rewrites = [(source, args) for source, name, args in calls if name == "rewrite"]
    assert all(source == args[0] for source, args in rewrites)
    assert rewrites[0][1][1] == [list(searches[0].args[3][t.task]) for t in searches[0].result.archive.agents[0].trials if not t.passed]
    children = {agent.artefact for call in searches for agent in call.result.archive.agents[1:]}
    tried = {source for source, name, args in calls if name == "solve" and args == ["book"]}
    assert children <= tried, "a child that does not run is no child"


def test_a_rewrite_that_does_not_run_is_a_failed_modification(tmp_path):
    def breaking(source, name, args):
        return "def solve(word):\n    return 1 / 0\n" if name == "rewrite" else here(source, name, args)

    with Run(tmp_path / "r", 0, plots=False) as run:
        metrics = hgm.main(hgm.Config(problem="program", repeats=1, budget=20, tasks=12), run, sandbox=breaking)
    assert (metrics["agents"], metrics["failed_modifications"]) == (1, 20)


def test_the_strictest_sandbox_of_the_system_is_taken(monkeypatch):
    source = "import math\ndef f(x):\n    print('words')\n    return [x, math.floor(2.5), 'a\\n', (None, True)]"
    for refuses in (False, True):
        if refuses:
            monkeypatch.setattr("stillroom.lm.sandbox._filter", mock.Mock(side_effect=UserError("no seccomp")))
        with hgm.strictest() as sandbox:
            assert not refuses or sandbox is run_function
            if sandbox is not run_function:
                assert sandbox.args[0].limits == isolation.Limits(seconds=5.0, memory_mb=512, output=1_000_000)
            assert sandbox(source, "f", ["ü'"]) == ["ü'", 2, "a\n", (None, True)]
            for wrong in ("def f(:", "def f(x): return 1 / 0", "g = 1", "def f(x): return object()", "def f(x): raise SystemExit"):
                with pytest.raises(SandboxError):
                    sandbox(wrong, "f", [1])
            assert sandbox(hgm.PROGRAM, "solve", ["book"]) == "books"


def test_programs_improve_in_the_sandbox_and_a_killed_run_continues(tmp_path):
    cfg = hgm.Config(problem="program", repeats=1, budget=40, tasks=20)
    with Run(tmp_path / "a", 0) as run:
        metrics = hgm.main(cfg, run)
    assert metrics["agents"] > 5
    assert metrics["unseen"] != metrics["unseen_at_start"]
    assert (tmp_path / "a" / "samples" / "tree of the first search.html").exists()
    journal = (tmp_path / "a" / "search-0.jsonl").read_text()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "search-0.jsonl").write_text(journal[: len(journal) // 2])
    with Run(tmp_path / "b", 0, plots=False) as run:
        assert hgm.main(cfg, run, sandbox=here) == metrics
    assert (tmp_path / "b" / "search-0.jsonl").read_text() == journal


def test_a_program_that_fails_is_wrong_everywhere():
    assert hgm.accuracy("def solve(word):\n    return 1 / 0\n", [("book", "books")], here) == 0.0
    assert hgm.accuracy(hgm.PROGRAM, [("book", "books"), ("box", "boxes")], here) == 0.5


def test_one_run_end_to_end(tmp_path, capsys):
    assert cli.main(["run", "hgm", "--repeats", "2", "--budget", "60", "--tasks", "20", "--out", str(tmp_path / "r"), "--quiet"]) == 0
    page = (tmp_path / "r" / "report.html").read_text()
    assert page.count('<div class="tree">') == 2
    assert "clade_correlation" in capsys.readouterr().out + page


def test_every_claim_names_arms_and_metrics_that_exist(tmp_path):
    small = {"repeats": 1, "budget": 20, "tasks": 10}
    seen = {}
    for arm in {claim.arm for claim in hgm.CLAIMS} | {str(claim.versus) for claim in hgm.CLAIMS if isinstance(claim.versus, str)}:
        cfg = dataclasses.replace(hgm.Config(), **{**hgm.ARMS[arm], **small})
        with Run(tmp_path / arm.replace(":", ""), 0, plots=False) as run:
            seen[arm] = hgm.main(cfg, run, sandbox=here)
    for claim in hgm.CLAIMS:
        assert claim.metric in seen[claim.arm]
        assert isinstance(claim.versus, float) or claim.metric in seen[claim.versus]
    assert set(hgm.ARMS) == set(seen), "an arm without a claim"


def test_one_task_at_a_time_beats_testing_in_full_on_paired_worlds():
    """By .3 in the ledger, with a spread of .25 a world, so that 24 worlds hold it by five standard errors. The clade against the own
    score (.05, of a spread as wide) needs the hundreds of worlds of `stillroom verify`; how they differ is held by the policies' tests."""

    def returned(policy, seed):
        world, found = hgm.explore(hgm.Config(policy=policy), seed, "mismatch")
        return world.chances(found.artefact.skill).mean()

    clade, greedy = (np.array([returned(policy, seed) for seed in range(5000, 5024)]) for policy in ("hgm", "greedy"))
    assert stats.ttest_1samp(clade - greedy, 0.0).confidence_interval(0.95).low > 0.1
