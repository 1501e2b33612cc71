"""Encoded images (files, or cells of a table) and their decoding to uint8 pixels of one shape."""

from __future__ import annotations

import io
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillroom.core.errors import UserError
from stillroom.core.store import fingerprint

GREY = {"1", "L", "LA"}
COLOUR = {"P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
LARGEST = 2**30
"""Bytes of an image's file."""


@dataclass(frozen=True)
class Files:
    """Images in files."""

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def where(self, row: int) -> str:
        return str(self.paths[row])

    def encoded(self, row: int) -> bytes:
        return _read(self.paths[row])

    def fingerprint(self) -> str:
        return fingerprint([stamp(path) for path in self.paths])


@dataclass(frozen=True)
class Cells:
    """Images in the cells of a table's column, each bytes or a {bytes, path} struct, as in the `datasets` library."""

    cells: Any
    """A pyarrow ChunkedArray or a `datasets` column: anything with a length that gives a cell by row."""
    origin: tuple[tuple[str, int], ...]
    """The tables that the rows come from, each with its first row; names the row of an error."""
    key: str
    """The column's fingerprint."""

    def __len__(self) -> int:
        return len(self.cells)

    def where(self, row: int) -> str:
        name, start = self.origin[bisect_right(self.origin, row, key=lambda part: part[1]) - 1]
        return f"row {row - start} of {name}"

    def encoded(self, row: int) -> bytes:
        cell = self.cells[row]
        cell = cell.as_py() if hasattr(cell, "as_py") else cell
        if isinstance(cell, dict):
            cell = cell.get("bytes") or (_read(Path(cell["path"])) if isinstance(cell.get("path"), str) and cell["path"] else None)
        if not isinstance(cell, bytes):
            raise ValueError("the cell holds no image")
        return cell

    def fingerprint(self) -> str:
        return self.key


def _read(path: Path) -> bytes:
    """A file's content. ValueError for a pipe or device, which might never end, and for what no image is as large as."""
    if not path.is_file():
        raise ValueError("there is no regular file")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"the file has {path.stat().st_size} bytes")
    return path.read_bytes()


def stamp(path: Path) -> tuple[str, int, int]:
    """Name, bytes and time of change: what tells that a file is another one. Of a link to nothing, its own."""
    status = path.stat() if path.exists() else path.lstat()
    return str(path), status.st_size, status.st_mtime_ns


class BadImage(UserError):
    """One image that cannot be used."""


@dataclass(frozen=True)
class Decoder:
    """Maps a row of `source` to (channels, size, size) uint8 pixels.

    With `resize` the shorter side is scaled to `size` and the centre is cut out; without, an image of another size is an error.
    """

    source: Files | Cells
    channels: int
    size: int
    resize: bool = False

    @classmethod
    def of(cls, source: Files | Cells, image_size: int | None, look: int = 64) -> Decoder:
        """The decoder for this source, its channels and size read from up to `look` evenly spaced images that can be opened."""
        opened, wrong = [], None
        for row in np.unique(np.linspace(0, len(source) - 1, min(look, len(source))).astype(int)).tolist():
            try:
                opened.append(_open(source, row))
            except BadImage as error:
                wrong = wrong or error
        if not opened:
            raise wrong or UserError("There are no images.")
        channels = 3 if any(image.mode in COLOUR for image in opened) else 1
        return cls(source, channels, image_size or min(opened[0].size), image_size is not None)

    def __call__(self, row: int) -> Tensor:
        """Raises BadImage, which names the file or row, for what cannot be decoded or has another shape than the others."""
        from PIL import Image, ImageOps

        image = _open(self.source, row)
        if self.channels == 1 and image.mode in COLOUR:
            raise BadImage(f"{self.source.where(row)}: a colour image among grey ones. Convert it to grey, or all others to colour.")
        try:
            image = ImageOps.exif_transpose(image.convert("L" if self.channels == 1 else "RGB"))
        except Exception as error:  # a damaged file fails in any line of its format's reader
            raise BadImage(_broken(self.source, row, error)) from error
        side = (self.size, self.size)
        if self.resize:
            image = ImageOps.fit(image, side, method=Image.Resampling.BICUBIC)
        elif image.size != side:
            raise BadImage(
                f"{self.source.where(row)}: {image.size[0]} x {image.size[1]} pixels, where {self.size} x {self.size} was expected: all "
                "images must be square and of one size. Give --image-size N to scale and crop each to N x N."
            )
        return torch.from_numpy(np.array(image)).view(self.size, self.size, self.channels).permute(2, 0, 1)

    def fingerprint(self) -> str:
        return fingerprint(self.source.fingerprint(), self.channels, self.size, self.resize)


def decode_rows(decoder: Decoder, rows: Tensor, skip_bad: bool) -> dict[str, Tensor]:
    """`pixels` (N, C, H, W) uint8 of these rows, and `rows`: those that were decoded, which is all unless `skip_bad`."""
    pixels = torch.empty((len(rows), decoder.channels, decoder.size, decoder.size), dtype=torch.uint8)
    good: list[int] = []
    for row in rows.tolist():
        try:
            pixels[len(good)] = decoder(row)
        except BadImage:
            if not skip_bad:
                raise
        else:
            good.append(row)
    return {"pixels": pixels[: len(good)], "rows": torch.tensor(good, dtype=torch.int64)}


def readable_rows(decoder: Decoder, rows: Tensor) -> dict[str, Tensor]:
    """Those of the `rows` that can be decoded: one pass over all of them, which keeps no pixels."""
    good: list[int] = []
    for row in rows.tolist():
        try:
            decoder(row)
        except BadImage:
            continue
        good.append(row)
    return {"rows": torch.tensor(good, dtype=torch.int64)}


def _open(source: Files | Cells, row: int) -> Any:
    """The image with only its header read."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(source.encoded(row)))
    except Exception as error:  # as in `Decoder`
        raise BadImage(_broken(source, row, error)) from error
    if image.mode not in GREY | COLOUR:
        raise BadImage(f"{source.where(row)}: pixels of mode {image.mode!r} are not understood. Convert the image to 8 bits a channel.")
    return image


def _broken(source: Files | Cells, row: int, error: Exception) -> str:
    return f"{source.where(row)}: not a readable image ({error}). Remove it, or give --skip-bad to leave out what cannot be read."
