"""Install the peers that the benchmark compares with, one virtual environment each: python bench/install_peers.py [NAME ...]

Each sees the packages of the environment that runs this script, so that all use the very same torch; what a peer needs beside them
is installed without its dependencies, because these would replace torch. transformers comes with the extra `bench`, not from here.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

VENVS = Path(__file__).parent / ".venvs"

PEERS = {
    "torchdistill": ["torchdistill==1.1.5", "torchvision", "cython"],
    "modelopt": ["nvidia-modelopt==0.47.0", "ninja", "pulp", "nvidia-ml-py", "omegaconf", "antlr4-python3-runtime==4.9.3"],
    # editable, because its wheel leaves out some of its own packages
    "distillkit": ["-e", "git+https://github.com/arcee-ai/DistillKit@a61c2e7d25c2e990d45832e12bd8542bdee9c810#egg=distillkit", "pydantic"],
    "kd_lib": ["KD-Lib==0.0.32", "torchvision", "tensorboard", "protobuf", "absl-py", "grpcio", "werkzeug", "markdown"],
}


def python_of(peer: str) -> str:
    """The interpreter of a peer's environment; this one for peers that live in it."""
    return str(VENVS / peer / "bin" / "python") if peer in PEERS else sys.executable


def install(peer: str) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(VENVS / peer)], check=True)
    python = python_of(peer)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True
    )
    (Path(site.stdout.strip()) / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-m", "pip", "install", "--no-deps", *PEERS[peer]], check=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or PEERS:
        install(name)
