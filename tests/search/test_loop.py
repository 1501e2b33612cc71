"""The loop, its journal and its workers: nothing is lost, nothing is repeated, nothing stops it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
import pytest

from stillroom.core.errors import UserError
from stillroom.search import Limits, greedy, hgm, own_score, random_search, search
from stillroom.search.journal import Journal, read
from stillroom.search.loop import child_seed
from stillroom.search.workers import attempt, guarded
from tests.search import problems
from tests.search.problems import TASKS, evaluate, modify

POLICIES = [hgm, own_score, greedy, random_search]


def shape(found):
    return [(a.parent, a.artefact, a.passed, a.failed, a.trials) for a in found.archive.agents]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_budget_is_spent_and_no_agent_meets_a_task_twice(policy):
    found = search(5, modify, evaluate, TASKS, 60, policy=policy, seed=3)
    assert found.archive.finished == found.archive.submitted == 60
    assert found.reason == ""
    assert sum(a.passed + a.failed for a in found.archive.agents) == 60 + len(TASKS)
    for agent in found.archive.agents:
        tasks = [trial.task for trial in agent.trials]
        assert len(set(tasks)) == len(tasks)
        assert sorted(tasks + agent.untried) == TASKS
    assert [trial.task for trial in found.archive.agents[0].trials] == TASKS
    assert found.artefact > 5


def test_attempt_k_of_an_agent_gives_the_same_child_under_every_policy():
    founds = [search(5, modify, evaluate, TASKS, 40, policy=policy, seed=3) for policy in POLICIES]
    for found in founds:
        agents = found.archive.agents
        for agent in agents[1:]:
            seeds = [child_seed(agents[agent.parent].seed, k) for k in range(agents[agent.parent].attempts)]
            assert agent.seed in seeds
            assert agent.artefact == modify(agents[agent.parent].artefact, None, agent.seed)


def test_the_log_shows_the_parents_trials_and_all_agents():
    seen = []

    def look(artefact, log, seed):
        seen.append(log)
        return artefact + 1

    found = search(5, look, evaluate, TASKS, 20, seed=0)
    assert seen[0].agents == [(None, 5, 3, 5)]
    assert seen[0].trials[3] == (3, False, "5 against 6")
    for log in seen:
        assert log.agents[log.agent][2:] == (sum(t.passed for t in log.trials), sum(not t.passed for t in log.trials))
    assert len(seen) == len(found.archive.agents) - 1


def test_a_root_that_solves_nothing_is_reported():
    found = search(-9, modify, evaluate, TASKS, 60)
    assert "root passed none of its 8 tasks" in found.reason
    assert len(found.archive.agents) == 1
    assert found.archive.finished == 0


def test_modifications_that_always_fail_end_the_search_with_their_error():
    def broken(artefact, log, seed):
        raise RuntimeError("no idea")

    for policy in POLICIES:
        found = search(5, broken, evaluate, TASKS, 60, policy=policy, patience=4)
        assert "4 modifications failed" in found.reason
        assert "RuntimeError: no idea" in found.reason
        assert found.archive.failed_modifications == 4


def test_artefacts_that_cannot_be_compared_are_kept():
    found = search(np.zeros(3), lambda a, log, seed: a + 1, lambda a, task: a[0] >= task, TASKS, 20)
    assert len(found.archive.agents) > 1


@pytest.mark.parametrize("answer", [2, -1, "yes", None, [], (True,), float("nan"), (True, "fine", 3), {}, object()])
def test_garbage_is_a_failed_task(answer):
    found = search(5, modify, lambda a, task: evaluate(a, task) if task < 4 else answer, TASKS, 10)
    note = found.archive.agents[0].trials[7].note
    assert not found.archive.agents[0].trials[7].passed
    assert "neither 0, 1, True, False" in note


@pytest.mark.parametrize("answer", [1, 1.0, True, np.True_, np.int64(1), (True, "fine")])
def test_what_counts_as_passed(answer):
    assert search(5, modify, lambda a, task: answer, TASKS, 1).archive.agents[0].passed == 8


def test_empty_work_is_refused():
    for tasks, budget in (([], 5), (TASKS, 0)):
        with pytest.raises(UserError, match="at least one task and a budget"):
            search(5, modify, evaluate, tasks, budget)


# -- the journal ---------------------------------------------------------------------------------------------------------------------
def test_a_search_cut_after_any_number_of_bytes_ends_as_the_uninterrupted_one(tmp_path):
    file = tmp_path / "whole.jsonl"
    whole = shape(search(5, modify, evaluate, TASKS, 12, seed=2, journal=file))
    data = file.read_bytes()
    cuts = [*random.Random(0).sample(range(len(data)), 25), 0, 1, len(data) - 1, len(data)]
    for cut in cuts:
        part = tmp_path / "part.jsonl"
        part.write_bytes(data[:cut])
        assert shape(search(5, modify, evaluate, TASKS, 12, seed=2, journal=part)) == whole
        assert part.read_bytes() == data
    assert shape(search(5, modify, evaluate, TASKS, 12, seed=2)) == whole  # and without a journal


def test_a_larger_budget_continues_a_finished_search(tmp_path):
    file = tmp_path / "j.jsonl"
    short = search(5, modify, evaluate, TASKS, 10, seed=2, journal=file)
    long = search(5, modify, evaluate, TASKS, 25, seed=2, journal=file)
    assert long.archive.finished == 25
    assert [a.artefact for a in long.archive.agents][: len(short.archive.agents)] == [a.artefact for a in short.archive.agents]


def test_a_journal_of_another_search_and_a_damaged_one_are_refused(tmp_path):
    file = tmp_path / "j.jsonl"
    search(5, modify, evaluate, TASKS, 10, seed=2, journal=file)
    for changed in ({"seed": 3}, {"policy": greedy}, {"about": "other"}):
        with pytest.raises(UserError, match="belongs to another search"):
            search(5, modify, evaluate, TASKS, 10, **{"seed": 2, "journal": file, **changed})
    with pytest.raises(UserError, match="belongs to another search"):
        search(6, modify, evaluate, TASKS, 10, seed=2, journal=file)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:4], "{half a li\n", *lines[4:]]))
    with pytest.raises(UserError, match="line 5 is not JSON"):
        search(5, modify, evaluate, TASKS, 10, seed=2, journal=file)
    for other in ('{"some": "other file"}\n', "no journal, and no end of line"):
        file.write_text(other)
        with pytest.raises(UserError, match="not the journal of a search"):
            search(5, modify, evaluate, TASKS, 10, seed=2, journal=file)
        with pytest.raises(UserError, match="not the journal of a search"):
            read(file)
        assert file.read_text() == other


def test_two_processes_cannot_write_one_journal(tmp_path):
    file = tmp_path / "j.jsonl"
    held = Journal(file, {"a": 1})
    code = f"from stillroom.search.journal import Journal; Journal({str(file)!r}, {{'a': 1}})"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "UserError" in other.stderr
    assert "is being written by another process" in other.stderr
    held.close()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_artefacts_that_are_not_json_are_failed_modifications_when_journalled(tmp_path):
    found = search(5, lambda a, log, seed: {1, 2}, evaluate, TASKS, 10, journal=tmp_path / "j.jsonl", patience=3)
    assert "not JSON" in found.reason
    with pytest.raises(UserError, match="artefacts that are JSON"):
        search({1, 2}, modify, evaluate, TASKS, 10, journal=tmp_path / "other.jsonl")
    assert not (tmp_path / "other.jsonl").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_started_again_it_neither_repeats_nor_loses_an_evaluation(tmp_path, workers):
    file, calls = tmp_path / "j.jsonl", tmp_path / "calls.txt"
    command = [sys.executable, "-m", "tests.search.problems", str(file), str(workers)]
    settings = {"env": os.environ | {"STILLROOM_TEST_CALLS": str(calls)}, "cwd": Path(__file__).parents[2]}
    kills = 0
    for goal in (20, 60, 100, None):
        process = subprocess.Popen(command, **settings)
        while goal is not None and process.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < goal):
            time.sleep(0.002)
        if goal is not None:
            kills += process.poll() is None
            process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills >= 2
    assert process.returncode == 0
    _, lines = read(file)
    asked = [tuple(line["evaluate"]) for line in lines if "evaluate" in line]
    done = Counter(line["job"] for line in lines if "passed" in line or "child" in line)
    assert len(asked) == len(set(asked)) == 60 + len(TASKS)  # none asked for twice
    assert set(done.values()) == {1}  # none reported twice, none lost
    assert len(done) == sum("evaluate" in line or "expand" in line for line in lines)
    ran = Counter(calls.read_text().split("\n")[:-1])
    assert sum(ran.values()) - len(asked) <= kills * max(workers, 1)  # only those under way at a kill ran again
    if workers == 0:
        assert shape(search(3, modify, evaluate, TASKS, 60, seed=1)) == shape(
            search(3, modify, problems.slow_evaluate, TASKS, 60, seed=1, journal=file)
        )


# -- workers -------------------------------------------------------------------------------------------------------------------------
def test_whatever_jobs_do_the_search_goes_on_and_the_journal_says_so(tmp_path):
    file = tmp_path / "j.jsonl"
    found = search(
        5, problems.hostile_modify, problems.hostile_evaluate, TASKS, 12, workers=2, limits=Limits(seconds=1.0), journal=file, seed=4
    )
    assert found.archive.finished == 12
    notes = {trial.task: trial.note for trial in found.archive.agents[0].trials}
    assert [notes[task] for task in range(4)] == [""] * 4
    assert "SystemExit: leaving" in notes[4]
    assert "no answer after 1 s" in notes[5]
    assert "exit code -9" in notes[6]
    assert "'well done'" in notes[7]
    assert found.archive.agents[0].passed == 4
    journalled = [line["note"] for line in read(file)[1] if "note" in line]
    assert sum("no idea" in note or "changed nothing" in note for note in journalled) == found.archive.failed_modifications


def test_a_guarded_job_takes_its_offspring_and_its_files_with_it(tmp_path):
    def job():
        import tempfile

        Path(tempfile.gettempdir(), "left").write_text("x")
        child = subprocess.Popen(["sleep", "60"])
        return child.pid, tempfile.gettempdir()

    pid, folder = guarded(job, (), Limits(seconds=20)).value
    assert not Path(folder).exists()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            break
        time.sleep(0.01)
    else:
        pytest.fail("the job's child lives on")


def test_what_a_job_imports_the_next_one_finds():
    def job():
        known = "wave" in sys.modules
        import wave

        return known, wave.__name__

    sys.modules.pop("wave", None)
    assert guarded(job, (), Limits(seconds=20)).value == (False, "wave")
    assert guarded(job, (), Limits(seconds=20)).value == (True, "wave")


def test_memory_is_limited_and_answers_that_cannot_be_sent_are_errors():
    assert "MemoryError" in guarded(lambda: len(bytearray(3 << 30)), (), Limits(seconds=20, memory_mb=2048)).error
    assert "could not be sent" in guarded(lambda: lambda: 0, (), Limits(seconds=20)).error


class Shuffled(Executor):
    """As many jobs under way as asked for, finishing in a random order: a pool of workers without processes."""

    def __init__(self, seed: int):
        self.random, self.jobs = random.Random(seed), []

    def submit(self, call, /, *args, **keywords):
        future = Waiting(self)
        self.jobs.append((future, args[0], args[1]))
        return future

    def one(self):
        future, call, args = self.jobs.pop(self.random.randrange(len(self.jobs)))
        future.set_result(attempt(call, args))


class Waiting(Future):
    """A future that knows its pool."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool


