"""Programs in two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def launched(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """A program in two processes; the launcher finds its port by itself: one that is looked for here may be taken before it starts."""
    launcher = [sys.executable, *["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([*launcher, *words], env={**os.environ, **settings}, capture_output=True, text=True, check=False)
