"""Started by torchrun: recipes at a few steps under DDP, then under FSDP2; rank 0 writes what each measured, or why it was refused.
`every_recipe.py FOLDER NAME…`"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

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


def measured(engine: Any, folder: Path, name: str) -> Any:
    recipe = cards.load(name)
    with Run(folder / name, 0, engine=engine, store=Store(folder / "store"), plots=False) as run:
        try:
            return execute(name, override(recipe.Config(), recipe.TINY), run)["metrics"]
        except UserError as error:
            return str(error)


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    save, ddp, place = Run.save, make("ddp", "cpu"), Path(folder)
    with mock.patch.object(Run, "save", lambda run, *where: (same_everywhere(run), save(run, *where))[1]):
        found = {"ddp": {name: measured(ddp, place / "ddp", name) for name in names}}
    fsdp2 = make("fsdp2", "cpu")
    found["fsdp2"] = {name: measured(fsdp2, place / "fsdp2", name) for name in names}
    if not ddp.rank:
        (place / "found.json").write_text(json.dumps(found))
    ddp.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
