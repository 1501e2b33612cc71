"""Images with labels: a split in memory or on disk behind one interface, and the train, test and transfer splits together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stillroom.core.errors import UserError
from stillroom.core.store import fingerprint

Device = torch.device | str


class Batch(NamedTuple):
    """Rows of a split."""

    index: Tensor  # type: ignore[assignment]  # the name hides tuple.index, which nobody needs here
    """(B,) int64, the position in the split."""
    images: Tensor
    """(B, C, H, W) float32 in [0, 1]."""
    labels: Tensor
    """(B,) int64; -1 is unlabelled."""


def unit(pixels: Tensor) -> Tensor:
    """Pixels as float32 in [0, 1]: uint8 is divided by 255, floats are taken as they are."""
    return pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels.float()


class Split(Protocol):
    """What every split offers; `take` gives rows by position."""

    @property
    def labels(self) -> Tensor: ...
    @property
    def device(self) -> torch.device: ...
    def __len__(self) -> int: ...
    def take(self, index: Tensor) -> Batch: ...
    def to(self, device: Device) -> Split: ...
    def subset(self, rows: Tensor, labels: Tensor | None = None) -> Split: ...
    def images(self) -> Tensor: ...
    def fingerprint(self) -> str: ...


class MemorySplit:
    """All pixels in memory: `pixels` (N, C, H, W) as uint8, or as float in [0, 1]; `labels` (N,) int64."""

    def __init__(self, pixels: Tensor, labels: Tensor):
        if pixels.ndim != 4 or labels.shape != pixels.shape[:1]:
            raise ValueError(f"pixels must be (N, C, H, W) and labels (N,), not {tuple(pixels.shape)} and {tuple(labels.shape)}")
        self.pixels, self.labels = pixels, labels.long()
        self._fingerprint: str | None = None

    @property
    def device(self) -> torch.device:
        return self.pixels.device

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Batch:
        index = index.to(self.device)
        return Batch(index, unit(self.pixels.index_select(0, index)), self.labels.index_select(0, index))

    def to(self, device: Device) -> MemorySplit:
        return MemorySplit(self.pixels.to(device), self.labels.to(device))

    def subset(self, rows: Tensor, labels: Tensor | None = None) -> MemorySplit:
        """These rows as a split of their own, under their own labels unless others are given."""
        return MemorySplit(self.pixels[rows], self.labels[rows] if labels is None else labels)

    def images(self) -> Tensor:
        """All images, (N, C, H, W) float32 in [0, 1]."""
        return unit(self.pixels)

    def fingerprint(self) -> str:
        """Hash of the pixels and labels."""
        self._fingerprint = self._fingerprint or fingerprint(self.pixels, self.labels)
        return self._fingerprint


class LazySplit:
    """Images that are decoded when they are taken.

    `decode` maps a position to (C, H, W) uint8 pixels; it has a `fingerprint()` and must pickle, since worker processes call it.
    The fingerprint of files is that of their names, sizes and times: hashing the content of a large set would read it all.
    """

    def __init__(self, decode: Decode, labels: Tensor, rows: Tensor | None = None, device: Device = "cpu"):
        self.decode, self.labels, self.device = decode, labels.long().to(device), torch.device(device)
        self.rows = torch.arange(len(labels)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Tensor) -> Batch:
        pixels = torch.stack([self.decode(row) for row in self.rows[index.cpu()].tolist()])
        index = index.to(self.device)
        return Batch(index, unit(pixels.to(self.device)), self.labels[index])

    def to(self, device: Device) -> LazySplit:
        return LazySplit(self.decode, self.labels, self.rows, device)

    def subset(self, rows: Tensor, labels: Tensor | None = None) -> LazySplit:
        """These rows as a split of their own, under their own labels unless others are given."""
        return LazySplit(self.decode, self.labels[rows.to(self.device)] if labels is None else labels, self.rows[rows.cpu()], self.device)

    def images(self) -> Tensor:
        """All images decoded, (N, C, H, W) float32 in [0, 1]."""
        return self.take(torch.arange(len(self))).images

    def fingerprint(self) -> str:
        return fingerprint(self.decode.fingerprint(), self.rows, self.labels)


class Decode(Protocol):
    """A row number to (C, H, W) uint8 pixels."""

    def __call__(self, row: int) -> Tensor: ...
    def fingerprint(self) -> str: ...


def statistics(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, of at most 4096 evenly spaced images (256 where each must be decoded)."""
    most = 4096 if isinstance(split, MemorySplit) else 256
    rows = torch.linspace(0, len(split) - 1, min(len(split), most)).long().unique()
    pixels = split.take(rows).images.double().transpose(0, 1).flatten(1)
    return tuple(pixels.mean(1).tolist()), tuple(pixels.std(1, correction=0).clamp_min(1e-3).tolist())


