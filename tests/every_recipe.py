"""Started by torchrun: recipes at a few steps under an engine; rank 0 writes what each measured. `every_recipe.py ENGINE FOLDER NAME…`"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from stillroom import catalogue
from stillroom.config import override
from stillroom.engine import make
from stillroom.errors import UserError
from stillroom.run import Run
from stillroom.store import Store

SMALL: dict[str, dict[str, Any]] = {
    "kd": {"steps": 6, "teacher_steps": 6},
    "ps-kd": {"epochs": 2},
    "sla": {"steps": 6},
    "teacher-guidance": {"part": "deep", "fit_steps": 6, "generations": 2},
    "quantized-distillation": {"steps": 6, "teacher_steps": 6},
    "jei-dnn": {"backbone_steps": 6, "epochs": 2, "warmup_epochs": 1, "tradeoffs": (1.0,)},
    "krr-st": {"teacher_steps": 4, "steps": 4, "pretrain_steps": 4, "finetune_steps": 4, "repeats": 1},
    "further-pretraining": {"checkpoint_steps": 4, "steps": 4, "batch_size": 24, "finetune_steps": 4, "finetune_batch": 24},
    "dmd2": {"updates": 2, "evaluate": 64, "batch": 64},
    "consistency": {"updates": 4, "evaluate": 64, "batch": 64},
    "phased-dmd": {"updates": 2, "evaluate": 64, "batch": 64, "toy_steps": 0, "guidance": 1.0},
    "slimflow": {"pairs": 64, "pair_steps": 4, "reflow_steps": 4, "distil_steps": 4, "evaluate": 64},
    "agd": {"trajectories": 64, "steps": 4, "updates": 4, "batch": 64, "evaluate": 64},
    "token-kd": {"teacher_steps": 4, "steps": 4},
    "gated-attention": {"sink_steps": 4, "steps": 4},
    "agent-distillation": {"trajectories": 16, "tests": 4, "steps": 4, "max_new_tokens": 64},
}  # fmt: skip


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
        recipe = catalogue.load(name)
        cfg = override(recipe.Config(), SMALL[name])
        keywords = {}
        if name in ("dmd2", "consistency", "phased-dmd"):  # not the network that is trained to be the teacher first
            setting = cfg.setting()
            keywords["setting"] = dataclasses.replace(setting, student=lambda run, small=setting.small: small(1).to(run.device))
        with Run(Path(folder) / name, 0, engine=placed, store=Store(Path(folder) / "store"), plots=False) as run:
            try:
                found[name] = catalogue.execute(name, cfg, run, **keywords)["metrics"]
            except UserError as error:
                found[name] = str(error)
    if not placed.rank:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    placed.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
