"""`python -m bench [steps kd startup]`: measure, write bench/results.json, print one table."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from bench import kd, startup, steps

RESULTS = Path(__file__).parent / "results.json"
PARTS = {"steps": steps.measure, "kd": kd.measure, "startup": startup.measure}


def rows(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, measured, ratio or quality) for every line of the table."""
    lines: list[tuple[str, str, str]] = []
    for size, r in results.get("steps", {}).items():
        low, high = r["quartiles"]
        lines.append((f"step of {size}", f"{r['hand ms']:.2f} ms by hand", f"core / hand {r['core / hand']:.3f} ({low:.3f} to {high:.3f})"))
    for setting, contenders in results.get("kd", {}).items():
        for name, r in contenders.items():
            if "missing" in r:
                lines.append((f"{setting}: {name}", "missing", r["missing"]))
                continue
            text = f"/ hand online {r['/ hand online']:.3f}, / stillroom without teacher {r['/ stillroom without teacher']:.3f}"
            text += f", / best peer {r['/ best peer']:.3f} ({r['best peer']})" if "best peer" in r else ""
            lines.append((f"{setting}: {name}", f"{r['ms']:.2f} ms a step", f"{text}; accuracy {r['accuracy']:.4f}, nll {r['nll']:.6f}"))
    for name, r in results.get("startup", {}).items():
        if "missing" in r:
            lines.append((name, "missing", r["missing"]))
        else:
            lines.append((name, f"{r['cpu s']:.2f} CPU s", f"{r['wall s']:.2f} s on the clock, peak {r['peak MB']:.0f} MB"))
    return lines


def main() -> None:
    torch.set_num_threads(1)
    chosen = sys.argv[1:] or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        sys.exit(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    results: dict[str, Any] = {
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg()[0], "processor": platform.processor() or platform.machine()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    results |= {part: PARTS[part]() for part in chosen}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print("| what | measured | |\n|---|---|---|")
    for line in rows(results):
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
