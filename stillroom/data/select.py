"""Which images of an unlabelled pool to keep, by a classifier's answers for them."""

from __future__ import annotations

import torch
from torch import Tensor

from stillroom.core.store import fingerprint
from stillroom.data.images import Split


def top_per_class(logits: Tensor, count: int) -> Tensor:
    """Rows, ascending, of the `count` images with the largest probability of their predicted class, class by class: logits (N, C).

    The rank is within the predicted class, so that no class crowds out another; one with fewer images gives them all. Ties go to the
    earlier row.
    """
    score, predicted = logits.double().log_softmax(-1).max(-1)
    order = score.argsort(descending=True, stable=True)
    kept = [order[predicted[order] == label][:count] for label in predicted.unique()]
    return torch.cat([order[:0], *kept]).sort().values


def unseen(pool: Split, test: Split) -> Tensor:
    """Rows, ascending, of the pool's images that equal no test image, pixel by pixel (by content hash)."""
    known = {fingerprint(test.take(torch.tensor([row])).images) for row in range(len(test))}
    return torch.tensor([row for row in range(len(pool)) if fingerprint(pool.take(torch.tensor([row])).images) not in known], dtype=torch.int64)
