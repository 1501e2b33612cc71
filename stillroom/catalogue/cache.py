"""What the store holds, for `stillroom cache`."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

from stillroom.core.errors import UserError
from stillroom.core.store import Store

# An entry, its lock, or what a killed builder left of it; nothing else in the folder is ever touched.
ENTRY = re.compile(r"\.?(?P<key>(?P<name>.+)-[0-9a-f]{32})(?:\.lock|\.\d+\.tmp)?")


def entries(store: Store) -> list[dict[str, Any]]:
    """Every entry with its name, size in bytes, time of last use and folder, latest first."""
    if not store.folder.is_dir():
        return []
    found = []
    for path in store.folder.iterdir():
        match = ENTRY.fullmatch(path.name)
        if match and path.name == match["key"] and path.is_dir():
            with contextlib.suppress(FileNotFoundError):  # another process may clear it meanwhile
                found.append({"name": match["name"], "bytes": _bytes(path), "used": path.stat().st_mtime, "folder": path})
    return sorted(found, key=lambda entry: -entry["used"])


def clear(store: Store, name: str | None = None) -> tuple[int, int]:
    """Delete all entries (or those called `name`) that no process holds, and what killed builders left; the number of entries and
    all bytes. UserError when none is called `name`."""
    from filelock import Timeout

    count = size = 0
    matches = [ENTRY.fullmatch(path.name) for path in store.folder.iterdir()] if store.folder.is_dir() else []
    for key in {match["key"] for match in matches if match and name in (None, match["name"])}:
        folder = store.folder / key
        lock = store.lock(folder)
        with contextlib.suppress(Timeout), lock.acquire(timeout=0):
            count += folder.is_dir()
            for path in (folder, *store.leftovers(folder)):
                size += _bytes(path)
                shutil.rmtree(path, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)  # while held: whoever waits for it then locks a new file
    if name and not count:
        raise UserError(f"no cache entry called {name!r} was deleted: there is none, or it is in use. `stillroom cache` lists them.")
    return count, size


def _bytes(folder: Path) -> int:
    total = 0
    for place, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(place, file)).st_size
    return total
