"""Started by torchrun: recipes of several steps under FSDP2, on networks whose blocks are sharded on their own. `wide.py FOLDER`

dmd2 runs on whole networks too, for the same numbers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from stillroom.core.config import override
from stillroom.core.engine import make
from stillroom.core.run import Run
from stillroom.core.store import Store
from stillroom.recipes.diffusion import dmd2, phased_dmd
from tests.diffusion.tiny import untrained

SMALL = {"steps": 4, "batch": 4, "evaluate": 4}


def main(folder: str) -> None:
    torch.set_num_threads(1)
    placed, found = make("fsdp2", "cpu"), {}
    runs: list[tuple[str, Any, dict[str, Any], Any]] = [
        ("dmd2", dmd2, {"fake_updates": 2}, placed),
        ("dmd2 whole", dmd2, {"fake_updates": 2}, make("ddp", "cpu")),
        ("phased_dmd", phased_dmd, {"fake_updates": 1}, placed),
    ]
    for name, recipe, more, engine in runs:
        cfg = override(recipe.Config(), {**recipe.TINY, **SMALL, "updates": 3, **more})
        setting = untrained("ring", width=600, depth=1)
        with Run(Path(folder) / name, 0, engine=engine, store=Store(Path(folder) / "store"), plots=False) as run:
            found[name] = recipe.main(cfg, run, setting=setting)["energy"]
    if not placed.rank:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    placed.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
