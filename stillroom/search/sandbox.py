"""Running a function of a program whose text a machine wrote: in another interpreter, short of everything.

Process limits keep an accident small: time, memory, file size, an empty temporary folder, no inherited environment, and no network
where the system allows an unprivileged network namespace (Linux). They do not hold a determined attacker. A stricter sandbox
is any function with the signature of `run_function`.
"""

from __future__ import annotations

import ast
import ctypes
import functools
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.core.errors import UserError

Sandbox = Callable[[str, str, list], Any]
"""(source, name of the function, its arguments) -> its value. Raises SandboxError for whatever goes wrong inside."""

_CLONE_NEWUSER, _CLONE_NEWNET, _PR_SET_PDEATHSIG = 0x10000000, 0x40000000, 1

# One small interpreter waits, and forks a child for each call: starting an interpreter anew costs ten times as much.
# It reads the folder of a call, and answers with the child's process id and then its exit status.
_SERVER = """
import math, os, random, re, resource, string, sys

def call(folder):
    os.setsid()
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    os.dup2(os.open("error.txt", os.O_WRONLY | os.O_CREAT), 2)
    os.environ["TMPDIR"] = folder
    code = 1
    try:
        with open("request.txt", encoding="utf-8") as file:
            limits, source, name, args = eval(file.read())
        for limit, most in limits:
            resource.setrlimit(limit, (most, most))
        space = {"__name__": "agent"}
        exec(compile(source, "agent.py", "exec"), space)
        answer = repr(space[name](*args))
        with open("answer.txt", "w", encoding="utf-8") as file:
            file.write(answer)
        code = 0
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}")
        sys.stderr.flush()
    finally:
        os._exit(code)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        call(line[:-1])
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
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
    with suppress(ImportError, ValueError, OSError):
        import resource

        for limit, most in _rlimits(limits):
            resource.setrlimit(limit, (most, most))
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

    Raises SandboxError when the program raises, exits, is stopped at a limit or answers with something that is not a plain literal;
    UserError where the system cannot fork (Windows).
    """
    if not hasattr(os, "fork"):
        raise UserError("programs that rewrite themselves need a system with fork (Linux, macOS).")
    import resource

    with _ONE_CALL, tempfile.TemporaryDirectory(prefix="stillroom-", ignore_cleanup_errors=True) as folder:
        # The processor time is a second net under the time limit, should this process be killed meanwhile.
        processor_time = (resource.RLIMIT_CPU, math.ceil(limits.seconds) + 1)
        request = ([*_rlimits(limits), processor_time], source, name, args)
        Path(folder, "request.txt").write_text(repr(request), encoding="utf-8")
        if _server(os.getpid(), limits.network).poll() is not None:  # killed from outside, or with the thread that started it
            _server.cache_clear()
        server = _server(os.getpid(), limits.network)
        assert server.stdin
        assert server.stdout
        try:
            server.stdin.write(folder.encode() + b"\n")
            child = int(server.stdout.readline())
            in_time = bool(select.select([server.stdout], [], [], limits.seconds)[0])
            _kill_group(child)  # at a time-out the program; else whatever it left behind
            status = int(server.stdout.readline())
        except BaseException as error:  # it may not be in step with us any more
            server.kill()
            _server.cache_clear()
            if isinstance(error, OSError | ValueError):
                raise SandboxError("the waiting interpreter died") from None
            raise
        if not in_time:
            raise SandboxError(f"no answer after {limits.seconds:g} s")
        return _answer(Path(folder), status)


_ONE_CALL = threading.Lock()


@functools.cache
def _server(process: int, network: bool) -> subprocess.Popen:
    """The waiting interpreter of this process; a forked copy of the process gets its own."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        env={"PATH": os.defpath},
        preexec_fn=lambda: confine(Limits(network=network)),
        start_new_session=True,
    )


def _rlimits(limits: Limits) -> list[tuple[int, int]]:
    """(resource, bytes) pairs for `setrlimit`."""
    import resource

    found = [(resource.RLIMIT_CORE, 0)]
    for name, mebibytes in (("RLIMIT_AS", limits.memory_mb), ("RLIMIT_FSIZE", limits.file_mb)):
        if mebibytes is not None and hasattr(resource, name):
            found.append((getattr(resource, name), mebibytes << 20))
    return found


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _answer(folder: Path, status: int) -> Any:
    if status != 0:
        said = (folder / "error.txt").read_text(errors="replace").strip() if (folder / "error.txt").exists() else ""
        raise SandboxError(said or f"the program died (status {status})")
    try:
        return ast.literal_eval((folder / "answer.txt").read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise SandboxError(f"no usable answer ({type(error).__name__})") from None
