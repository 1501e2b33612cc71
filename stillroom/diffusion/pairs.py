"""Noises with the samples that the teacher's ODE carries them to: from a bank that is made once, or fresh in every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.core.run import Run
from stillroom.diffusion.denoiser import take
from stillroom.diffusion.sampling import Step, heun, pairs
from stillroom.diffusion.setting import Setting


class Pairs:
    """size: of the bank, which the store keeps; 0 makes every batch anew. times: of the teacher's process, from its noise end on."""

    def __init__(self, run: Run, setting: Setting, teacher: nn.Module, times: Sequence[float], size: int, step: Step = heun):
        self.run, self.setting, self.teacher, self.times, self.size, self.step = run, setting, teacher, list(times), size, step
        self.bank: dict[str, Tensor] = {}
        self.cond: Any = None
        if size:
            self.cond = setting.condition(size, run.device)
            given = (teacher, setting.noise(size, run.device, self.cond), self.times, self.cond, step, min(setting.at_once, 512))
            self.bank = run.cached("pairs", made, *given)

    def draw(self, run: Run, batch: int) -> tuple[Tensor, Tensor, Any]:
        """This process's and chunk's share of a batch: unit noise z, the sample x that it leads to, the condition."""
        if self.size:
            index = run.shard(torch.randint(self.size, (batch,), device=run.device))
            return self.bank["z"][index], self.bank["x"][index], take(self.cond, index)
        z, cond = self.setting.draw(run, batch)
        return z, pairs(self.teacher, z, self.times, cond, step=self.step, batch=self.setting.at_once)["x"], cond


def made(teacher: nn.Module, noise: Tensor, times: Sequence[float], cond: Any, step: Step, batch: int) -> dict[str, Tensor]:
    """A bank {"z", "x"} of unit noise and where the teacher's ODE carries it."""
    return pairs(teacher, noise, times, cond, step=step, batch=batch)
