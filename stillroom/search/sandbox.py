"""Running a function of a program whose text a machine wrote: in another interpreter, short of everything.

Process limits keep an accident small: time, memory, file size, an empty temporary folder, no inherited environment, and no network
where the system allows an unprivileged network namespace (Linux). They do not hold a determined attacker; a stricter sandbox is any
function with the signature of `run_function` (recipes take that of the language models where the system has it). What a program leaves
is not trusted: of its files only small regular ones are read, no number that it could write is signalled, and everything has a deadline.
"""

from __future__ import annotations

import ast
import ctypes
import functools
import math
import os
import select
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.core.errors import UserError

Sandbox = Callable[[str, str, list], Any]
"""(source, name of the function, its arguments) -> its value. Raises SandboxError for whatever goes wrong inside."""

_CLONE_NEWUSER, _CLONE_NEWNET, _PR_SET_PDEATHSIG = 0x10000000, 0x40000000, 1

_ANSWER = 16 << 20
"""Bytes of an answer that are read at most."""
_GRACE = 5.0
"""Seconds beyond a program's own limit after which the waiting interpreter itself is replaced."""

# One small interpreter waits, and forks a child for each call: starting an interpreter anew costs ten times as much. It reads seconds and
# the folder of a call, stops the child and whatever it started when they are over, and answers with the folder, whether the child was
# in time, and its exit status. That the folder comes back tells the host which call an answer belongs to.
_SERVER = """
import ctypes, math, os, random, re, resource, signal, string, sys

def call(folder):
    os.setsid()
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
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
            hard = resource.getrlimit(limit)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
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

def late(*_):
    raise TimeoutError

signal.signal(signal.SIGALRM, late)
for line in sys.stdin:
    seconds, _, folder = line[:-1].partition(" ")
    child = os.fork()
    if child == 0:
        call(folder)
    in_time = 1
    try:
        signal.setitimer(signal.ITIMER_REAL, float(seconds))
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # not reaped yet, so that its number is nobody else's
        signal.setitimer(signal.ITIMER_REAL, 0)
    except TimeoutError:
        in_time = 0
    for kill in (os.killpg, os.kill):  # what it left behind, and itself should it not have reached setsid
        try:
            kill(child, signal.SIGKILL)
        except OSError:
            pass
    print(folder, in_time, os.waitpid(child, 0)[1], flush=True)
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

        for limit, most in _rlimits(limits):
            hard = resource.getrlimit(limit)[1]  # one that is lower already stays
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            with suppress(ValueError, OSError):
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
        try:
            server.stdin.write(f"{limits.seconds} {folder}\n".encode())
            in_time, status = _reply(server, folder, limits.seconds + _GRACE)
        except BaseException as error:  # it may not be in step with us any more
            server.kill()
            _server.cache_clear()
            if isinstance(error, OSError | ValueError):
                raise SandboxError("the waiting interpreter died") from None
            raise
        if not in_time:
            raise SandboxError(f"no answer after {limits.seconds:g} s")
        return _answer(Path(folder), status)


def _reply(server: subprocess.Popen, folder: str, seconds: float) -> tuple[bool, int]:
    """Whether the call in `folder` was in time, and its exit status. OSError when there is no such line within `seconds`."""
    assert server.stdout
    deadline, held = time.monotonic() + seconds, b""
    while True:
        if not select.select([server.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        part = os.read(server.stdout.fileno(), 1 << 16)
        if not part:
            raise BrokenPipeError("it ended")
        held += part
        while b"\n" in held:
            line, _, held = held.partition(b"\n")
            place, *numbers = line.decode(errors="replace").rsplit(" ", 2)
            if place == folder and len(numbers) == 2:
                return numbers[0] == "1", int(numbers[1])


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


def _answer(folder: Path, status: int) -> Any:
    if status != 0:
        raise SandboxError(_text(folder / "error.txt").strip() or f"the program died (status {status})")
    try:
        return ast.literal_eval(_text(folder / "answer.txt"))
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise SandboxError(f"no usable answer ({type(error).__name__})") from None


def _text(file: Path) -> str:
    """What a program wrote; "" for anything but a regular file of at most `_ANSWER` bytes, so that no pipe, link or device is followed."""
    try:
        number = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return ""
    with os.fdopen(number, "rb") as opened:
        about = os.fstat(number)
        if not stat.S_ISREG(about.st_mode) or about.st_size > _ANSWER:
            return ""
        return opened.read(_ANSWER).decode(errors="replace")
