"""Which images of a pool a teacher's answers make worth learning from, and pools put together from several sources."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from stillroom.core.store import fingerprint
from stillroom.data.images import Batch, Device, MemorySplit, Split, join


def top_per_class(logits: Tensor, k: int) -> Tensor:
    """(M,) rows, in order, of logits (N, C): of the images predicted as a class the k most probable ones, fewer where there are fewer
    (SSLD, arXiv 2103.05959). Ranked by the probability of the predicted class, within that class, so that no class crowds out another."""
    confidence, predicted = logits.double().softmax(-1).max(-1)
    order = confidence.argsort(descending=True, stable=True)
    order = order[predicted[order].argsort(stable=True)]  # class by class, the surest first
    counts = torch.bincount(predicted, minlength=logits.shape[1])
    rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[predicted[order]]
    return order[rank < k].sort().values


def copies(pool: Split, test: Split) -> Tensor:
    """(N,) bool: which images of the pool are, pixel by pixel, images of the test split."""

    def digests(split: Split) -> list[bytes]:
        found = []
        for rows in torch.arange(len(split)).split(512):
            images = split.take(rows).images.mul(255).round().byte().cpu().numpy()
            found += [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]
        return found

    known = set(digests(test))
    return torch.tensor([digest in known for digest in digests(pool)], dtype=torch.bool)


class Pooled:
    """Splits one after another as one, each left where it is (in memory, or in files that are decoded when they are taken)."""

    def __init__(self, parts: Sequence[Split], rows: Tensor | None = None, labels: Tensor | None = None):
        self.parts = list(parts)
        self.starts = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
        self.rows = torch.arange(int(self.starts[-1])) if rows is None else rows.cpu()
        self.labels = torch.cat([part.labels for part in parts])[self.rows.to(self.device)] if labels is None else labels

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Tensor) -> Batch:
        rows = self.rows[index.cpu()]
        part = torch.searchsorted(self.starts, rows, right=True) - 1
        order = part.argsort(stable=True)
        images = torch.cat([
            self.parts[i].take(rows[order][part[order] == i] - self.starts[i]).images for i in part.unique().tolist()
        ])  # fmt: skip
        index = index.to(self.device)
        return Batch(index, images[order.argsort().to(self.device)], self.labels[index])

    def to(self, device: Device) -> Pooled:
        return Pooled([part.to(device) for part in self.parts], self.rows, self.labels.to(device))

    def subset(self, rows: Tensor, labels: Tensor | None = None) -> Pooled:
        """These rows as a split of their own, under their own labels unless others are given."""
        return Pooled(self.parts, self.rows[rows.cpu()], self.labels[rows.to(self.device)] if labels is None else labels)

    def images(self) -> Tensor:
        """All images, (N, C, H, W) float32 in [0, 1]."""
        return self.take(torch.arange(len(self))).images

    def fingerprint(self) -> str:
        return fingerprint([part.fingerprint() for part in self.parts], self.rows, self.labels)


def pooled(first: Split, second: Split) -> Split:
    """Both as one, the rows of the first before those of the second, in memory if both are."""
    if isinstance(first, MemorySplit) and isinstance(second, MemorySplit) and first.pixels.dtype == second.pixels.dtype:
        return join(first, second)
    return Pooled([first, second])