@dataclass(frozen=True)
class ImageData:
    """A classification task."""

    name: str
    train: Split
    test: Split
    transfer: Split | None
    """Inputs without labels (every label is -1) that a teacher can answer."""
    classes: tuple[str, ...]
    channels: int
    size: int
    """Height and width in pixels: images are square."""
    mean: tuple[float, ...]
    """Per channel, of the images in [0, 1] of the larger of the train and transfer splits, for a network's own normalisation."""
    std: tuple[float, ...]

    @classmethod
    def of(cls, name: str, train: Split, test: Split, classes: tuple[str, ...], transfer: Split | None = None) -> ImageData:
        """The task of these splits, its shape and statistics read from the images."""
        _, channels, size, _ = train.take(torch.zeros(1, dtype=torch.int64)).images.shape
        mean, std = statistics(train if transfer is None or len(train) > len(transfer) else transfer)
        return cls(name, train, test, transfer, classes, channels, size, mean, std)

    def to(self, device: Device) -> ImageData:
        transfer = None if self.transfer is None else self.transfer.to(device)
        return replace(self, train=self.train.to(device), test=self.test.to(device), transfer=transfer)

    def fingerprint(self) -> str:
        """Hash of the content of all splits and of the class names."""
        return fingerprint(self.classes, self.train, self.test, self.transfer)


def balanced_rows(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` row numbers, drawn in turn from every class as long as it lasts; shuffled."""
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels.cpu()[order]
    turn = torch.empty(len(labels), dtype=torch.int64)
    for label in shuffled.unique():
        of_class = (shuffled == label).nonzero().squeeze(1)
        turn[of_class] = torch.arange(len(of_class))
    return order[turn.argsort(stable=True)[:count]]


def hold_out(data: ImageData, count: int, seed: int) -> tuple[ImageData, Split]:
    """The task with `count` class-balanced training images fewer, drawn from `seed`, and those images. UserError unless both have some."""
    if not 0 < count < len(data.train):
        raise UserError(f"--validation: {count} of the {len(data.train)} training images cannot be held out, both need some.", code=2)
    rows = balanced_rows(data.train.labels, count, torch.Generator().manual_seed(seed))
    rest = torch.ones(len(data.train), dtype=torch.bool)
    rest[rows] = False
    return replace(data, train=data.train.subset(rest.nonzero().squeeze(1))), data.train.subset(rows)


def of_classes(split: Split, low: int, high: int) -> Split:
    """The rows of classes low..high-1, counted from 0."""
    rows = ((split.labels >= low) & (split.labels < high)).nonzero().squeeze(1)
    return split.subset(rows, split.labels[rows] - low)


def keep_labels(train: Split, count: int, generator: torch.Generator) -> tuple[Split, Split | None]:
    """Split off `count` class-balanced labelled rows; all other rows, without their labels, are the transfer set (None if empty)."""
    chosen = balanced_rows(train.labels, count, generator)
    others = torch.ones(len(train), dtype=torch.bool)
    others[chosen] = False
    rest = others.nonzero().squeeze(1)
    return train.subset(chosen), train.subset(rest, torch.full_like(rest, -1, device=train.device)) if len(rest) else None


def spoil_labels(train: Split, share: float, classes: int, generator: torch.Generator) -> Split:
    """A share of the labels (rounded to whole images) replaced by labels drawn uniformly from all classes, so that a replaced label may
    be the true one. UserError unless 0 <= share <= 1."""
    if not 0 <= share <= 1:
        raise UserError(f"The share of noisy labels must be between 0 and 1, not {share:g}.")
    labels = train.labels.clone()
    noisy = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))].to(labels.device)
    labels[noisy] = torch.randint(classes, (len(noisy),), generator=generator).to(labels.device)
    return train.subset(torch.arange(len(labels)), labels)


def join(first: Split, second: Split) -> Split:
    """Both splits as one, the rows of the first before those of the second. Lazy ones must come from the same files."""
    if isinstance(first, MemorySplit) and isinstance(second, MemorySplit):
        return MemorySplit(torch.cat([first.pixels, second.pixels]), torch.cat([first.labels, second.labels]))
    if isinstance(first, LazySplit) and isinstance(second, LazySplit) and first.decode == second.decode:
        return LazySplit(first.decode, torch.cat([first.labels, second.labels]), torch.cat([first.rows, second.rows]), first.device)
    raise TypeError("only splits in memory, or parts of the same files, can be joined")
