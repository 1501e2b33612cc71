"""One definition of "correct", shared by filter, reward, vote and evaluation; rejection sampling and pass@k on top of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import comb
from typing import TypeVar

T = TypeVar("T")
NUMBER = r"\d[\d,]*(?:\.\d+)?(?:/\d+)?"


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
    """Unbiased chance that k of `samples` draws hold a correct one: 1 - C(n-c, k) / C(n, k). ValueError unless 1 <= k <= samples."""
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} cannot be told from {correct} correct ones of {samples} samples")
    return 1 - comb(samples - correct, k) / comb(samples, k)


def last_number(text: str) -> str | None:
    """The last number of a text as an exact fraction: thousands separators, decimals and a trailing point are understood. A minus belongs
    to a number unless something to subtract from stands before it."""
    found = re.findall(rf"(?:(?<![\w)])-)?{NUMBER}", text)
    return _fraction(found[-1]) if found else None


def only_number(text: str) -> str | None:
    """The number that a text is, as an exact fraction, with nothing around it but a currency or percent sign and a final point."""
    found = re.fullmatch(rf"\s*[$€£]?\s*(-?{NUMBER})\s*%?\.?\s*", text)
    return _fraction(found[1]) if found else None


def _fraction(digits: str) -> str | None:
    try:
        return str(Fraction(digits.replace(",", "")))
    except (ValueError, ZeroDivisionError):  # "1.5/2", "3/0"
        return None


def plain(text: str) -> str:
    """A short answer in words for comparison: lower case, without punctuation, articles and spaces too many (as SQuAD compares)."""
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def same_answer(given: str, reference: str) -> bool:
    """A reference that is a number asks for that number at the end of the answer, any other one for its words."""
    wanted = only_number(reference)
    return plain(given) == plain(reference) if wanted is None else last_number(given) == wanted


def after(mark: str) -> Callable[[str], str | None]:
    """An extractor: the last number after the last `mark` (GSM8K writes "#### 42"), None when the mark is missing."""
    return lambda text: last_number(text.rpartition(mark)[2]) if mark in text else None


numbers = Verifier(last_number)
gsm8k = Verifier(after("####"))
answers = Verifier(lambda text: text.strip() or None, same_answer)
"""Numbers and facts: see `same_answer`."""
marked = Verifier(lambda text: text.rpartition("####")[2].strip() or None if "####" in text else None, same_answer)
"""Such an answer after the last "####"."""
