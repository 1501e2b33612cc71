"""Weights, scalings and tangents of training objectives, in float64."""

from __future__ import annotations

import numpy as np
import torch

from stillroom.diffusion.denoiser import Prediction
from stillroom.diffusion.exact import Gaussian
from stillroom.diffusion.objectives import cm_scalings, consistent, lcm_scalings, pseudo_huber, scm_tangent
from stillroom.diffusion.processes import Flow, Trig


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


class Linear(torch.nn.Module):
    """Answers x0 = a x, eps = x."""

    process = Flow()

    def __init__(self, a: float):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def forward(self, x: torch.Tensor, t: object, cond: object = None) -> Prediction:
        return Prediction(self.a * x, x)


def test_the_consistency_step_by_hand() -> None:
    """x0, a jump to an end time, a view, any distance; gradient to the first network alone."""
    student, target = Linear(2.0), Linear(3.0)
    upper, lower = torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[0.5, -1.0]]).double()
    loss = consistent(student, target, (upper, 0.8), (lower, 0.6))
    torch.testing.assert_close(loss, ((2 * upper - 3 * lower) ** 2).mean(1))
    loss.sum().backward()
    assert student.a.grad is not None
    assert target.a.grad is None
    jump = lambda a, x: 0.75 * a * x + 0.25 * x  # x0 and eps at t = .25 of the flow
    torch.testing.assert_close(
        consistent(student, target, (upper, 0.8), (lower, 0.6), end=0.25), ((jump(2, upper) - jump(3, lower)) ** 2).mean(1)
    )
    view = lambda x: x[:, :1] ** 2
    huber = lambda a, b: pseudo_huber(a, b, c=0.5)
    expected = ((2 * upper[:, 0]) ** 2 - (3 * lower[:, 0]) ** 2).square().add(0.25).sqrt() - 0.5
    torch.testing.assert_close(consistent(student, target, (upper, 0.8), (lower, 0.6), view=view, distance=huber), expected)
