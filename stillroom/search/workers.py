"""Running somebody's `modify` and `evaluate` so that nothing they do can stop the search.

`guarded` runs one call in a process of its own: an exception, an exit, a crash, a value that cannot be sent back and a time-out all
come home as an error message. The calls are trusted not to be hostile; programs that write themselves belong in `sandbox.py`.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from stillroom.search.sandbox import Limits, confine

_CONTEXT: Any = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")


@dataclass(frozen=True)
class Report:
    """What a call gave: its value, or the error that replaced it."""

    value: Any = None
    error: str = ""


def attempt(call: Callable[..., Any], args: tuple) -> Report:
    """`call(*args)` in this process; exceptions become errors."""
    try:
        return Report(call(*args))
    except Exception as error:
        return Report(error=f"{type(error).__name__}: {error}")


def guarded(call: Callable[..., Any], args: tuple, limits: Limits) -> Report:
    """`call(*args)` in a process of its own, which is killed with all its offspring at the end or after `limits.seconds`."""
    ours, theirs = _CONTEXT.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="stillroom-", ignore_cleanup_errors=True) as folder:
        process = _CONTEXT.Process(target=_child, args=(theirs, call, args, limits, folder))
        process.start()
        theirs.close()
        try:
            if not ours.poll(limits.seconds):
                return Report(error=f"TimeoutError: no answer after {limits.seconds:g} s")
            report, modules = ours.recv()
            _import(modules)
            return report
        except EOFError:
            process.join(5)
            return Report(error=f"the process died (exit code {process.exitcode})")
        except Exception as error:
            return Report(error=f"the answer could not be read ({type(error).__name__}: {error})")
        finally:
            _kill(process)
            ours.close()


def _child(pipe: Any, call: Callable[..., Any], args: tuple, limits: Limits, folder: str) -> None:
    if hasattr(os, "setsid"):
        os.setsid()
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    confine(limits)
    known = set(sys.modules)
    try:
        report = attempt(call, args)
    except BaseException as error:  # SystemExit and KeyboardInterrupt are this call's failure as well
        report = Report(error=f"{type(error).__name__}: {error}")
    modules = [name for name, module in sys.modules.items() if name not in known and getattr(module, "__spec__", None)]
    try:
        pipe.send((report, modules))
    except Exception as error:
        pipe.send((Report(error=f"the answer could not be sent ({type(error).__name__}: {error})"), modules))
    pipe.close()


def _import(modules: list[str]) -> None:
    """Import here what a job imported, so that the next one, a fork of this process, need not: for torch's optimizers that is seconds."""
    for name in modules:
        with suppress(Exception):
            importlib.import_module(name)


def _kill(process: Any) -> None:
    if hasattr(os, "killpg"):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            process.kill()  # it had not reached setsid, or is gone already
    else:
        process.kill()
    process.join()


def processes(workers: int) -> Executor:
    """Joblib's own pool of worker processes, as a `concurrent.futures` executor."""
    from joblib.externals.loky import get_reusable_executor

    return get_reusable_executor(max_workers=workers)
