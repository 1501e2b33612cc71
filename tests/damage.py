"""Models' folders damaged on purpose: mutants of their JSON files, and a pickle that tells when it was opened."""

from __future__ import annotations

import copy
import json
import random
import warnings
from pathlib import Path

from stillroom.core.errors import UserError


def rewrite(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


class Trap:
    opened = False

    def __reduce__(self):
        return (setattr, (Trap, "opened", True))


NONSENSE = [
    None, True, 0, -1, 2.5, 2**31, 10**30, 10**400, 1e308, float("nan"), float("-inf"), "", "x", "9" * 50, "../../etc", [], [[]], {},
    [None], {"a": {"b": [1, {"c": None}]}}, [1, "x", 2.5], [[0] * 3] * 2, "\x00", {"": 0},
]  # fmt: skip


def mutated(value, rng: random.Random):
    """A valid JSON object with one or two of its values, at any depth, lost, replaced or wrapped."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2))):
        places = [(value, key) for key in value] + [(v, k) for v in value.values() if isinstance(v, dict) for k in v]
        holder, key = rng.choice(places) if places else (value, "x")
        kind = rng.randrange(4)
        if kind == 0:
            holder.pop(key, None)
        elif kind == 1:
            holder[key] = [holder.get(key)]
        else:
            holder[key] = rng.choice(NONSENSE)
    return value


def survives(load, file: Path, original: str, cases: int, folder: Path | None = None) -> int:
    """How many of the mutants were refused; each is, with a message that names the folder (the file's own), or loads and answers."""
    refused: list[str] = []
    for case in range(cases):
        file.write_text(json.dumps(mutated(json.loads(original), random.Random(case))))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load()
        except UserError as error:
            refused.append(f"case {case}: {error}")
    file.write_text(original)
    assert all(str(folder or file.parent) in message for message in refused), refused
    return len(refused)
