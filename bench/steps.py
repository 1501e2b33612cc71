"""What the core adds to a training step: the same steps through `Run` and written by hand, in one process, in alternating blocks."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from stillroom.core.engine import make
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.core.store import Store
from stillroom.data.batches import Batches
from stillroom.data.images import MemorySplit
from stillroom.losses.divergences import cross_entropy
from stillroom.nets.build import build

SIZES = {"about 2 ms": ("mlp-512x512", 64, 1000), "about 20 ms": ("mlp-1408x1408", 128, 200)}
"""Network, batch and steps: an optimizer-heavy small network is the hardest case for a core that works per step."""
BLOCK = 10
LR, DECAY = 1e-3, 1e-2


def images(count: int = 1024) -> MemorySplit:
    generator = torch.Generator().manual_seed(0)
    return MemorySplit(torch.rand(count, 1, 16, 16, generator=generator), torch.randint(10, (count,), generator=generator))


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build(name, classes=10, channels=1, size=16, mean=(0.5,), std=(0.3,))


def by_hand(net: nn.Module, split: MemorySplit, batch: int, steps: int) -> Iterator[None]:
    """Nothing but torch; it notes the loss as often as a run does."""
    optimizer = torch.optim.AdamW(net.parameters(), LR, weight_decay=DECAY, fused=True)
    noted, per_epoch, order = [], len(split) // batch, torch.empty(0)
    net.train()
    for step in range(steps):
        epoch, position = divmod(step, per_epoch)
        if not position:
            order = torch.from_numpy(np.random.default_rng([0, epoch]).permutation(len(split)))
        index = order[position * batch : (position + 1) * batch]
        loss = F.cross_entropy(net(split.pixels[index]), split.labels[index])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % max(1, steps // 200) == 0:
            noted.append(loss.item())
        yield


def by_core(run: Run, net: nn.Module, split: MemorySplit, batch: int, steps: int) -> Iterator[None]:
    student, optimizer = run.trainable("student", net, Optimizer("adamw", LR, weight_decay=DECAY))
    batches = Batches(split, batch, run.seed)
    for step in run.steps(steps):
        _, image, label = run.shard(batches(step))
        run.update(optimizer, ce=cross_entropy(student(image), label))
        yield


def compare(name: str, batch: int, steps: int) -> dict[str, Any]:
    """CPU milliseconds of a step by hand, and the core's as a ratio: the median over pairs of blocks, with its quartiles."""
    split = images()
    with tempfile.TemporaryDirectory() as folder, Run(Path(folder) / "run", engine=make("local", "cpu"), store=Store(Path(folder))) as run:
        loops = {"hand": by_hand(network(name), split, batch, steps), "core": by_core(run, network(name), split, batch, steps)}
        seconds: dict[str, list[float]] = {which: [] for which in loops}
        for block in range(steps // BLOCK):
            for which in sorted(loops, reverse=bool(block % 2)):
                started = time.process_time()
                for _ in range(BLOCK):
                    next(loops[which])
                seconds[which].append((time.process_time() - started) / BLOCK)
    pairs = list(zip(seconds["core"], seconds["hand"]))[2:]  # the first steps allocate
    low, middle, high = np.quantile([core / hand for core, hand in pairs], [0.25, 0.5, 0.75]).tolist()
    return {
        "hand ms": 1e3 * median(hand for _, hand in pairs),
        "core / hand": middle,
        "quartiles": [low, high],
        "added us": 1e6 * median(core - hand for core, hand in pairs),
        "network": name,
        "batch": batch,
        "steps": steps,
    }


def measure() -> dict[str, Any]:
    return {size: compare(*work) for size, work in SIZES.items()}
