"""What language recipes read: a text as a group of flags that their Configs inherit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stillroom.core.config import Count, Natural
from stillroom.core.errors import UserError
from stillroom.data.sequences import BackCopy, Rows
from stillroom.lm.text import read_rows
from stillroom.lm.tokenizer import Characters, pretrained_tokenizer

PROCEDURAL = "back-copy"


@dataclass(frozen=True)
class Corpus:
    """A text, its training and its test part."""

    data: str = PROCEDURAL
    """back-copy, a text file, or JSON lines of chats ({"messages": ...}) or of {"question", "answer"}."""
    test: str = ""
    """A file of test text; default: the last twentieth of `data`."""
    tokenizer: str = ""
    """hf:ID-or-folder, whose tokenizer reads `data`; default: the teacher's own, or one of single characters."""
    length: Count = 32
    """Tokens per sequence; longer ones are cut."""
    limit: Natural = 0
    """Training sequences; 0: all of a file, of back-copy fresh ones at every step."""
    test_limit: Natural = 512
    """Test sequences; 0: all of a file, 512 of back-copy."""

    @property
    def procedural(self) -> bool:
        """Whether the text is drawn by rule, without end."""
        return self.data == PROCEDURAL

    def words(self) -> Any:
        """The tokenizer for models that bring none. UserError for a missing file, or a tokenizer where words are not read."""
        if self.procedural:
            if self.tokenizer:
                raise UserError("--tokenizer reads a file, and back-copy is no text: give --data too.")
            return Characters("".join(chr(0x4E00 + i) for i in range(BackCopy().words - 2)), symbols=())
        text = _text(self.data)
        if not self.tokenizer:
            return Characters(text)
        kind, _, name = self.tokenizer.partition(":")
        if kind != "hf" or not name:
            raise UserError(f"--tokenizer {self.tokenizer}: write hf:ID-or-folder.")
        return pretrained_tokenizer(name, f"--tokenizer {self.tokenizer}")

    def rows(self, tokenizer: Any, seed: int) -> tuple[Rows, Rows]:
        """Training and test rows. UserError as for `read_rows`."""
        if self.procedural:
            if self.test:
                raise UserError("--test names a file, and back-copy is drawn by rule: give --data too.")
            draw = lambda count, first: Rows.plain(BackCopy().draw(count, self.length, torch.Generator().manual_seed(first + seed)))
            return draw(self.limit or 4096, 20_000), draw(self.test_limit or 512, 10_000)
        return self.parted(lambda path: read_rows(path, tokenizer, self.length), lambda rows, part: rows.take(part))

    def parted(self, read: Callable[[str], Any], take: Callable[[Any, slice], Any]) -> tuple[Any, Any]:
        """Training and test part of what `read` finds in `data`, or in `data` and `test`."""
        train, test = read(self.data), read(self.test) if self.test else None
        if test is None:
            held = max(1, len(train) // 20)
            train, test = take(train, slice(0, -held)), take(train, slice(-held, None))
        return take(train, slice(0, self.limit or None)), take(test, slice(0, self.test_limit or None))

    def decides(self) -> tuple:
        """What a model that learns all of the training part depends on, for the store's keys: the text itself, not where it lies."""
        return (BackCopy.draw, self.length, *(() if self.procedural else (_text(self.data), bool(self.test))))


def _text(path: str) -> str:
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such file; give back-copy or a text file.")
    return Path(path).read_text(encoding="utf-8")