def test_asynchronous_equals_synchronous_in_distribution(monkeypatch):
    from stillroom.search import loop

    def wait(futures, return_when):
        next(iter(futures)).pool.one()
        done = {future for future in futures if future.done()}
        return type("Waited", (), {"done": done})()

    monkeypatch.setattr(loop, "wait", wait)

    def noisy(artefact, task):
        return random.Random(f"{artefact} {task}").random() < 1 / (1 + np.exp(3 - artefact / 4))

    def step(artefact, log, seed):
        return artefact + random.Random(seed).gauss(0.5, 2)

    def run(seed, workers):
        pool = Shuffled(seed) if workers else None
        found = search(8.0, step, noisy, range(30), 150, seed=seed, workers=workers, executor=pool)
        assert found.archive.finished == 150
        return found.artefact, len(found.archive.agents)

    from scipy.stats import ks_2samp

    here, four = (np.array([run(seed, workers) for seed in range(40)]) for workers in (0, 4))
    assert ks_2samp(here[:, 0], four[:, 0]).pvalue > 0.05
    assert abs(here[:, 1].mean() - four[:, 1].mean()) < 1.5  # pending modifications count, so that workers do not all expand
    assert ks_2samp(here[:, 0], np.full(40, 8.0)).pvalue < 1e-6  # the test can tell: both found something


def test_one_worker_process_does_what_no_worker_does():
    assert shape(search(5, modify, evaluate, TASKS, 20, seed=6, workers=1)) == shape(search(5, modify, evaluate, TASKS, 20, seed=6))


def test_journal_lines_are_plain_json(tmp_path):
    file = tmp_path / "j.jsonl"
    search(5, modify, evaluate, TASKS, 5, journal=file)
    assert all(isinstance(json.loads(line), dict) for line in file.read_text().splitlines())
