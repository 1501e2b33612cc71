"""An append-only JSONL file from which a search can be rebuilt after it was killed at any instant.

One line says what the search is, then two lines per job: one when it is asked for, one when it has reported. A job without the
second line was under way; it is run again under the same number and seed. Every line reaches the disk before the search acts on it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stillroom.core.errors import UserError

_FIRST = b'{"search": '


class Journal:
    """The open journal at `path`, held by this process alone until `close`.

    `lines` holds what was already there, the header left out. Raises UserError when another process holds the file, when it
    belongs to another search than `header` says, or when it is damaged anywhere but in a half-written last line, which is cut off;
    and for a header that is not JSON.
    """

    def __init__(self, path: str | Path, header: dict[str, Any]):
        self.path = Path(path)
        try:
            header = json.loads(json.dumps(header, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UserError(f"a search with a journal needs artefacts that are JSON, the root first: {error}.") from None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(f"{self.path}.lock")
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise UserError(f"{self.path} is being written by another process: wait for it, or give this search another folder.") from None
        try:
            whole = _cut_half_line(self.path)
            self.lines = read(self.path)[1] if whole else []
            if whole:
                self._same_search(read(self.path)[0], header)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - held open for the whole search
        except BaseException:
            self._lock.release()
            raise
        if not whole:
            self.write({"search": header})

    def _same_search(self, there: dict[str, Any], wanted: dict[str, Any]) -> None:
        other = [f"{key} {there.get(key)!r} there, {value!r} here" for key, value in wanted.items() if there.get(key) != value]
        if other:
            raise UserError(f"{self.path} belongs to another search ({'; '.join(other)}): continue with the same, or name another folder.")

    def write(self, line: dict[str, Any]) -> None:
        """Append one line and see it to the disk. ValueError or TypeError if it is not JSON."""
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file."""
        try:
            self._file.close()
        finally:
            self._lock.release()


def read(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(header, lines) of a journal, without taking it; a half-written last line is left out."""
    text = Path(path).read_text(encoding="utf-8")
    lines = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path} is damaged: line {number} is not JSON. Restore the file, or name another folder.") from None
    if not lines or "search" not in lines[0]:
        raise UserError(f"{path} is not the journal of a search.")
    return lines[0]["search"], lines[1:]


def _cut_half_line(path: Path) -> bool:
    """Truncate the journal `path` after its last whole line; whether one is left. UserError, and no change, for any other file."""
    if not path.exists():
        return False
    data = path.read_bytes()
    if not _FIRST.startswith(data[: len(_FIRST)]):
        raise UserError(f"{path} is not the journal of a search: name another file.")
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with open(path, "r+b") as file:
            file.truncate(whole)
    return whole > 0
