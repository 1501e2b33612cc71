"""CPU time of a DMD iteration and of a consistency step: the recipes' own loops against the same mathematics written by hand.

    python bench/diffusion_steps.py [--steps 60] [--rounds 5]

Both use one small U-Net on 8x8 images, the same batch, teacher and optimizer, and alternate. A step's time is the lower quartile over all
rounds (of steps at the same place in the cycle of five), which other processes on the machine disturb least.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import nn

from stillroom.core.run import Run
from stillroom.core.store import Store
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.worlds import Digits, World, digit_mixture
from stillroom.recipes.diffusion import consistency, dmd2

BATCH = 64


class Timed(Run):
    """A long run of which only the first steps are made; it notes when each began, in CPU time."""

    begun: list[float]
    wanted = 0

    def steps(self, total: int, name: str = "train") -> Iterator[int]:
        self.begun = []
        for step in super().steps(total, name):
            self.begun.append(time.process_time())
            if step == self.wanted:
                return
            yield step


class Untrained(Digits):
    """The digits without training and judgement, which are not timed."""

    def start(self, run: Run) -> Denoiser:
        return self.small(1)

    def evaluate(self, run: Run, x: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
        return {}


def recipe(main: Callable, cfg: object, setting: World, steps: int) -> list[float]:
    with (
        tempfile.TemporaryDirectory() as folder,
        Timed(f"{folder}/run", store=Store(f"{folder}/store"), plots=False, save_seconds=1e9) as run,
    ):
        run.wanted = steps
        main(cfg, run, setting=setting)
        return [after - before for before, after in pairwise(run.begun)]


def timed(step: Callable[[int], None], steps: int) -> list[float]:
    begun = [time.process_time()]
    for i in range(steps):
        step(i)
        begun.append(time.process_time())
    return [after - before for before, after in pairwise(begun)]


def quartile(rounds: list[list[float]]) -> float:
    """Mean over the places of the cycle of the lower quartile, in ms; the first cycle warms up."""
    places = [[t for times in rounds for t in times[5 + place :: 5]] for place in range(5)]
    return statistics.fmean(statistics.quantiles(times, n=4)[0] for times in places) * 1e3


def x0_of(net: nn.Module, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return y - t[:, None, None, None] * net(y, t)


def dmd_by_hand(setting: World, steps: int) -> list[float]:
    teacher, net = setting.teacher, setting.small(1).net
    generator, fake = copy.deepcopy(net), copy.deepcopy(net)
    g_adam = torch.optim.AdamW(generator.parameters(), 5e-4, (0.0, 0.999), weight_decay=0, fused=True)
    f_adam = torch.optim.AdamW(fake.parameters(), 1e-3, (0.0, 0.999), weight_decay=0, fused=True)

    def step(i: int) -> None:
        z, one = torch.randn(BATCH, 1, 8, 8), torch.ones(BATCH)
        turn = i % 5 == 0
        with torch.set_grad_enabled(turn):
            x = x0_of(generator, z, one)
        if turn:
            t = 0.02 + 0.96 * torch.rand(BATCH)
            wide = t[:, None, None, None]
            with torch.no_grad():
                y = (1 - wide) * x + wide * torch.randn_like(x)
                real, said = teacher(y, t).x0, x0_of(fake, y, t)
                gradient = torch.nan_to_num((said - real) / (x - real).abs().mean((1, 2, 3), keepdim=True))
            loss = 0.5 * ((x - (x - gradient).detach()) ** 2).mean()
            loss.item()  # a loop that checks its losses, as the recipe does
            loss.backward()
            g_adam.step()
            g_adam.zero_grad()
        x = x.detach()
        t = 0.02 + 0.96 * torch.rand(BATCH)
        wide, eps = t[:, None, None, None], torch.randn_like(x)
        loss = ((fake((1 - wide) * x + wide * eps, t) - (eps - x)) ** 2).mean()
        loss.item()
        loss.backward()
        f_adam.step()
        f_adam.zero_grad()

    return timed(step, steps)


def consistency_by_hand(setting: World, steps: int) -> list[float]:
    teacher, student = setting.teacher, setting.small(1).net
    ema = copy.deepcopy(student).requires_grad_(False)
    adam = torch.optim.Adam(student.parameters(), 1e-3, fused=True)
    times, c = torch.linspace(1, 0, 41), 0.00054 * 8
    mine, theirs = [p.detach() for p in ema.parameters()], [p.detach() for p in student.parameters()]

    def step(i: int) -> None:
        data, n = setting.mixture.sample(BATCH), torch.randint(40, (BATCH,))
        t, s = times[n], times[n + 1]
        wide = t[:, None, None, None]
        x = (1 - wide) * data + wide * torch.randn_like(data)
        with torch.no_grad():
            x0, eps = teacher(x, t)
            lower = (1 - s[:, None, None, None]) * x0 + s[:, None, None, None] * eps
            goal = x0_of(ema, lower, s)
        said = x0_of(student, x, t)
        loss = (((said - goal).flatten(1) ** 2).sum(1) + c * c).sqrt().mean() - c
        loss.item()
        loss.backward()
        adam.step()
        adam.zero_grad()
        torch._foreach_lerp_(mine, theirs, 0.05)

    return timed(step, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    setting = Untrained("digits", digit_mixture())
    dmd = dmd2.Config(updates=10_000, fake_updates=5, batch=BATCH, gan_weight=0.0, evaluate=1)
    cd = consistency.Config(updates=10_000, batch=BATCH, evaluate=1)
    cases = {
        "DMD iteration (5 fake : 1 generator)": (
            lambda: recipe(dmd2.main, dmd, setting, args.steps),
            lambda: dmd_by_hand(setting, args.steps),
        ),
        "consistency step": (lambda: recipe(consistency.main, cd, setting, args.steps), lambda: consistency_by_hand(setting, args.steps)),
    }
    print(f"{'':40}{'recipe':>10}{'by hand':>10}{'ratio':>8}   (CPU ms per step, {args.rounds} alternating rounds)")
    for name, (ours, hand) in cases.items():
        pairs = [(ours(), hand()) for _ in range(args.rounds)]
        a, b = (quartile(list(side)) for side in zip(*pairs, strict=True))
        print(f"{name:40}{a:10.2f}{b:10.2f}{a / b:8.3f}")


if __name__ == "__main__":
    main()
