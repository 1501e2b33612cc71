"""Weights, scalings and tangents of training objectives, in float64."""

from __future__ import annotations

import numpy as np
import torch

from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.exact import Gaussian
from stillroom.diffusion.objectives import cm_scalings, lcm_scalings, scm_tangent, squared, weight
from stillroom.diffusion.processes import EDM, VP, Flow, Process, ReversedFlow, Trig
from tests.diffusion.every import RHOS, each


@each()
def test_weights_make_the_named_loss(process: Process) -> None:
    t = process.time(RHOS)
    x0, eps, raw = (torch.randn(6, 3, dtype=torch.float64) for _ in range(3))
    x = process.mix(x0, eps, t)
    kinds = ["x0", "eps", "edm"] + (["v"] if isinstance(process, VP) else ["velocity"])
    for kind in kinds:
        denoiser = Denoiser(torch.nn.Identity(), process, kind)  # type: ignore[arg-type]
        unit = getattr(process, "sigma_data", 1.0) if kind == "velocity" else 1.0
        error = unit**2 * squared(raw, denoiser.target(x0, eps, t))
        expected = weight(kind, process, t) * squared(denoiser.read(raw, x, t).x0, x0)  # type: ignore[arg-type]
        torch.testing.assert_close(error, expected)
    torch.testing.assert_close(weight("velocity", Flow(), 0.3), torch.tensor(1 / 0.09, dtype=torch.float64))
    torch.testing.assert_close(weight("velocity", ReversedFlow(), 0.3), torch.tensor(1 / 0.49, dtype=torch.float64))
    torch.testing.assert_close(weight("edm", EDM(), 2.0), torch.tensor((4 + 0.25) / (2.0 * 0.5) ** 2, dtype=torch.float64))


def test_consistency_scalings_are_the_identity_at_their_end() -> None:
    skip, out = cm_scalings(0.002)
    assert float(skip) == 1.0
    assert float(out) == 0.0
    skip, out = lcm_scalings(0)
    assert float(skip) == 1.0
    assert float(out) == 0.0
    skip, out = lcm_scalings(50)
    np.testing.assert_allclose([float(skip), float(out)], [0.25 / (500**2 + 0.25), 500 / (500**2 + 0.25) ** 0.5])


def test_the_exact_consistency_function_has_no_tangent() -> None:
    sd, trig = 0.5, Trig(0.5)
    data = Gaussian(torch.tensor([0.4, -0.2], dtype=torch.float64), 0.7, trig)

    def F(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = x * sd
        mean = t.cos()[:, None] * data.mean
        width = (t.cos() ** 2 * 0.49 + sd**2 * t.sin() ** 2).sqrt()[:, None]
        f = data.mean + 0.7 / width * (x - mean)
        return (t.cos()[:, None] * x - f) / (sd * t.sin()[:, None])

    t = torch.tensor([0.1, 0.5, 1.0, 1.5], dtype=torch.float64)
    x = torch.randn(4, 2, dtype=torch.float64)
    velocity = trig.velocity(*data(x, t), t)
    _, g = scm_tangent(F, x, t, velocity, sd, ramp=1.0, settle=None)
    torch.testing.assert_close(g, torch.zeros_like(g), atol=1e-9, rtol=0)
    torch.testing.assert_close(data.flow_map(x, t, 0.0), t.cos()[:, None] * x - sd * t.sin()[:, None] * F(x / sd, t))
    # a wrong function has cos(t) df/dt as its tangent
    _, g = scm_tangent(lambda x, t: 0.3 * x + t[:, None] ** 2, x, t, velocity, sd, ramp=1.0, settle=None)
    h = 1e-6

    def f(s: torch.Tensor) -> torch.Tensor:
        y = data.flow_map(x, t, s)
        return s.cos()[:, None] * y - sd * s.sin()[:, None] * (0.3 * y / sd + s[:, None] ** 2)

    slope = (f(t + h) - f(t - h)) / (2 * h)
    torch.testing.assert_close(g, t.cos()[:, None] * slope, atol=1e-6, rtol=1e-5)
