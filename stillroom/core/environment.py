"""What a reader needs to place a result: versions of the main packages, commit, processor, peak memory."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from stillroom import __version__

PACKAGES = ("torch", "numpy", "scikit-learn", "safetensors", "transformers", "diffusers", "accelerate", "peft", "kornia")


def environment() -> dict[str, Any]:
    """Versions of the main packages, commit, processor, peak memory: what a reader needs to place a result."""
    return {"versions": versions(), "commit": commit(), "processor": processor(), "peak_memory_mb": peak_memory_mb()}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "stillroom": __version__}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


@functools.cache
def commit() -> str | None:
    """The checkout's commit, marked + when files differ from it; None for an installed package, or without git."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    git = lambda *words: subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False).stdout.strip()
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "stillroom")
    return (git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")) or None


def processor() -> str:
    import torch

    if torch.accelerator.is_available() and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    return f"{name[1] if name else platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def peak_memory_mb() -> float:
    """Of this process, the device's included."""
    import sys

    import torch

    device = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    try:
        import resource
    except ImportError:  # no such module on Windows
        return round(device, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return round(peak + device, 1)
