"""The recipe `kd` itself, called as a user calls it; measured is its training loop, log included, without the checkpoint at its end
(a save per 30 seconds and one at the end of a loop; no other contender saves).

Without augmentation the recipe never asks the teacher twice; for the online comparison its signal is asked for as if images were
augmented, which they are not.
"""

import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

from bench.task import CE_WEIGHT, DECAY, KD_WEIGHT, LR, TEMPERATURE, Task, serve
from stillroom.core.engine import make
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.core.store import Store
from stillroom.recipes.classification import kd
from stillroom.vision import signals


class Timed(Run):
    """A run that notes the CPU seconds of its loop without saving, and those of filling the store."""

    loop, table = 0.0, 0.0

    def steps(self, total, name="train"):
        started = time.process_time()
        yield from super().steps(total, name)
        self.loop += time.process_time() - started

    def save(self, step, name="train"):
        started = time.process_time()
        super().save(step, name)
        self.loop -= time.process_time() - started

    def cached(self, name, build, *inputs):
        started = time.process_time()
        tensors = super().cached(name, build, *inputs)
        self.table += time.process_time() - started
        return tensors


def train(task: Task, mode: str) -> float:
    cfg = kd.Config(
        steps=task.steps,
        batch_size=task.batch,
        optimizer=Optimizer("adamw", LR, weight_decay=DECAY),
        temperature=TEMPERATURE,
        ce_weight=1.0 if mode == "plain" else CE_WEIGHT,
        kd_weight=0.0 if mode == "plain" else KD_WEIGHT,
    )
    ask = partial(_online, signals.labels_and_teacher) if mode == "online" else signals.labels_and_teacher
    with tempfile.TemporaryDirectory() as place, mock.patch.object(signals, "labels_and_teacher", ask):
        run = Timed(Path(place) / "run", task.seed, engine=make("local", "cpu"), store=Store(Path(place) / "store"), plots=False)
        with run:
            kd.main(cfg, run, data=task.data, teacher=task.teacher, student=task.student)
        return run.loop + (run.table if mode == "cached, first time" else 0.0)


def _online(terms, *given, augmented, **weights):
    return terms(*given, augmented=True, **weights)


if __name__ == "__main__":
    serve(train)
