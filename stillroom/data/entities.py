"""A small world to look things up in: entities with a number each, questions over two of them, and scripted ways to answer."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
SYMBOLS = [
    "<|user|>", "<|assistant|>", "Thought: ", "\n\nCode:\n```py\n", "\n```", "need ", " and ", "now ", "compute",
    "a=look('", "b=look('", "')\n", "print(a)", "print(b)", "final_answer(", "\n\n", "#### ", "facts ", *SYLLABLES,
]  # fmt: skip
"""Words that a tokenizer should know whole, so that sequences stay short."""

ALPHABET = string.printable


@dataclass(frozen=True)
class World:
    """Entities with a number from 100 to 999 each; the last quarter never occurs in training."""

    seed: int
    facts: dict[str, int]

    def questions(self, count: int, salt: str, *, unseen: bool = False) -> list[Question]:
        draw = random.Random(f"{self.seed}/{salt}")
        names = list(self.facts)
        cut = len(names) * 3 // 4
        pool, largest = (names[cut:], 99) if unseen else (names[:cut], 49)
        pairs = [draw.sample(pool, 2) for _ in range(count)]
        return [Question(a, b, draw.choice("+-*"), draw.choice("+-"), draw.randint(1, largest)) for a, b in pairs]


@dataclass(frozen=True)
class Question:
    """`a op b op2 constant`, e.g. kefo*lumi+17."""

    a: str
    b: str
    op: str
    op2: str
    constant: int

    def text(self, facts: dict[str, int] | None = None) -> str:
        given = f"facts {self.a}={facts[self.a]} {self.b}={facts[self.b]}\n\n" if facts else ""
        return f"{given}{self.a}{self.op}{self.b}{self.op2}{self.constant}"

    def values(self, facts: dict[str, int]) -> tuple[int, int]:
        """After the first operation, and the answer."""
        x, y = facts[self.a], facts[self.b]
        first = x + y if self.op == "+" else x - y if self.op == "-" else x * y
        return first, first + self.constant if self.op2 == "+" else first - self.constant

    def thought(self, facts: dict[str, int]) -> str:
        """Chain of thought: plan, facts, arithmetic, answer."""
        x, y = facts[self.a], facts[self.b]
        first, answer = self.values(facts)
        return (
            f"need {self.a} and {self.b}\n\n{self.a}={x} {self.b}={y}\n{x}{self.op}{y}={first}\n"
            f"{first}{self.op2}{self.constant}={answer}\n#### {answer}"
        )

    def replies(self) -> list[str]:
        """The scripted agent's three steps."""
        return [
            f"Thought: need {self.a} and {self.b}\n\nCode:\n```py\na=look('{self.a}')\nprint(a)\n```",
            f"Thought: now {self.b}\n\nCode:\n```py\nb=look('{self.b}')\nprint(b)\n```",
            f"Thought: compute\n\nCode:\n```py\nfinal_answer(a{self.op}b{self.op2}{self.constant})\n```",
        ]


def make_world(seed: int, size: int = 600) -> World:
    """The world of this seed: `size` entities of two syllables."""
    draw = random.Random(seed)
    names = draw.sample([a + b for a in SYLLABLES for b in SYLLABLES], size)
    return World(seed, {name: draw.randint(100, 999) for name in names})
