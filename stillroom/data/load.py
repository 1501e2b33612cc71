"""Image data by name: `digits`, `shapes`, `spiral`, a folder of image folders or parquet files, or `hub:ID`."""

from __future__ import annotations

import json
import reprlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.core.config import Natural
from stillroom.core.errors import UserError, needs
from stillroom.core.store import fingerprint
from stillroom.data.decode import Cells, Decoder, Files, decode_rows, readable_rows, stamp
from stillroom.data.embedded import digits, shapes, spiral
from stillroom.data.images import ImageData, LazySplit, MemorySplit, Split, balanced_rows, keep_labels, spoil_labels

Cache = Callable[..., dict[str, Tensor]]

IMAGE_FILES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
TEST_NAMES = ("test", "val", "valid", "validation")
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
MOST_PIXELS, MOST_CLASSES = 2**14, 2**20
MEMORY = 2**30
"""Sets that decode to fewer bytes are held in memory."""
EMBEDDED: dict[str, Callable[[int], ImageData]] = {"digits": digits, "shapes": shapes, "spiral": spiral}
LAYOUTS = (
    "Understood are train/CLASS/*.png (jpg, jpeg, bmp, webp) beside test/CLASS/ or val/CLASS/, and train.parquet or train-*.parquet "
    "beside test or validation files, with a column image (or img) and a column label (or labels, fine_label)."
)


@dataclass(frozen=True)
class Rows:
    """Encoded images with their labels, before decoding."""

    source: Files | Cells
    labels: Tensor
    classes: tuple[str, ...]


@dataclass(frozen=True)
class ImageConfig:
    """What a recipe on images reads: its Config inherits these flags."""

    data: str = "digits"
    """digits, shapes, spiral, a folder of image folders or parquet files, or hub:ID."""
    limit: Natural = 0
    """Use at most this many training and test images. 0: all."""
    image_size: Natural = 0
    """Scale and crop images to this many pixels a side. 0: as they are."""
    skip_bad: bool = False
    """Leave out images that cannot be decoded instead of stopping."""

    def load(self, run: Any, spec: str = "", *, labelled: int = 0, **choices: Any) -> ImageData:
        """The task that `data`, or else `spec`, names, drawn from the run's seed and on its device; see `load_images`."""
        size, limit = self.image_size or None, self.limit or None
        loaded = load_images(
            spec or self.data, seed=run.seed, labelled=labelled or None, limit=limit, image_size=size, skip_bad=self.skip_bad,
            cache=run.cached, **choices,
        )  # fmt: skip
        return loaded.to(run.device)


def load_images(
    spec: str,
    *,
    seed: int,
    labelled: int | None = None,
    limit: int | None = None,
    transfer: bool = True,
    noise: float = 0.0,
    image_size: int | None = None,
    skip_bad: bool = False,
    cache: Cache | None = None,
) -> ImageData:
    """The image classification task that `spec` names: an embedded set, a folder, or `hub:ID` (with `@train,test` for split names).

    `limit` keeps at most that many training and test images. `labelled` keeps the labels of that many training images, balanced over
    the classes; the other training images become the transfer set, or without `transfer` are left out (of the embedded digits they then
    serve for testing). A share `noise` of the training labels is replaced at random. All is drawn from `seed`. `image_size` scales and
    crops every image to that many pixels a side. What cannot be decoded raises UserError with the file or row, or with `skip_bad` is left
    out and counted in a warning. Sets under 1 GiB of pixels are decoded into memory, through `cache` (`run.cached`) if given; larger
    ones decode as they are taken.
    """
    if any(value is not None and value < 1 for value in (labelled, limit, image_size)):
        raise UserError("labelled, limit and image-size must be at least 1.")
    if image_size is not None and image_size > MOST_PIXELS:
        raise UserError(f"--image-size must be at most {MOST_PIXELS}, not {image_size}.")
    if spec in EMBEDDED:
        if image_size is not None:
            raise UserError(f"The embedded {spec} images have a fixed size: leave --image-size out.")
        alone = labelled if labelled and not transfer else 950
        data = digits(seed, labelled=alone, transfer=0) if spec == "digits" else EMBEDDED[spec](seed)
        train, test, classes = data.train, data.test, data.classes
    else:
        rows = _hub(spec.removeprefix("hub:")) if spec.startswith("hub:") else _folder(Path(spec))
        train, test = _decoded(rows, seed, limit, image_size, skip_bad, cache or (lambda name, build, *inputs: build(*inputs)))
        classes = rows[0].classes
    generator = torch.Generator().manual_seed(seed)
    if limit is not None:
        train, test = (s if len(s) <= limit else s.subset(balanced_rows(s.labels, limit, generator)) for s in (train, test))
    unlabelled: Split | None = None
    if labelled is not None:
        if labelled > len(train):
            raise UserError(f"{spec}: {labelled} labelled images were asked for, but there are {len(train)} training images.")
        train, unlabelled = keep_labels(train, labelled, generator)
    train = spoil_labels(train, noise, len(classes), generator)
    return ImageData.of(spec, train, test, classes, unlabelled if transfer else None)


