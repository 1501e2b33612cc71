"""A small world to look things up in: entities with a number each, questions over two of them, and scripted ways to answer.

The same question is put in four ways, so that it takes a thought to know what to do: `kefo-lumi`, `lumi taken from kefo`, `kefo minus
lumi`, `lumi less than kefo`. Answers are never negative.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
SYMBOLS = [
    "<|system|>", "<|user|>", "<|assistant|>", "Thought: ", "Code:\n```py\n", "\n```", "need ", "now ", "compute",
    "a=look('", "b=look('", "')\n", "print(a)", "print(b)", "final_answer(", "\n\n", "#### ", "facts ",
    " added to ", " taken from ", " plus ", " minus ", " more than ", " less than ", "think", "act", *SYLLABLES,
]  # fmt: skip
"""Words that a tokenizer should know whole, so that sequences stay short."""

ALPHABET = string.printable

Part = Literal["known", "unseen", "large"]
WAYS = 4
"""How many ways there are to put a question."""


@dataclass(frozen=True)
class World:
    """Entities with a number each, in three parts: known ones (two thirds) may occur in training, with numbers from 1 to 49; unseen ones
    (a sixth) never do, with such numbers; large ones (a sixth) never do, with numbers from 50 to 99."""

    seed: int
    facts: dict[str, int]

    def questions(self, count: int, salt: str, part: Part = "known") -> list[Question]:
        """`count` random questions about one part's entities."""
        draw, names = random.Random(f"{self.seed}/{salt}/{part}"), list(self.facts)
        known, unseen = len(names) * 4 // 6, len(names) * 5 // 6
        pool = {"known": names[:known], "unseen": names[known:unseen], "large": names[unseen:]}[part]
        found: list[Question] = []
        while len(found) < count:
            a, b = draw.sample(pool, 2)
            question = Question(a, b, draw.choice("+-"), draw.randrange(WAYS))
            if question.answer(self.facts) >= 0:
                found.append(question)
        return found


@dataclass(frozen=True)
class Question:
    """`a op b`, put in one of the ways."""

    a: str
    b: str
    op: str
    way: int = 0

    @property
    def formula(self) -> str:
        return f"{self.a}{self.op}{self.b}"

    def text(self, facts: dict[str, int] | None = None) -> str:
        """As it is asked, after the facts it needs if they are given."""
        plus, a, b = self.op == "+", self.a, self.b
        ways = (
            self.formula,
            f"{b} added to {a}" if plus else f"{b} taken from {a}",
            f"{a} plus {b}" if plus else f"{a} minus {b}",
            f"{b} more than {a}" if plus else f"{b} less than {a}",
        )
        return (f"facts {self.a}={facts[self.a]} {self.b}={facts[self.b]}\n\n" if facts else "") + ways[self.way]

    def answer(self, facts: dict[str, int]) -> int:
        return facts[self.a] + facts[self.b] if self.op == "+" else facts[self.a] - facts[self.b]

    def thought(self, facts: dict[str, int]) -> str:
        """Chain of thought: the plan, a blank line, facts, arithmetic digit by digit, answer."""
        x, y = facts[self.a], facts[self.b]
        return f"need {self.formula}\n\n{self.a}={x} {self.b}={y}\n{by_digits(x, self.op, y)}\n#### {self.answer(facts)}"

    def replies(self) -> list[str]:
        """The scripted agent's three steps."""
        return [
            f"Thought: need {self.formula}\n\nCode:\n```py\na=look('{self.a}')\nprint(a)\n```",
            f"Thought: now {self.b}\n\nCode:\n```py\nb=look('{self.b}')\nprint(b)\n```",
            f"Thought: compute\n\nCode:\n```py\nfinal_answer(a{self.op}b)\n```",
        ]


def by_digits(x: int, op: str, y: int) -> str:
    """x op y as done on paper, from the right, with what is carried (or borrowed) as the third number: `7+8+0=5 4+3+1=8` for 47+38."""

    def columns() -> Iterator[str]:
        carry = 0
        for place in range(max(len(str(x)), len(str(y)))):
            p, q = x // 10**place % 10, y // 10**place % 10
            total = p + q + carry if op == "+" else p - q - carry
            yield f"{p}{op}{q}{op}{carry}={total % 10}"
            carry = abs(total // 10)

    return " ".join(columns())


def make_world(seed: int, size: int = 300) -> World:
    """The world of this seed: `size` entities of two syllables."""
    draw = random.Random(seed)
    names = draw.sample([a + b for a in SYLLABLES for b in SYLLABLES], size)
    large = size * 5 // 6
    return World(seed, {name: draw.randint(1, 49) if i < large else draw.randint(50, 99) for i, name in enumerate(names)})
