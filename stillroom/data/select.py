"""Which images of an unlabelled pool to keep, by a classifier's answers for them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from stillroom.core.errors import UserError, needs
from stillroom.core.store import fingerprint
from stillroom.data.decode import Decoder, Files, decode_rows
from stillroom.data.images import MemorySplit, Split
from stillroom.data.load import IMAGE_FILES, Cache


def top_per_class(logits: Tensor, count: int) -> Tensor:
    """Rows, ascending, of the `count` images with the largest probability of their predicted class, class by class: logits (N, C).

    The rank is within the predicted class, so that no class crowds out another; one with fewer images gives them all. Ties go to the
    earlier row.
    """
    score, predicted = logits.double().log_softmax(-1).max(-1)
    order = score.argsort(descending=True, stable=True)
    kept = [order[predicted[order] == label][:count] for label in predicted.unique()]
    return torch.cat([order[:0], *kept]).sort().values


def duplicates(pool: Split, test: Split) -> Tensor:
    """(N,) bool: which images of the pool equal a test image, pixel by pixel (by content hash)."""

    def content(split: Split, row: int) -> str:
        return fingerprint(split.take(torch.tensor([row])).images)

    known = {content(test, row) for row in range(len(test))}
    return torch.tensor([content(pool, row) in known for row in range(len(pool))], dtype=torch.bool)


def load_pool(folder: Path, channels: int, size: int, cache: Cache) -> MemorySplit:
    """All images in a folder and the folders below it, without labels (-1), each scaled and cropped to (channels, size, size).

    UserError when there are none or one cannot be decoded, naming it.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_FILES and path.is_file())
    if not files:
        raise UserError(f"{folder}: no images were found for the pool ({', '.join(sorted(IMAGE_FILES))}).")
    needs("PIL", "images")
    decoder = Decoder(Files(tuple(files)), channels, size, resize=True)
    pixels = cache("pool", decode_rows, decoder, torch.arange(len(files)), False)["pixels"]
    return MemorySplit(pixels, torch.full((len(files),), -1))