def _decoded(
    both: tuple[Rows, Rows], seed: int, limit: int | None, image_size: int | None, skip_bad: bool, cache: Cache
) -> tuple[Split, Split]:
    needs("PIL", "images")
    first = Decoder.of(both[0].source, image_size)
    decoders = [Decoder(rows.source, first.channels, first.size, first.resize) for rows in both]
    kept = [torch.arange(len(rows.labels)) for rows in both]
    if limit is not None:
        generator = torch.Generator().manual_seed(seed)
        kept = [balanced_rows(rows.labels, limit, generator).sort().values for rows in both]
    lazy = sum(map(len, kept)) * first.channels * first.size**2 >= MEMORY
    splits: list[Split] = []
    for rows, decoder, wanted in zip(both, decoders, kept):
        if not lazy:
            result = cache("pixels", decode_rows, decoder, wanted, skip_bad)
            splits.append(MemorySplit(result["pixels"], rows.labels[result["rows"]]))
        else:
            good = cache("readable", readable_rows, decoder, wanted)["rows"] if skip_bad else wanted
            splits.append(LazySplit(decoder, rows.labels[good], good))
    if bad := sum(map(len, kept)) - sum(map(len, splits)):
        warnings.warn(f"{bad} of {sum(map(len, kept))} images could not be read and were left out.", stacklevel=3)
    if not all(map(len, splits)):
        raise UserError("No image of the training or of the test split could be read.")
    return splits[0], splits[1]


def _folder(root: Path) -> tuple[Rows, Rows]:
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder (nor an embedded set of that name: {', '.join(EMBEDDED)}). {LAYOUTS}")
    names = ("train", *TEST_NAMES)
    places = {
        name: [place for end in ("", "-*") for sub in ("", "data/") for place in root.glob(f"{sub}{name}{end}.parquet") if place.is_file()]
        for name in names
    }
    read: Callable[..., Rows] = _tables
    if not places["train"]:
        places, read = {name: [root / name] if (root / name).is_dir() else [] for name in names}, _class_folders
    if not places["train"]:
        raise UserError(f"{root}: no training images were found. {LAYOUTS}")
    test = next((name for name in TEST_NAMES if places[name]), None)
    if test is None:
        raise UserError(f"{root}: there is a train split but no test split ({', '.join(TEST_NAMES)}). {LAYOUTS}")
    train = read(sorted(places["train"]), None)
    return train, read(sorted(places[test]), train.classes)


def _class_folders(places: Sequence[Path], classes: tuple[str, ...] | None) -> Rows:
    (place,) = places
    found = sorted(folder.name for folder in _inside(place) if folder.is_dir() and not folder.name.startswith("."))
    classes = tuple(found) if classes is None else classes
    if unknown := sorted(set(found) - set(classes)):
        raise UserError(f"{place}: the class folder {unknown[0]!r} is not among the {len(classes)} classes of the training images.")
    paths, labels = [], []
    for name in found:
        files = sorted(path for path in _inside(place / name) if path.suffix.lower() in IMAGE_FILES and not path.name.startswith("."))
        paths += files
        labels += [classes.index(name)] * len(files)
    if not paths:
        raise UserError(f"{place}: no images in its class folders. {LAYOUTS}")
    return Rows(Files(tuple(paths)), torch.tensor(labels), classes)


def _inside(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder} could not be read ({error.strerror}).") from error


