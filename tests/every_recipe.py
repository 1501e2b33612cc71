"""Started by torchrun: recipes at a few steps under an engine; rank 0 writes what each measured. `every_recipe.py ENGINE FOLDER NAME…`"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from stillroom.catalogue import cards
from stillroom.catalogue.execute import execute
from stillroom.core.config import override
from stillroom.core.engine import make
from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.core.store import Store


def same_everywhere(run: Run) -> None:
    """Every process holds the same weights."""
    for role in run.roles.values():
        for p in role.parameters:
            mine = p.detach().flatten()
            assert torch.equal(run.engine.gather(mine), mine.repeat(run.world)), role.name


def main(engine: str, folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    placed, save, found = make(engine, "cpu"), Run.save, {}  # type: ignore[arg-type]
    if engine == "ddp":
        Run.save = lambda run, *place: (same_everywhere(run), save(run, *place))[1]  # type: ignore[method-assign, assignment, misc]
    for name in names:
        recipe = cards.load(name)
        cfg = override(recipe.Config(), recipe.TINY)
        with Run(Path(folder) / name, 0, engine=placed, store=Store(Path(folder) / "store"), plots=False) as run:
            try:
                found[name] = execute(name, cfg, run)["metrics"]
            except UserError as error:
                found[name] = str(error)
    if not placed.rank:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    placed.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
