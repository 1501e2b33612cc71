"""Started by torchrun: loop shapes under an engine; rank 0 writes what each ended with. `ranks.py ENGINE FOLDER SHAPE…`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from stillroom.core.engine import Local, make
from stillroom.core.run import Run
from stillroom.core.store import Store
from tests.loops import ADAM, mlp, rows, three_optimizers

OTHER: dict[str, Any] = {"local": "local", "ddp": "fsdp2", "fsdp2": "ddp"}


def one_role(run: Run, steps: int, until: int | None = None):
    x, y = rows(1, 64, 8), rows(2, 64, 4)
    student, optimizer = run.trainable("student", mlp(8, 4), ADAM)
    ema = run.ema("ema", student, 0.9)
    for step in run.steps(steps):
        if step == until:
            break
        image, target = run.shard((x, y))
        keep = run.shard(torch.arange(64) % 7 < 3 + torch.arange(64) // 16)  # masked entries, another count in every chunk
        run.update(optimizer, ((student(image) - target) ** 2).mean(1) * keep, count=keep.sum())
        ema.update()
    return run.roles["student"].net, ema.net


class Routed(torch.nn.Module):
    """The first half of 64 rows goes through one layer, the second through another, and none through the third."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(mlp(8, 4) for _ in range(3))

    def forward(self, rows: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        parts = [layer(part) for layer, part in zip(self.layers, (rows[first], rows[~first])) if len(part)]
        return torch.cat(parts)


def run_shape(shape: str, engine: str, folder: Path) -> Local:
    accumulate = 2 if shape.endswith("accumulated") else 1
    run = Run(folder / shape, 3, engine=make(engine, "cpu"), store=Store(folder / "store"), accumulate=accumulate)  # type: ignore[arg-type]
    if shape == "moved":  # the second half under the other engine, from the checkpoint of the first
        run.save_seconds = 0
        one_role(run, 48, until=20)
        run.close()
        run = Run(run.folder, 3, engine=make(OTHER[engine], "cpu"), store=run.store)
        nets = list(one_role(run, 48))
    elif shape.startswith("one_role"):
        nets = list(one_role(run, 12))
    elif shape.startswith("reached"):  # the maker's loss gives gradients to the critic too, which are not the critic's to learn from
        (maker, m), (critic, c) = run.trainable("maker", mlp(8, 4), ADAM), run.trainable("critic", mlp(4, 1), ADAM)
        for _ in run.steps(12):
            x, y = run.shard((rows(1, 64, 8), rows(2, 64, 4)))
            run.update(m, critic(maker(x)).mean(1))
            run.update(c, ((critic(y) - 1) ** 2).mean(1))
        nets = [maker, critic]
    elif shape == "routed":
        net, optimizer = run.trainable("student", Routed(), ADAM)
        for _ in run.steps(12):
            x, y, first = run.shard((rows(1, 64, 8), rows(2, 64, 4), torch.arange(64) < 32))
            run.update(optimizer, ((net(x, first) - y) ** 2).mean(1))
        nets = [net]
    elif shape == "bare":
        weight, optimizer = run.trainable("images", torch.nn.Parameter(rows(1, 8)), ADAM)
        for _ in run.steps(12):
            run.update(optimizer, ((run.shard(rows(2, 64, 8)) - weight) ** 2).mean(1))
        nets = [weight]
    else:
        three_optimizers(run, 12, noise=rows(9, 12, 64, 5))
        nets = [role.net for role in run.roles.values()]
    states = [run.engine.state(net, None)["net"] for net in nets]
    whole = [run.unwrap(net) for net in nets if isinstance(net, torch.nn.Module)]
    for net, state in zip(whole, states, strict=False):
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    if not run.rank:
        torch.save([t.detach().clone() for state in states for t in state.values()], folder / f"{shape}.pt")
    run.engine.barrier()
    run.close()
    return run.engine


def main(engine: str, folder: str, *shapes: str) -> None:
    torch.set_num_threads(1)
    for shape in shapes:
        last = run_shape(shape, engine, Path(folder))
    last.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