def _tables(files: Sequence[Path], classes: tuple[str, ...] | None) -> Rows:
    pyarrow, parquet = needs("pyarrow", "images"), needs("pyarrow.parquet", "images")
    tables, origin, rows = [], [], 0
    for file in files:
        try:
            table = parquet.read_table(file)
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{file}: not a readable parquet file ({error}). It may be truncated: copy or download it again.") from error
        tables.append(table)
        origin.append((str(file), rows))
        rows += len(table)
    if not rows:
        raise UserError(f"{files[0]}: the table has no rows.")
    image, label = (_column(tables[0].column_names, names, str(files[0])) for names in (IMAGE_COLUMNS, LABEL_COLUMNS))
    names = _declared(tables[0].schema.metadata or {}, label, files[0])
    try:
        cells, labels = (pyarrow.chunked_array([c for t in tables for c in t[column].chunks]) for column in (image, label))
    except (KeyError, pyarrow.ArrowException) as error:
        raise UserError(f"{files[0].parent}: the tables {files[0].name} to {files[-1].name} have different columns ({error}).") from error
    source = Cells(cells, tuple(origin), fingerprint(image, [stamp(file) for file in files]))
    return _labelled(source, labels.to_pylist(), classes or (tuple(names) if names else None), label)


def _declared(metadata: Mapping[bytes, bytes], label: str, file: Path) -> list[str] | None:
    """The class names that the `datasets` library wrote into a table's metadata; None if it wrote none."""
    try:
        found = json.loads(metadata.get(b"huggingface", b"{}"))
        for key in ("info", "features", label, "names"):
            found = (found or {}).get(key)
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: its huggingface metadata are damaged ({error}).") from error
    if found is not None and not (isinstance(found, list) and all(isinstance(name, str) for name in found)):
        raise UserError(f"{file}: the class names of {label} in its metadata are {reprlib.repr(found)}, not a list of names.")
    return found


def _hub(spec: str) -> tuple[Rows, Rows]:
    datasets = needs("datasets", "hub")
    name, _, chosen = spec.partition("@")
    try:
        if chosen:
            train_name, test_name = (part.strip() for part in chosen.split(","))
            train, test = datasets.load_dataset(name, split=[train_name, test_name])
        else:
            every = datasets.load_dataset(name)
            train_name, test_name = "train", next((test for test in TEST_NAMES if test in every), "")
            if "train" not in every or not test_name:
                raise UserError(f"hub:{name} has the splits {', '.join(every)}: name the two to use as hub:{name}@TRAIN,TEST.")
            train, test = every["train"], every[test_name]
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"hub:{spec}: the data set could not be loaded ({error}). Write hub:ID or hub:ID@TRAIN,TEST.") from error
    rows = _dataset(train, f"{name} {train_name}", None)
    return rows, _dataset(test, f"{name} {test_name}", rows.classes)


def _dataset(table: Any, name: str, classes: tuple[str, ...] | None) -> Rows:
    datasets = needs("datasets", "hub")
    image, label = (_column(table.column_names, names, name) for names in (IMAGE_COLUMNS, LABEL_COLUMNS))
    cells = table.cast_column(image, datasets.Image(decode=False))[image]
    names = getattr(table.features[label], "names", None)
    source = Cells(cells, ((name, 0),), fingerprint(image, table._fingerprint))
    return _labelled(source, list(table[label]), classes or (tuple(names) if names else None), label)


def _column(columns: Sequence[str], wanted: Sequence[str], where: str) -> str:
    for name in wanted:
        if name in columns:
            return name
    raise UserError(f"{where}: no column {' or '.join(wanted)} among {', '.join(columns)}. {LAYOUTS}")


def _labelled(source: Cells, labels: list[Any], classes: tuple[str, ...] | None, column: str) -> Rows:
    """Labels as positions in `classes`, which without a declaration are those of the labels present."""
    for row, value in enumerate(labels):
        if value is not None and (not isinstance(value, int | str) or (isinstance(value, int) and value >= MOST_CLASSES)):
            raise UserError(
                f"{source.where(row)}: {column} is {reprlib.repr(value)}, neither a whole number below {MOST_CLASSES} nor a class's name. "
                "Correct or remove the row."
            )
    if classes is None:
        present = {label for label in labels if label is not None}
        whole = all(isinstance(label, int) for label in present)
        classes = tuple(map(str, range(max(present, default=-1) + 1))) if whole else tuple(sorted(map(str, present)))
    position = {name: number for number, name in enumerate(classes)}
    numbers = [label if isinstance(label, int) else position.get(str(label), -1) for label in labels]
    for row, number in enumerate(numbers):
        if not 0 <= number < len(classes):
            raise UserError(
                f"{source.where(row)}: {column} is {labels[row]!r}, which is not one of the {len(classes)} classes "
                f"({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''}). Correct or remove the row."
            )
    return Rows(source, torch.tensor(numbers), classes)
