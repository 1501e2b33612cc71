"""One definition of "correct", shared by filter, reward, vote and evaluation; rejection sampling and pass@k on top of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import comb
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Verifier:
    """`extract` finds the final answer in a text in canonical form (None: there is none), `same` compares two such answers."""

    extract: Callable[[str], str | None]
    same: Callable[[str, str], bool] = str.__eq__

    def accepts(self, text: str, reference: str) -> bool:
        """The filter. `reference` is an answer in canonical form."""
        answer = self.extract(text)
        return answer is not None and self.same(answer, reference)

    def reward(self, text: str, reference: str) -> float:
        return float(self.accepts(text, reference))

    def vote(self, texts: Sequence[str]) -> int | None:
        """Index of the first text with the most frequent answer (ties: the answer seen first); None when no text has one."""
        groups: list[tuple[str, list[int]]] = []
        for i, text in enumerate(texts):
            if (answer := self.extract(text)) is not None:
                home = next((members for known, members in groups if self.same(known, answer)), None)
                groups.append((answer, [i])) if home is None else home.append(i)
        return max(groups, key=lambda group: len(group[1]))[1][0] if groups else None

    def accuracy(self, texts: Sequence[str], references: Sequence[str]) -> float:
        return sum(map(self.reward, texts, references)) / max(len(texts), 1)


@dataclass(frozen=True)
class Sampling:
    """What rejection sampling cost: attempts, accepted ones, prompts with at least one accepted, prompts."""

    attempts: int
    accepted: int
    covered: int
    prompts: int

    def metrics(self) -> dict[str, float]:
        return {
            "acceptance": self.accepted / max(self.attempts, 1),
            "coverage": self.covered / max(self.prompts, 1),
            "samples_per_accepted": self.attempts / max(self.accepted, 1),
        }


def rejection(groups: Sequence[Sequence[T]], accepts: Callable[[int, T], bool]) -> tuple[list[list[T]], Sampling]:
    """The accepted samples of every prompt's group, `accepts(prompt index, sample)` being the filter."""
    kept = [[sample for sample in group if accepts(i, sample)] for i, group in enumerate(groups)]
    counts = [len(group) for group in kept]
    return kept, Sampling(sum(map(len, groups)), sum(counts), sum(c > 0 for c in counts), len(groups))


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Unbiased chance that k of `samples` draws hold a correct one: 1 - C(n-c, k) / C(n, k)."""
    return 1 - comb(samples - correct, k) / comb(samples, k)


def last_number(text: str) -> str | None:
    """The last number of a text as an exact fraction: thousands separators, decimals and a trailing point are understood."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?", text)
    try:
        return str(Fraction(found[-1].replace(",", ""))) if found else None
    except (ValueError, ZeroDivisionError):  # "1.5/2", "3/0"
        return None


def after(mark: str) -> Callable[[str], str | None]:
    """An extractor: the last number after the last `mark` (GSM8K writes "#### 42"), None when the mark is missing."""
    return lambda text: last_number(text.rpartition(mark)[2]) if mark in text else None


numbers = Verifier(last_number)
gsm8k = Verifier(after("####"))
