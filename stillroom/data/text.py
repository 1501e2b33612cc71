"""Labelled texts as padded token ids: a folder of jsonl or parquet files, or `hub:ID`."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.core.errors import UserError, needs
from stillroom.core.store import fingerprint
from stillroom.data.images import Batch, balanced_rows
from stillroom.data.load import LABEL_COLUMNS, TEST_NAMES

TEXT_COLUMNS = ("text", "sentence", "content")
LAYOUTS = (
    "Understood are train.jsonl (or train.parquet) beside test or validation files, with a column text (or sentence, content) and a "
    "column label (or labels)."
)


Pairs = list[tuple[str, Any]]
"""Texts with their labels."""


class TokenSplit:
    """Token ids (N, L) int64, padded, and labels (N,) int64. A batch holds the ids where an image split has the images."""

    def __init__(self, ids: Tensor, labels: Tensor):
        self.ids, self.labels = ids, labels

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Batch:
        index = index.to(self.device)
        return Batch(index, self.ids[index], self.labels[index])

    def to(self, device: torch.device | str) -> TokenSplit:
        return TokenSplit(self.ids.to(device), self.labels.to(device))

    def subset(self, rows: Tensor, labels: Tensor | None = None) -> TokenSplit:
        return TokenSplit(self.ids[rows], self.labels[rows] if labels is None else labels)

    def images(self) -> Tensor:
        """All ids."""
        return self.ids

    def fingerprint(self) -> str:
        return fingerprint(self.ids, self.labels)


@dataclass(frozen=True)
class TextData:
    """A text classification task."""

    name: str
    train: TokenSplit
    test: TokenSplit
    classes: tuple[str, ...]

    def to(self, device: torch.device | str) -> TextData:
        return TextData(self.name, self.train.to(device), self.test.to(device), self.classes)


def load_texts(spec: str, tokenizer: Any, *, seed: int, length: int, labelled: int | None = None, limit: int | None = None) -> TextData:
    """The task that `spec` names, cut to `length` tokens; at most `limit` training and test texts, of the former `labelled`, both drawn
    from `seed` and balanced over the classes. UserError naming file and row for what cannot be used."""
    tables, places = _hub(spec.removeprefix("hub:")) if spec.startswith("hub:") else _folder(Path(spec))
    names = sorted({str(label) for _, label in tables[0]}, key=lambda name: (len(name), name) if name.isdigit() else (0, name))
    position, splits = {name: i for i, name in enumerate(names)}, []
    generator = torch.Generator().manual_seed(seed)
    for table, most in zip(tables, (min(labelled or 2**62, limit or 2**62), limit or 2**62)):
        unknown = next((row for row, (_, label) in enumerate(table, 1) if str(label) not in position), None)
        if unknown is not None:
            raise UserError(
                f"{places[1]}, row {unknown}: the label {table[unknown - 1][1]!r} of a test text is not among the {len(names)} classes of "
                "the training texts."
            )
        labels = torch.tensor([position[str(label)] for _, label in table])
        rows = balanced_rows(labels, most, generator) if most < len(table) else torch.arange(len(table))
        texts = [table[row][0] for row in rows.tolist()]
        ids = tokenizer(texts, truncation=True, max_length=length, padding=True, return_tensors="pt")["input_ids"]
        splits.append(TokenSplit(ids, labels[rows]))
    return TextData(spec, splits[0], splits[1], tuple(names))


def _folder(root: Path) -> tuple[tuple[Pairs, Pairs], tuple[str, str]]:
    """Training and test texts with their labels, and where they stand."""
    files = {
        name: next((f for end in ("jsonl", "parquet") if (f := root / f"{name}.{end}").is_file()), None) for name in ("train", *TEST_NAMES)
    }
    test = next((files[name] for name in TEST_NAMES if files[name]), None)
    if files["train"] is None or test is None:
        raise UserError(f"{root}: no training or no test texts were found. {LAYOUTS}")
    return (_rows(files["train"]), _rows(test)), (str(files["train"]), str(test))


def _rows(file: Path) -> Pairs:
    if file.suffix == ".parquet":
        pyarrow, parquet = needs("pyarrow", "images"), needs("pyarrow.parquet", "images")
        try:
            records = parquet.read_table(file).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{file}: not a readable parquet file ({error}).") from error
    else:
        records = []
        try:
            lines = file.read_text(encoding="utf-8").rstrip().split("\n")  # splitlines would also part at U+2028, which JSON may hold
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: not readable as UTF-8 text ({error}).") from error
        for number, line in enumerate(lines if lines != [""] else [], 1):
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}, line {number}: not readable JSON ({error}).") from error
            if not isinstance(records[-1], dict):
                raise UserError(f"{file}, line {number}: {reprlib.repr(records[-1])} is no object with a text and a label.")
    return _pairs(records, str(file))


def _hub(spec: str) -> tuple[tuple[Pairs, Pairs], tuple[str, str]]:
    datasets = needs("datasets", "hub")
    try:
        every = datasets.load_dataset(spec)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"hub:{spec}: the data set could not be loaded ({error}).") from error
    test = next((name for name in TEST_NAMES if name in every), None)
    if "train" not in every or test is None:
        raise UserError(f"hub:{spec} has the splits {', '.join(every)}: a train and a test split are needed.")
    places = f"{spec} train", f"{spec} {test}"
    return (_pairs(list(every["train"]), places[0]), _pairs(list(every[test]), places[1])), places


def _pairs(records: Sequence[Mapping[str, Any]], where: str) -> Pairs:
    if not records:
        raise UserError(f"{where}: there are no texts.")
    text, label = (next((c for c in names if c in records[0]), None) for names in (TEXT_COLUMNS, LABEL_COLUMNS))
    if text is None or label is None:
        raise UserError(f"{where}: no text or no label among the columns {', '.join(records[0])}. {LAYOUTS}")
    for number, record in enumerate(records, 1):
        if not isinstance(record.get(text), str) or record.get(label) is None:
            raise UserError(f"{where}, row {number}: text and label must both be given. Correct or remove the row.")
        if not isinstance(record[label], int | str):
            wrong = reprlib.repr(record[label])
            raise UserError(f"{where}, row {number}: the label is {wrong}, neither a whole number nor a class's name. Correct the row.")
    return [(record[text], record[label]) for record in records]
