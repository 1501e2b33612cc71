"""The order of batches, a pure function of (seed, step), so that a run that was stopped goes on with the same batches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillroom.core.errors import UserError
from stillroom.data.images import Batch, LazySplit, Split


class Batches:
    """`batches(step)` is a batch of `split`; every epoch is its own permutation, drawn from (seed, epoch).

    The last ragged batch of an epoch is dropped; a split smaller than a batch is used whole. With `workers` (by default
    up to 8 for a split that decodes files, none for one in memory) processes prepare the batches of the following steps; asking for the
    same step again gives the same batch, asking for any other restarts them.
    """

    def __init__(self, split: Split, size: int, seed: int, workers: int | None = None):
        if not len(split) or size < 1:
            raise UserError(f"Cannot make batches of {size} from a split of {len(split)} images: both must be at least 1.")
        self.split, self.size, self.seed = split, min(size, len(split)), seed
        self.workers = (min(8, os.cpu_count() or 1) if isinstance(split, LazySplit) else 0) if workers is None else workers
        self.steps_per_epoch = len(split) // self.size
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)
        self._batch: Batch | None = None
        self._next, self._prefetched = -1, iter(())  # type: tuple[int, Iterator[Batch | UserError]]

    def epoch(self, step: int) -> int:
        """Epochs finished before this step."""
        return step // self.steps_per_epoch

    def index(self, step: int) -> Tensor:
        """(B,) int64 positions of the batch of this step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.split))
            self._epoch, self._order = epoch, torch.from_numpy(order).to(self.split.device, non_blocking=True)
        return self._order[position * self.size : (position + 1) * self.size]

    def __call__(self, step: int) -> Batch:
        if not self.workers:
            return self.split.take(self.index(step))
        if step == self._next - 1 and self._batch is not None:  # another chunk of this step
            return self._batch
        if step != self._next:
            self._prefetched = self._prefetch(step)
        self._next = step + 1
        batch = next(self._prefetched)
        if isinstance(batch, UserError):
            raise batch
        self._batch = Batch(*(part.to(self.split.device, non_blocking=True) for part in batch))
        return self._batch

    def _prefetch(self, step: int) -> Iterator[Batch | UserError]:
        loader: Any = torch.utils.data.DataLoader(
            _Rows(self.split.to("cpu")),
            batch_size=None,
            sampler=_Steps(Batches(self.split.to("cpu"), self.size, self.seed, workers=0), step),
            num_workers=self.workers,
            generator=torch.Generator(),  # or the loader would draw from the generator that the run has seeded for this step
        )
        return iter(loader)


class _Rows(torch.utils.data.Dataset[Batch | UserError]):
    def __init__(self, split: Split):
        self.split = split

    def __getitem__(self, index: Tensor) -> Batch | UserError:
        try:
            return self.split.take(index)
        except UserError as error:
            return error  # given as a value: the loader would put a traceback into its message


class _Steps(torch.utils.data.Sampler[Tensor]):
    def __init__(self, batches: Batches, start: int):
        self.batches, self.start = batches, start

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.batches.index, count(self.start))
