"""Noise processes x_t = alpha(t) x0 + sigma(t) eps with eps ~ N(0, I), each with its own time convention.

Direction and scale of time live here and nowhere else. Two numbers do not depend on the convention: the noise-to-signal ratio
rho = sigma / alpha and the pair (x0, eps) that a network predicts. So a teacher of one process answers in any other through rho, and
every recipe is written with (x0, eps).

| process | alpha, sigma | data end -> noise end | source |
|---|---|---|---|
| EDM | 1, t | 0 -> 80 | Karras et al. 2022 |
| VP | sqrt(abar_k), sqrt(1 - abar_k), k may be fractional | -1 (no noise) -> 999 | DDPM, Stable Diffusion |
| Flow | 1 - t, t | 0 -> 1 | rectified flow, SD3, Flux, Wan |
| ReversedFlow | t, 1 - t | 1 -> 0 | SlimFlow's code, Proteina |
| Trig | cos t, sigma_data sin t | 0 -> pi/2 | sCM, SANA-Sprint |

Times are floats or tensors [B]; coefficients come back in float64 (float32 where the device has no float64), since 1 - t and
sqrt(1 - abar) lose the small end in half precision, and are cast only when they multiply an image.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from stillroom.diffusion.processes.base import TINY, Process, Time, along, as_time, blend, shifted
from stillroom.diffusion.processes.edm import EDM
from stillroom.diffusion.processes.flow import Flow, ReversedFlow
from stillroom.diffusion.processes.trig import Trig
from stillroom.diffusion.processes.vp import DDPM, VP

__all__ = ["DDPM", "EDM", "TINY", "VP", "Flow", "Process", "ReversedFlow", "Time", "Trig", "along", "as_time", "blend", "describe",
           "named", "shifted"]  # fmt: skip


def describe(process: Process) -> dict[str, Any]:
    """A process as JSON has it; `named` makes it again."""
    return {"process": type(process).__name__, **dataclasses.asdict(process)}  # type: ignore[call-overload]  # every process is a dataclass


def named(process: str, **fields: Any) -> Process:
    """The process that `describe` described. KeyError for an unknown name."""
    return {known.__name__: known for known in (EDM, VP, Flow, ReversedFlow, Trig)}[process](**fields)
