"""What a few-step recipe is run on: a teacher with its process, data or prompts, students to start from, and yardsticks.

There are two kinds, an embedded `World` (worlds.py) and a diffusers pipeline (pipelines/), which `teachers.load` finds by name; a class of
one's own is a third. Recipes are the same code for all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.adapt import lora
from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.diffusion.denoiser import Denoiser, Guided, PredictionType, take
from stillroom.diffusion.processes import Process
from stillroom.diffusion.sampling import Step, ddim, sample


class Setting:
    """The attributes below, and six methods: `start`, `small`, `evaluate`, `show`, and where they apply `condition`, `samples`; a setting
    that saves otherwise than by tensors also has its own `save`."""

    name: str
    teacher: nn.Module
    """(x, t, cond, process) -> Prediction, with its `process`."""
    shape: tuple[int, ...]
    null: Any = None
    """The empty condition, where there are conditions."""
    embedded: float | None = None
    """The guidance scale that conditions carry, for networks that take it as an input."""
    real: bool = False
    """Whether there are real data (`samples`)."""
    at_once: int = 1 << 20
    """Samples that are made and judged at a time."""

    @property
    def process(self) -> Process:
        """The teacher's."""
        return self.teacher.process  # type: ignore[return-value]  # torch types every attribute of a module as Tensor or Module

    # -- what a setting gives
    def start(self, run: Run) -> Denoiser:
        """A network that starts where the teacher is, on the run's device; it keeps the teacher's process and prediction."""
        raise NotImplementedError

    def small(
        self, factor: int, process: Process | None = None, prediction: PredictionType | None = None, dropout: float = 0.0
    ) -> Denoiser:
        """A fresh network, smaller than `start` by the factor; what it predicts in which process is the method's choice, by default as
        `start` does."""
        raise NotImplementedError

    def evaluate(self, run: Run, x: Tensor, reference: Tensor) -> dict[str, float]:
        """Metrics of samples against reference samples."""
        raise NotImplementedError

    def show(self, run: Run, name: str, sets: Mapping[str, Tensor]) -> None:
        """Put named samples into the report."""

    def condition(self, n: int, device: torch.device | None = None) -> Any:
        """Conditions for n samples, drawn from torch's generator; None where there are none."""
        return None

    def samples(self, n: int, device: torch.device | None = None) -> tuple[Tensor, Any]:
        """n real data and their conditions. UserError where there are none."""
        raise UserError(f"the teacher {self.name} brings no real data.", code=2)

    def noise_like(self, x: Tensor, cond: Any = None) -> Tensor:
        """Fresh unit noise in the shape of x; a setting whose data live in a subspace projects it."""
        return torch.randn_like(x)

    def save(self, net: nn.Module, folder: Path, times: Sequence[float], fresh_noise: bool) -> None:
        """A student for those who sample it at `times`, with fresh noise between the steps or without."""
        from safetensors.torch import save_file

        save_file(net.state_dict(), folder / "model.safetensors")

    # -- what recipes ask for
    def noise(self, n: int, device: torch.device | None = None, cond: Any = None) -> Tensor:
        return self.noise_like(torch.empty(n, *self.shape, device=device), cond)

    def draw(self, run: Run, n: int) -> tuple[Tensor, Any]:
        """This process's and chunk's share of n noises and conditions, on its device."""
        return run.shard((self.noise(n, run.device), self.condition(n, run.device)))

    def data(self, run: Run, n: int) -> tuple[Tensor, Any]:
        """This process's and chunk's share of n real data and their conditions, on its device."""
        return run.shard(self.samples(n, run.device))

    def guided(self, weight: float) -> nn.Module:
        """The teacher under classifier-free guidance; 1 is the plain teacher.

        A network that takes the scale as an input gets it from the conditions, so it is the teacher as it is. UserError where there is
        nothing to guide by, or for another scale than that of the conditions.
        """
        if self.embedded is not None:
            if weight != self.embedded:
                raise UserError(
                    f"guidance {weight:g}: the teacher {self.name} takes the guidance scale as an input, and its conditions were made "
                    f"with {self.embedded:g}; load it with guidance={weight:g}."
                )
            return self.teacher
        if weight == 1:
            return self.teacher
        if self.null is None:
            raise UserError(f"--guidance {weight:g}: the teacher {self.name} takes no conditions, so there is nothing to guide; use 1.")
        return Guided(self.teacher, weight, self.null)

    def learner(self, start: nn.Module, rank: int = 0, alpha: int = 1, targets: Sequence[str] = ()) -> nn.Module:
        """A trainable copy of a network: all its weights, or with a rank only LoRA of factor alpha / rank beside them."""
        twin = copy.deepcopy(start)
        return lora.add(twin, rank, alpha, targets) if rank else twin.requires_grad_(True)

    def sampled(self, net: nn.Module, z: Tensor, times: Sequence[float], cond: Any, step: Step = ddim) -> Tensor:
        """Unit noise z carried to the end of `times` in the network's process, `at_once` samples at a time."""
        process: Any = net.process
        parts = [slice(at, at + self.at_once) for at in range(0, len(z), self.at_once)]
        return torch.cat([sample(net, process.start(z[i]), times, take(cond, i), process=process, step=step) for i in parts])

    def reference(self, n: int, guidance: float, steps: int, device: torch.device | None = None) -> tuple[Tensor, Any]:
        """n samples to compare with, and their conditions: real data if there are any, else the teacher's own at `steps` steps."""
        if self.real:
            return self.samples(n, device)
        cond = self.condition(n, device)
        return self.sampled(self.guided(guidance), self.noise(n, device, cond), self.process.grid(steps), cond), cond

    def judge(
        self,
        run: Run,
        student: nn.Module,
        start: nn.Module,
        grid: Sequence[float],
        *,
        count: int,
        guidance: float,
        step: Step = ddim,
        also: Mapping[str, Sequence[float]] | None = None,
        save: Callable[[Any, Path], None] | None = None,
    ) -> dict[str, float]:
        """The end of a few-step recipe: `count` samples of the student on its grid beside those of the undistilled network on the same
        grid and noise, as rows, pictures and metrics; the student is saved (by `save`, or as a few-step student of this setting).

        also: more grids by name, each a row and metrics of its own ("one step": its energy is "one_step_energy").
        """
        student, start = run.unwrap(student).eval(), start.eval()
        real, cond = self.reference(count, guidance, 40, run.device)
        z = self.noise(count, run.device, cond)
        x, plain = (self.sampled(net, z, grid, cond, step) for net in (student, start))
        metrics = self.evaluate(run, x, real)
        run.row("teacher network at as few steps", **self.evaluate(run, plain, real))
        more: dict[str, float] = {}
        for name, times in (also or {}).items():
            found = self.evaluate(run, self.sampled(student, z, times, cond, step), real)
            run.row(f"student, {name}", **found)
            more |= {f"{name.replace(' ', '_')}_{key}": value for key, value in found.items()}
        run.row("student", **metrics)
        self.show(run, "samples", {"teacher": real, "few steps without distillation": plain, "student": x})
        fresh = step is not ddim
        run.save_student(student, save or (lambda net, folder: self.save(net, folder, grid, fresh)))
        return metrics | more
