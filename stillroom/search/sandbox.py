"""Running a function of a program whose text a machine wrote: another interpreter, short of everything.

Process limits keep an accident small: time, memory, file size, an empty temporary folder, no inherited environment, and no network
where the system allows an unprivileged network namespace (Linux). They do not hold a determined attacker. A stricter sandbox
is any function with the signature of `run_function`.
"""

from __future__ import annotations

import ast
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Sandbox = Callable[[str, str, list], Any]
"""(source, name of the function, its arguments) -> its value. Raises SandboxError for whatever goes wrong inside."""

_CLONE_NEWUSER, _CLONE_NEWNET, _PR_SET_PDEATHSIG = 0x10000000, 0x40000000, 1

# Literals, not JSON: importing json would double the time that the interpreter takes to start.
_SHIM = """
import sys
source, name, args = eval(sys.stdin.read())
space = {"__name__": "agent"}
exec(compile(source, "agent.py", "exec"), space)
answer = repr(space[name](*args))
with open("answer.txt", "w", encoding="utf-8") as file:
    file.write(answer)
"""


class SandboxError(Exception):
    """The program failed, was stopped at a limit, or answered with something that is not a plain literal."""


@dataclass(frozen=True)
class Limits:
    """What one job may use up."""

    seconds: float = 3600.0
    """Wall-clock seconds (the paper allows an hour per modification and per evaluation)."""
    memory_mb: int | None = None
    """Address space in MiB. Programs that import torch reserve several GiB without using them."""
    file_mb: int | None = None
    """Largest file it may write, MiB."""
    network: bool = True


def confine(limits: Limits) -> None:
    """Put this process under `limits`, the time limit left out, and let it die with its parent. What the system lacks is passed over."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with suppress(ImportError):
        import resource

        for name, mebibytes in (("RLIMIT_AS", limits.memory_mb), ("RLIMIT_FSIZE", limits.file_mb)):
            if mebibytes is not None and hasattr(resource, name):
                with suppress(ValueError, OSError):
                    resource.setrlimit(getattr(resource, name), (mebibytes << 20,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not limits.network:
        cut_network()


def cut_network() -> bool:
    """Move this process into an empty network namespace; False where the system refuses (then there is still a network)."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    return libc.unshare(_CLONE_NEWNET) == 0 or libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0


def run_function(source: str, name: str, args: list, limits: Limits = Limits(seconds=5, memory_mb=512, file_mb=1, network=False)) -> Any:
    """`name(*args)` of the program `source`; arguments and value are plain literals (numbers, strings, lists, dicts, tuples, None).

    Raises SandboxError when the program raises, exits, is stopped at a limit or answers with something that is not a plain literal.
    """
    with tempfile.TemporaryDirectory(prefix="stillroom-", ignore_cleanup_errors=True) as folder:
        with open(Path(folder, "error.txt"), "wb") as error:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _SHIM],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=error,
                cwd=folder,
                env={"TMPDIR": folder, "PATH": os.defpath},
                preexec_fn=(lambda: confine(limits)) if os.name == "posix" else None,
                start_new_session=True,
            )
            try:
                process.communicate(repr((source, name, args)).encode(), timeout=limits.seconds)
            except subprocess.TimeoutExpired:
                raise SandboxError(f"no answer after {limits.seconds:g} s") from None
            finally:
                _kill_group(process)
        return _answer(Path(folder), process.returncode)


def _kill_group(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, 9) if hasattr(os, "killpg") else process.kill()
    process.wait()


def _answer(folder: Path, code: int) -> Any:
    if code != 0:
        said = (folder / "error.txt").read_text(errors="replace").strip().splitlines()
        raise SandboxError(said[-1] if said else f"exit code {code}")
    try:
        return ast.literal_eval((folder / "answer.txt").read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise SandboxError(f"no usable answer ({error})") from None
