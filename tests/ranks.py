"""Started by torchrun: one loop shape under an engine; rank 0 writes what it ended with. `ranks.py SHAPE ENGINE FOLDER`"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from stillroom.engine import make
from stillroom.run import Run
from stillroom.store import Store
from tests.loops import ADAM, mlp, rows, three_optimizers


def one_role(run: Run, steps: int):
    x, y = rows(1, 64, 8), rows(2, 64, 4)
    student, optimizer = run.trainable("student", mlp(8, 4), ADAM)
    ema = run.ema("ema", student, 0.9)
    losses = []
    for _ in run.steps(steps):
        image, target = run.shard((x, y))
        keep = run.shard(torch.arange(64) % 7 < 3 + torch.arange(64) // 16)  # masked entries, another count in every chunk
        loss = run.update(optimizer, ((student(image) - target) ** 2).mean(1) * keep, count=keep.sum())
        ema.update()
        losses.append(float(loss))
    return run.roles["student"].net, ema.net, losses


def main(shape: str, engine: str, folder: str) -> None:
    torch.set_num_threads(1)
    accumulate = 2 if shape.endswith("accumulated") else 1
    run = Run(folder, 3, engine=make(engine, "cpu"), store=Store(Path(folder).parent / "store"), accumulate=accumulate)  # type: ignore[arg-type]
    nets, losses = [], []
    if shape.startswith("one_role"):
        *nets, losses = one_role(run, 12)
    elif shape == "bare":
        weight, optimizer = run.trainable("images", torch.nn.Parameter(rows(1, 8)), ADAM)
        for _ in run.steps(12):
            run.update(optimizer, ((run.shard(rows(2, 64, 8)) - weight) ** 2).mean(1))
        nets = [weight]
    else:
        three_optimizers(run, 12, noise=rows(9, 12, 64, 5))
        nets = [role.net for role in run.roles.values()]
    tensors = [t for net in nets for t in run.engine.state(net, None)["net"].values()]
    if not run.rank:
        torch.save([t.detach().clone() for t in tensors], Path(folder) / "final.pt")
        (Path(folder) / "losses.json").write_text(json.dumps(losses))
    run.engine.barrier()
    run.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
