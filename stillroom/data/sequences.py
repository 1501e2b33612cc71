"""Token sequences for language models: a procedural language whose skills can be told apart, and windows of real text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stillroom.core.errors import UserError


@dataclass(frozen=True)
class BackCopy:
    """A bigram language with a copying rule: after a trigger word comes the word that stood before it.

    Id 0 begins every sequence; the `triggers` ids from 1 on are triggers; all other successions follow one fixed random table (from
    `seed`), whose entropy falls with `sharpness`. A model needs one table and one look back of two places.
    """

    words: int = 64
    triggers: int = 4
    sharpness: float = 1.75
    seed: int = 0

    def table(self) -> Tensor:
        """(words, words) probabilities of the next word; word 0 never follows."""
        logits = self.sharpness * torch.randn(self.words, self.words, generator=torch.Generator().manual_seed(self.seed))
        logits[:, 0] = -torch.inf
        return logits.softmax(-1)

    def draw(self, count: int, length: int, generator: torch.Generator | None = None) -> Tensor:
        """(count, length) ids."""
        table, ids = self.table(), torch.zeros(count, length, dtype=torch.long)
        for t in range(1, length):
            here = ids[:, t - 1]
            ids[:, t] = torch.multinomial(table[here], 1, generator=generator).squeeze(-1)
            if t >= 2:
                copies = self.is_trigger(here)
                ids[copies, t] = ids[copies, t - 2]
        return ids

    def is_trigger(self, ids: Tensor) -> Tensor:
        return (ids >= 1) & (ids <= self.triggers)

    def log_probs(self, ids: Tensor) -> Tensor:
        """The language's own log-probability (B, L-1) of every word after the first: the loss of a perfect model is minus that."""
        out = self.table().log()[ids[:, :-1], ids[:, 1:]]
        copies = self.is_trigger(ids[:, 1:-1])
        same = torch.where(ids[:, 2:] == ids[:, :-2], 0.0, -torch.inf)
        out[:, 1:] = torch.where(copies, same, out[:, 1:])
        return out


def windows(ids: Sequence[int], length: int) -> Tensor:
    """(count, length) non-overlapping windows of a long text's ids; the ragged end is dropped. UserError when there is none."""
    count = len(ids) // length
    if not count:
        raise UserError(f"The text has {len(ids)} tokens, fewer than one window of {length}: give more text or a shorter length.")
    return torch.tensor(ids[: count * length]).view(count, length)


@dataclass(frozen=True)
class Rows:
    """Token sequences padded right: ids and unshifted labels (N, L), -100 where nothing is trained, and lengths (N,)."""

    ids: Tensor
    labels: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, rows: Sequence[tuple[Sequence[int], Sequence[int]]], length: int) -> Rows:
        """From (ids, labels) pairs, cut to `length` tokens."""
        lengths = torch.tensor([min(len(ids), length) for ids, _ in rows])
        width = int(lengths.max())
        ids = torch.tensor([list(row[:width]) + [0] * (width - len(row)) for row, _ in rows])
        labels = torch.tensor([list(row[:width]) + [-100] * (width - len(row)) for _, row in rows])
        return cls(ids, labels, lengths)

    @classmethod
    def plain(cls, ids: Tensor) -> Rows:
        """Text without context-only parts: every token is trained."""
        return cls(ids, ids, torch.full((len(ids),), ids.shape[1]))

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: Tensor | slice) -> Rows:
        return Rows(self.ids[index], self.labels[index], self.lengths[index])

    @property
    def mask(self) -> Tensor:
        """(N, L): 1 on tokens, 0 on padding, by place."""
        return (torch.arange(self.ids.shape[1]) < self.lengths[:, None]).long()

    def lists(self) -> list[list[int]]:
        return [row[:n] for row, n in zip(self.ids.tolist(), self.lengths.tolist())]

    def prompts(self) -> list[list[int]]:
        """Of each row, the tokens before the first trained one, at least one."""
        first = (self.labels != -100).int().argmax(-1).clamp(min=1).tolist()
        return [row[:n] for row, n in zip(self.ids.tolist(), first)]


def shuffled(count: int, size: int, seed: int, step: int) -> Tensor:
    """(size,) positions of the batch of this step: every epoch its own permutation, a pure function of (seed, step)."""
    size = min(size, count)
    epoch, position = divmod(step, count // size)
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(count)[position * size : (position + 1) * size])
