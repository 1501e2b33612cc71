"""Small problems that worker processes can import, and a search to be killed from outside."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from stillroom.search import Limits, search

TASKS = list(range(8))


def modify(artefact, log, seed):
    """A number near the parent's."""
    return artefact + (seed % 7 - 2)


def evaluate(artefact, task):
    """Passes the easier tasks first."""
    return artefact >= task * 2, f"{artefact} against {task * 2}"


def hostile_modify(artefact, log, seed):
    """Every third one fails in a way of its own."""
    match seed % 9:
        case 0:
            raise RuntimeError("no idea")
        case 3:
            return None
        case 6:
            return artefact
    return artefact + 1


def hostile_evaluate(artefact, task):
    """One task for each way to fail; tasks 0 to 3 are fair."""
    match task:
        case 4:
            raise SystemExit("leaving")
        case 5:
            time.sleep(60)
        case 6:
            os.kill(os.getpid(), 9)
        case 7:
            return "well done"
    return True


def slow_evaluate(artefact, task):
    """Notes every call in the file that STILLROOM_TEST_CALLS names."""
    with open(os.environ["STILLROOM_TEST_CALLS"], "a") as file:
        file.write(f"{artefact} {task}\n")
    time.sleep(0.01)
    return evaluate(artefact, task)


if __name__ == "__main__":  # python -m tests.search.problems JOURNAL WORKERS
    search(3, modify, slow_evaluate, TASKS, 60, seed=1, journal=Path(sys.argv[1]), workers=int(sys.argv[2]), limits=Limits(seconds=30))
