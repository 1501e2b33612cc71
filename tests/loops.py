"""The five shapes of system as small loops on the core, for the tests that kill, resume, split and shard them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from stillroom.core import run as runs
from stillroom.core.engine import make
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.core.store import Store

ADAM = Optimizer("adamw", 1e-2, schedule="cosine", warmup=2)


def mlp(i: int, o: int, width: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(i, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, o))


def rows(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_optimizer(run: Run, steps: int):
    x, teacher = rows(1, 64, 8), run.frozen(mlp(8, 4))
    student, optimizer = run.trainable("student", mlp(8, 4), ADAM)
    ema = run.ema("ema", student, 0.9)
    memory = torch.zeros(64)
    run.track(memory=memory)
    for step in run.steps(steps):
        index = torch.arange(16) + 16 * (step % 4)
        batch = x[index] + 0.1 * torch.randn(16, 8)
        loss = F.kl_div(student(batch).log_softmax(1), teacher(batch).log_softmax(1), log_target=True, reduction="none").sum(1)
        run.update(optimizer, kd=loss, pull=0.01 * memory[index].mean() * loss.mean())
        memory[index] = loss.detach()
        ema.update()
        run.log(noise=batch.std())
    return [*student.parameters(), *ema.net.parameters(), memory]


def three_optimizers(run: Run, steps: int, noise: torch.Tensor | None = None):
    """DMD-like. `noise` (N, 64, 5): fixed draws in place of random ones, so that processes can share them."""
    data, real = rows(2, 64, 2), run.frozen(mlp(3, 2))
    generator, g = run.trainable("generator", mlp(2, 2), ADAM)
    fake, f = run.trainable("fake", mlp(3, 2), ADAM)
    critic, c = run.trainable("critic", mlp(3, 1), Optimizer("sgd", 1e-2, clip=1.0))
    for step in run.steps(steps):
        draw = run.shard(noise[step] if noise is not None else torch.randn(64, 5))
        z, e, t, target = draw[:, :2], draw[:, 2:4], draw[:, 4:].sigmoid(), run.shard(data)

        def at(x, e=e, t=t):
            return torch.cat([(1 - t) * x + t * e, t], 1)

        if step % 3 == 0:
            x = generator(z)
            with torch.no_grad():
                gap = fake(at(x)) - real(at(x))
            run.update(g, vsd=((x - (x - gap).detach()) ** 2).mean(1), gan=0.1 * F.softplus(-critic(at(x))).mean(1))
        with torch.no_grad():
            x = generator(z)
        run.update(f, ((fake(at(x)) - (e - x)) ** 2).mean(1))
        run.update(c, F.softplus(critic(at(x))).mean(1) + F.softplus(-critic(at(target))).mean(1))
    return [*generator.parameters(), *fake.parameters(), *critic.parameters()]


def bilevel(run: Run, steps: int):
    x, y = rows(3, 32, 8), rows(4, 32, 4)
    learned = nn.ParameterDict({"x": torch.randn(5, 8), "y": torch.randn(5, 4)})
    learned, optimizer = run.trainable("images", learned, ADAM)
    for _ in run.steps(steps):
        net = mlp(8, 4)
        weights = dict(net.named_parameters())
        for _ in range(2):
            inner = F.mse_loss(functional_call(net, weights, (learned["x"],)), learned["y"])
            gradients = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
            weights = {k: w - 0.1 * d for (k, w), d in zip(weights.items(), gradients, strict=True)}
        run.update(optimizer, ((functional_call(net, weights, (x,)) - y) ** 2).mean(1))
    return list(learned.parameters())


def two_stages(run: Run, steps: int):
    data = rows(5, 64, 2) + 2
    with run.stage("flow", shared=(mlp, data, steps)) as stage:
        flow, optimizer = stage.trainable("flow", mlp(3, 2), ADAM)
        for _ in stage.steps(steps):
            x, e, t = data[torch.randint(0, 64, (32,))], torch.randn(32, 2), torch.rand(32, 1)
            stage.update(optimizer, ((flow(torch.cat([(1 - t) * x + t * e, t], 1)) - (e - x)) ** 2).mean(1))
    stage = run.stage("student")
    student, optimizer = stage.trainable("student", mlp(2, 2), ADAM)
    for _ in stage.steps(steps):
        z = torch.randn(32, 2)
        with torch.no_grad():
            y = z - flow(torch.cat([z, torch.ones(32, 1)], 1))
        stage.update(optimizer, ((student(z) - y) ** 2).mean(1))
    return [*flow.parameters(), *student.parameters()]


class Archive:
    def __init__(self) -> None:
        self.nodes = [(0.0, -1.0)]

    def state_dict(self) -> dict:
        return {"nodes": self.nodes}

    def load_state_dict(self, state: dict) -> None:
        self.nodes = state["nodes"]


def tree_search(run: Run, steps: int):
    archive = Archive()
    run.track(archive=archive)
    for _ in run.steps(steps):
        x, _ = max(archive.nodes, key=lambda node: node[1] + 0.1 * torch.rand(()).item())
        child = x + 0.3 * torch.randn(()).item()
        archive.nodes.append((child, -((child - 1) ** 2)))
        run.log(best=max(value for _, value in archive.nodes))
    return [torch.tensor(archive.nodes)]


SHAPES = {f.__name__: f for f in (one_optimizer, three_optimizers, bilevel, two_stages, tree_search)}


def finish(shape: str, folder: Path, steps: int, die_at_save: int | None = None, delay: float = 0.0) -> None:
    """Run a shape and write FOLDER/final.pt, in a process of its own: it may SIGKILL itself in the middle of writing its N-th
    checkpoint. delay: seconds that every step takes at least."""
    torch.set_num_threads(1)
    saves = 0

    class Slow(Run):
        def steps(self, total: int, name: str = "train"):
            for step in super().steps(total, name):
                time.sleep(delay)
                yield step

    write = torch.save

    def dying(state, file):
        nonlocal saves
        saves += 1
        if saves == die_at_save:
            file.write(b"half a checkpoint")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write(state, file)

    runs.torch.save = dying
    runs.Run = Slow  # stages are made through the module's name
    with Slow(folder, 7, engine=make("local", "cpu"), store=Store(folder.parent / "store"), save_seconds=0.0) as run:
        print("started", flush=True)
        final = SHAPES[shape](run, steps)
    write([t.detach().clone() for t in final], folder / "final.pt")
