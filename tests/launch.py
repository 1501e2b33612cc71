"""Programs in two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def launched(*words: str, seconds: float | None = None, **environment: str) -> subprocess.CompletedProcess:
    """A program in two processes; the launcher finds its port by itself: one that is looked for here may be taken before it starts.

    subprocess.TimeoutExpired, and the program is ended, when it takes longer than `seconds`.
    """
    launcher = [sys.executable, *["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*launcher, *words], env={**os.environ, **settings}, **pipes) as started:
        try:
            out, errors = started.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            started.terminate()  # the launcher ends its processes
            raise
    return subprocess.CompletedProcess(started.args, started.returncode, out, errors)
