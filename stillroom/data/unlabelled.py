"""Folders of images that nobody labelled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stillroom.core.errors import UserError, needs
from stillroom.data.decode import Decoder, Files, decode_rows, readable_rows
from stillroom.data.images import ImageData, LazySplit, MemorySplit, Split
from stillroom.data.load import IMAGE_FILES, MEMORY


def load_unlabelled(folder: str | Path, like: ImageData, *, skip_bad: bool = False, cache: Any = None) -> Split:
    """All images in `folder` and the folders in it, scaled and cropped to the size and channels of `like`; every label is -1.

    cache: `run.cached`, which keeps what was decoded; sets over 1 GiB of pixels are decoded as they are taken. UserError for a folder
    without images, and for one that cannot be decoded (with its name), unless `skip_bad`.
    """
    needs("PIL", "images")
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder of images.", code=2)
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_FILES and path.is_file() and path.name[0] != ".")
    if not files:
        raise UserError(f"{root}: no images ({', '.join(sorted(IMAGE_FILES))}) in it or in its folders.", code=2)
    decoder = Decoder(Files(tuple(files)), like.channels, like.size, resize=True)
    every, keep = torch.arange(len(files)), cache or (lambda name, build, *inputs: build(*inputs))
    if len(files) * like.channels * like.size**2 < MEMORY:
        pixels = keep("pixels", decode_rows, decoder, every, skip_bad)["pixels"]
        found: Split = MemorySplit(pixels, torch.full((len(pixels),), -1))
    else:
        rows = keep("readable", readable_rows, decoder, every)["rows"] if skip_bad else every
        found = LazySplit(decoder, torch.full((len(rows),), -1), rows)
    if not len(found):
        raise UserError(f"{root}: none of its {len(files)} images could be read.")
    return found.to(like.train.device)
