"""What a run writes down while it runs: metrics.jsonl, and the time spent."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from stillroom.core.errors import needs


class Clock:
    """Wall-clock seconds of a run over all the processes that worked on it."""

    def __init__(self) -> None:
        self.started, self.earlier = time.monotonic(), 0.0

    def seconds(self) -> float:
        return self.earlier + time.monotonic() - self.started


class MetricsLog:
    """Lines `{"loop": …, "step": …, NAME: number, …}`; a resumed loop first forgets the lines of the steps it will run again."""

    def __init__(self, file: Path, writes: bool = True, tensorboard: bool = False):
        self.file, self.writes, self.size = file, writes, 0
        self._events: Any = _events(file.parent) if writes and tensorboard else None
        self.record: dict[str, Any] = {}
        self._lines: list[str] = []
        self._flushed = time.monotonic()

    def write(self, loop: str, step: int) -> None:
        """End the record of this step. Numbers leave the device here, not when they were logged."""
        numbers = {k: float(v.detach() if isinstance(v, torch.Tensor) else v) for k, v in self.record.items()}
        self.record.clear()
        if numbers and self.writes:
            self._lines.append(json.dumps({"loop": loop, "step": step, **numbers}) + "\n")
            for name, value in numbers.items() if self._events else ():
                self._events.add_scalar(f"{loop}/{name}", value, step)
            if time.monotonic() - self._flushed > 2:
                self.flush()

    def flush(self, sync: bool = False) -> int:
        """Bring all lines to the file, and with `sync` to the disk, before a checkpoint counts on them; its size in bytes."""
        if self._lines or (sync and self.file.exists()):
            with open(self.file, "a") as out:
                out.writelines(self._lines)
                if sync:
                    out.flush()
                    os.fsync(out.fileno())
            self._lines.clear()
        self._flushed = time.monotonic()
        self.size = self.file.stat().st_size if self.file.exists() else 0
        return self.size

    def truncate(self, size: int | None = None) -> None:
        """Forget what was logged after the file had `size` bytes (default: after the last finished loop)."""
        self.size = self.size if size is None else size
        if self.writes and self.file.exists() and self.file.stat().st_size > self.size:
            os.truncate(self.file, self.size)


def _events(folder: Path) -> Any:
    needs("tensorboard", "tensorboard", "--tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


def progress_bar(path: str, loop: str, start: int, total: int) -> Any:
    """A bar for the steps that are left, named by stage and loop; none when nothing is left."""
    if start >= total:
        return None
    from tqdm import tqdm

    label = path.partition("/")[2] or path
    return tqdm(total=total, initial=start, desc=label if loop == "train" else f"{label}:{loop}", leave=False, disable=None)
