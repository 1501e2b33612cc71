"""Every process that tests go through, and noise levels that all of them reach."""

from __future__ import annotations

import pytest
import torch

from stillroom.diffusion.processes import DDPM, EDM, VP, Flow, Process, ReversedFlow, Trig

PROCESSES: list[Process] = [EDM(), VP(), DDPM(), Flow(), ReversedFlow(), Trig(0.5), Trig(1.3)]
IDS = [type(p).__name__ + str(i) for i, p in enumerate(PROCESSES)]
RHOS = torch.tensor([0.02, 0.1, 0.5, 1.0, 3.0, 12.0], dtype=torch.float64)


def each(argument: str = "process") -> pytest.MarkDecorator:
    return pytest.mark.parametrize(argument, PROCESSES, ids=IDS)
