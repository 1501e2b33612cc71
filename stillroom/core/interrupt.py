"""Ctrl-C and SIGTERM wait for the end of a step, so that it can be saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import Any

from stillroom.core.errors import UserError


class Interrupted(UserError):
    """Ctrl-C or SIGTERM arrived and the run saved its state."""


class Signals(contextlib.AbstractContextManager):
    """While a loop runs, the first signal sets `stop`; the second one takes effect at once."""

    def __init__(self, stop: threading.Event):
        self.stop = stop
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._arrived)

    def _arrived(self, number: int, frame: Any) -> None:
        if self.stop.is_set():
            raise KeyboardInterrupt
        self.stop.set()

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
