"""HGM: the sheet's table at reduced seeds, predictions without leaks by hand, programs that rewrite themselves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from stillroom import cli
from stillroom.core.run import Run
from stillroom.recipes.agents import hgm
from stillroom.search import Archive, Evaluate, SandboxError

# The sheet's table: mean and standard error over 60 seeds.
TABLE = {
    ("mismatch", "hgm"): (0.797, 0.024), ("mismatch", "own-score"): (0.731, 0.026),
    ("mismatch", "dgm"): (0.635, 0.025), ("mismatch", "greedy"): (0.500, 0.018),
    ("aligned", "hgm"): (0.942, 0.012), ("aligned", "own-score"): (0.942, 0.010),
    ("mild", "hgm"): (0.729, 0.020), ("independent", "hgm"): (0.885, 0.018),
}  # fmt: skip


@pytest.mark.parametrize(("condition", "policy"), TABLE)
def test_the_sheets_table_is_met_within_noise(condition, policy):
    seeds = 24
    cfg = hgm.Config(policy=policy)
    values, agents = [], []
    for seed in range(5000, 5000 + seeds):
        world, found = hgm.explore(cfg, seed, condition)
        values.append(world.chances(found.artefact.skill).mean())
        agents.append(len(found.archive.agents))
    mean, error = TABLE[condition, policy]
    assert abs(np.mean(values) - mean) < 3 * error * np.hypot(1, (60 / seeds) ** 0.5)
    expected = {"hgm": (48, 48), "own-score": (48, 48), "dgm": (11, 20), "greedy": (11, 11)}[policy]
    assert expected[0] <= np.mean(agents) <= expected[1]


def test_modifications_have_the_stated_moments():
    world = hgm.World.of(0, "mismatch", 60)
    parent = world.born(0.3, 0.2, np.random.default_rng(0))
    children = [world.modify(parent, None, seed) for seed in range(4000)]
    skill = np.array([child.skill for child in children]) - 0.3 - 0.2
    gift = np.array([child.gift for child in children]) - 0.2
    assert skill.mean() == pytest.approx(0, abs=0.02)
    assert skill.std() == pytest.approx(0.35, rel=0.04)
    assert gift.std() == pytest.approx(0.35, rel=0.04)
    assert np.corrcoef(skill, gift)[0, 1] == pytest.approx(-0.7, abs=0.03)
    again = world.modify(parent, None, 7)
    assert (again.skill, again.gift) == (children[7].skill, children[7].gift)
    assert (again.passes == children[7].passes).all()
    passes = np.mean([world.born(0.3, 0.2, np.random.default_rng(i)).passes for i in range(4000)], axis=0)
    assert passes == pytest.approx(1 / (1 + np.exp(-(0.3 - world.difficulty))), abs=0.04)


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
    own, clade, leaky_own, leaky_clade = hgm.predictions(archive, world)
    # Root: the best descendant is 3 (9 of 10), in the branch of 1, so that 2 with 5 of 10 is left; agent 1: 3 again, so that 4 is left.
    # Agent 2: its only child was never tried.
    as_pairs = lambda pairs: np.array(sorted(zip(*pairs, strict=True)))
    assert as_pairs(own) == pytest.approx(np.array([(0.3, 0.9), (0.4, 0.9)]))
    assert as_pairs(clade) == pytest.approx(np.array([(2 / 10, 0.9), (5 / 10, 0.9)]))
    utility = lambda skill: world.chances(skill).mean()
    assert as_pairs(leaky_own) == pytest.approx(np.array([(0.3, utility(2.0)), (0.4, utility(2.0)), (0.5, utility(0.5))]))
    assert as_pairs(leaky_clade) == pytest.approx(np.array([(23 / 50, utility(2.0)), (14 / 30, utility(2.0)), (5 / 10, utility(0.5))]))


def test_correlation_from_summed_moments():
    rng = np.random.default_rng(0)
    x = rng.normal(size=50)
    y = x + rng.normal(size=50)
    moments = hgm.moments_of(list(x[:20]), list(y[:20])) + hgm.moments_of(list(x[20:]), list(y[20:]))
    assert hgm.correlation(moments) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert hgm.correlation(hgm.moments_of([1.0, 1.0], [1.0, 2.0])) == 0.0
    assert hgm.correlation(hgm.moments_of([], [])) == 0.0


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
