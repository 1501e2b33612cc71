"""Recipe configs as agents: an agent is a dict of changed flags, a modification changes one or two more, a task is a seed.

What may change, and how far, is read from the config's own annotations (`stillroom.core.config`): the command line, the Python API and this
search share one declaration.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
from annotated_types import Ge, Gt, Le, Lt

from stillroom.core import config as configs
from stillroom.core.errors import UserError
from stillroom.search.archive import Log


@dataclasses.dataclass(frozen=True)
class Flag:
    """One value of a config that a search may change."""

    name: str
    kind: Literal["float", "int", "bool", "choice"]
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[Any, ...] = ()

    def draw(self, value: Any, rng: np.random.Generator) -> Any:
        """A neighbour of `value`: mostly a small step (15 % of the range where it has two ends, else a factor of 1.6), now and then a
        long one (Student's t with two degrees of freedom), so that the search does not hang on the choice of the step."""
        if self.kind == "bool":
            return not value
        if self.kind == "choice":
            return str(rng.choice([choice for choice in self.choices if choice != value])) if len(self.choices) > 1 else value
        if math.isfinite(self.low) and math.isfinite(self.high):
            moved = value + rng.standard_t(2) * 0.15 * (self.high - self.low)
            moved = 2 * self.high - moved if moved > self.high else 2 * self.low - moved if moved < self.low else moved
        elif value == 0:
            moved = 10 ** rng.uniform(-4, 0)
        else:
            moved = value * math.exp(min(max(rng.standard_t(2) * 0.5, -5), 5))
        if self.kind == "int" and round(moved) == value:
            moved = value + (1 if moved >= value or value - 1 < self.low else -1)
            moved = value - 1 if moved > self.high else moved
        return self._fit(moved)

    def draw_anywhere(self, value: Any, rng: np.random.Generator) -> Any:
        """A draw over the whole range, for random search: uniform between two ends, else log-uniform within a factor of 10."""
        if self.kind in ("bool", "choice"):
            choices = self.choices or (False, True)
            return choices[int(rng.integers(len(choices)))]
        if math.isfinite(self.low) and math.isfinite(self.high):
            drawn = rng.uniform(self.low, self.high)
        else:
            drawn = max(value, 1e-3) * 10 ** rng.uniform(-1, 1)
        return self._fit(drawn)

    def _fit(self, value: float) -> int | float:
        """Three digits for people to read, or a whole number, then into the range."""
        short = round(value) if self.kind == "int" else float(f"{value:.3g}")
        return type(short)(min(max(short, self.low), self.high))


def flags_of(config: Any, names: Iterable[str] = ()) -> list[Flag]:
    """The flags of a config that a search may change: those called `names`, else all numbers with a fraction, choices and switches.

    Whole numbers (steps, sizes) change what a run costs, so they are left alone unless named. UserError for a name that the config
    lacks or whose type cannot be varied.
    """
    found = {flag.name: flag for flag in _walk(config, "")}
    wanted = [name.removeprefix("--").replace("-", "_") for name in names]
    for name in wanted:
        if name not in found:
            raise UserError(f"--tune {name}: no such flag can be varied; there are {', '.join(found)}.", code=2)
    return [found[name] for name in wanted] if wanted else [flag for flag in found.values() if flag.kind != "int"]


def _walk(config: Any, prefix: str) -> Iterable[Flag]:
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, hint, name = getattr(config, field.name), hints[field.name], prefix + field.name
        plain = get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
        if dataclasses.is_dataclass(value):
            yield from _walk(value, f"{name}.")
        elif plain is bool:
            yield Flag(name, "bool")
        elif get_origin(plain) is Literal and all(isinstance(choice, str) for choice in get_args(plain)):
            yield Flag(name, "choice", choices=get_args(plain))
        elif plain in (int, float) and isinstance(value, int | float):
            low, high = -math.inf, math.inf
            tiny = 1 if plain is int else 1e-9
            for bound in configs.bounds(hint):
                match bound:
                    case Ge(limit) | Gt(limit):
                        low = max(low, float(limit) + (tiny if isinstance(bound, Gt) else 0))  # type: ignore[arg-type]
                    case Le(limit) | Lt(limit):
                        high = min(high, float(limit) - (tiny if isinstance(bound, Lt) else 0))  # type: ignore[arg-type]
            yield Flag(name, "int" if plain is int else "float", low, high)


@dataclasses.dataclass(frozen=True)
class Mutate:
    """`modify` without a model: change one flag, or two with probability 0.4."""

    base: Any
    flags: tuple[Flag, ...]
    anywhere: bool = False
    """Draw every flag over its whole range instead, whatever the parent: random search."""

    def __call__(self, artefact: dict[str, Any], log: Log, seed: int) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        now = configs.flatten(configs.override(self.base, artefact))
        if self.anywhere:
            return {flag.name: flag.draw_anywhere(now[flag.name], rng) for flag in self.flags}
        count = min(len(self.flags), 2 if rng.random() < 0.4 else 1)
        chosen = [self.flags[i] for i in rng.choice(len(self.flags), count, replace=False)]
        return valid(self.base, artefact | {flag.name: flag.draw(now[flag.name], rng) for flag in chosen})


def valid(base: Any, artefact: dict[str, Any]) -> dict[str, Any]:
    """`artefact`, without the changes that change nothing. UserError when a value is out of range."""
    configs.check(configs.override(base, artefact))
    usual = configs.flatten(base)
    return {name: value for name, value in artefact.items() if value != usual[name]}


@dataclasses.dataclass(frozen=True)
class Seeds:
    """`evaluate`: run the recipe with the agent's flags and one seed, and hold one metric against a threshold.

    Finished runs stay in `folder` and are only read again, by any later search as well.
    """

    recipe: str
    arm: str | None
    base: Any
    metric: str
    better: Literal["higher", "lower"]
    threshold: float
    folder: Path
    cache: Path | None = None

    def measure(self, artefact: dict[str, Any], seed: int) -> float:
        """The metric of one run; a number that is not finite counts as infinitely bad."""
        value = self.run(artefact, seed)["metrics"][self.metric]
        return value if math.isfinite(value) else -math.inf if self.better == "higher" else math.inf

    def run(self, artefact: dict[str, Any], seed: int) -> dict[str, Any]:
        """The result of one run (see `catalogue.execute`)."""
        import torch

        from stillroom.catalogue.execute import execute
        from stillroom.core.run import Run
        from stillroom.core.store import Store

        torch.set_num_threads(1)
        with Run(self.place(artefact, seed), seed, store=Store(self.cache), plots=False, wait=True) as run:
            return execute(self.recipe, configs.override(self.base, artefact), run, arm=self.arm)

    def place(self, artefact: dict[str, Any], seed: int) -> Path:
        from stillroom.core.store import fingerprint

        return self.folder / fingerprint(self.recipe, configs.override(self.base, artefact))[:12] / f"seed{seed}"

    def __call__(self, artefact: dict[str, Any], seed: int) -> tuple[bool, str]:
        value = self.measure(artefact, seed)
        passed = value >= self.threshold if self.better == "higher" else value <= self.threshold
        return passed, f"{self.metric} {value:.4g} at seed {seed}"


@dataclasses.dataclass(frozen=True)
class Propose:
    """`modify` by a language model behind an OpenAI-compatible server: it sees the recipe's card, the flags with their ranges, the
    parent's trials and every agent so far, and answers with a JSON object of changed flags. A bad answer is a failed modification."""

    base: Any
    flags: tuple[Flag, ...]
    card: str
    goal: str
    url: str
    model: str

    def __call__(self, artefact: dict[str, Any], log: Log, seed: int) -> dict[str, Any]:
        answer = chat(self.url, self.model, self.prompt(artefact, log), seed)
        changes = json.loads(answer[answer.index("{") : answer.rindex("}") + 1])
        known = {flag.name: flag for flag in self.flags}
        other = [name for name in changes if name not in known]
        if other or not changes:
            raise ValueError(f"the model changed {other or 'nothing'}; it may change {', '.join(known)}")
        return valid(self.base, artefact | {name: _typed(known[name], value) for name, value in changes.items()})

    def prompt(self, artefact: dict[str, Any], log: Log) -> str:
        now = configs.flatten(configs.override(self.base, artefact))
        ranges = "\n".join(f"- {flag.name}: now {now[flag.name]!r}, {_range(flag)}" for flag in self.flags)
        others = "\n".join(f"- {json.dumps(changed)}: {passed} of {passed + failed} passed" for _, changed, passed, failed in log.agents)
        trials = "\n".join(f"- {'passed' if trial.passed else 'failed'}: {trial.note}" for trial in log.trials)
        return (
            f"{self.card}\n\nYou improve the flags of this program. Goal: {self.goal}.\n\nFlags that you may change:\n{ranges}\n\n"
            f"Configs tried so far, as changes to the defaults:\n{others}\n\nRuns of the config to improve, {json.dumps(artefact)}:\n"
            f"{trials or '- none yet'}\n\nAnswer with one JSON object that maps one or two flag names to new values, and nothing else."
        )


def _range(flag: Flag) -> str:
    if flag.kind == "choice":
        return f"one of {', '.join(map(repr, flag.choices))}"
    return flag.kind if flag.kind == "bool" else f"{flag.kind} between {flag.low:g} and {flag.high:g}"


def _typed(flag: Flag, value: Any) -> Any:
    if flag.kind == "choice":
        if value not in flag.choices:
            raise ValueError(f"{flag.name} = {value!r} is not one of {', '.join(map(repr, flag.choices))}")
        return value
    if isinstance(value, bool) != (flag.kind == "bool") or not isinstance(value, int | float):
        raise ValueError(f"{flag.name} = {value!r} is not of type {flag.kind}")
    if flag.kind == "int" and value != int(value):
        raise ValueError(f"{flag.name} = {value!r} is not a whole number")
    return {"float": float, "int": int, "bool": bool}[flag.kind](value)


def chat(url: str, model: str, prompt: str, seed: int, seconds: float = 120.0) -> str:
    """One answer of POST {url}/chat/completions; $OPENAI_API_KEY is sent when set."""
    import os
    import urllib.request

    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "seed": seed % 2**31}
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {key}"} if (key := os.environ.get("OPENAI_API_KEY")) else {}
    )
    request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=seconds) as response:
        return json.load(response)["choices"][0]["message"]["content"]


def server(name: str) -> tuple[str, str]:
    """(URL, model) of `openai:URL#model`. UserError for anything else."""
    url, _, model = name.removeprefix("openai:").rpartition("#")
    if not name.startswith("openai:") or not url.startswith(("http://", "https://")) or not model:
        raise UserError(f"--proposer {name}: give `mutate`, or a server as openai:http://HOST:PORT/v1#MODEL.", code=2)
    return url, model


def middle(values: Sequence[float]) -> float:
    """The median, the upper of the two middle values when there are two: a root held against it passes about half of its tasks."""
    return sorted(values)[len(values) // 2]
