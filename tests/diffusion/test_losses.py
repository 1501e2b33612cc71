"""Score gaps and adversarial steps: values against finite differences, gradients to the right player only."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Denoiser, Guided
from stillroom.diffusion.exact import Gaussian, Mixture
from stillroom.diffusion.processes import EDM, VP, Flow, ReversedFlow, Trig
from stillroom.diffusion.sampling import consistency, ddim, rollout
from stillroom.losses.adversarial import (
    Head,
    approximate_r1,
    hinge_discriminator,
    hinge_generator,
    softplus_discriminator,
    softplus_generator,
)
from stillroom.losses.scores import dmd_weight, sid, vsd
from stillroom.nets.denoisers import PointNet, UNet
from stillroom.nets.hooks import outputs

PROCESSES = [EDM(), VP(), Flow(), ReversedFlow(), Trig(0.5)]


def players(process: object = None) -> tuple[Denoiser, Denoiser, Denoiser]:
    torch.manual_seed(0)
    process = process or Flow()
    make = lambda: Denoiser(PointNet(2, 16, 2).double(), process, "eps")  # type: ignore[arg-type]
    return make(), make(), make()


def touched(*modules: nn.Module) -> list[bool]:
    return [any(p.grad is not None and p.grad.abs().sum() > 0 for p in m.parameters()) for m in modules]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_vsd_gradient_is_the_gap_and_reaches_the_generator_only(process: object) -> None:
    generator, fake, real = players(process)
    z, noise = torch.randn(4, 2).double(), torch.randn(4, 2).double()
    t = process.time(torch.tensor([0.3, 1.0, 2.0, 5.0]))  # type: ignore[attr-defined]
    x = generator(process.mix(0 * z, z, process.time(8.0)), process.time(8.0)).x0  # type: ignore[attr-defined]
    x.retain_grad()
    y = process.mix(x, noise, t)  # type: ignore[attr-defined]  # graph kept on purpose: the loss must cut it
    d_fake, d_real = fake(y, t).x0, real(y, t).x0
    w = dmd_weight(x, d_real)
    vsd(x, d_fake, d_real, w).mean().backward()
    expected = (d_fake - d_real) / (x - d_real).abs().mean(1, keepdim=True) / x.numel()
    torch.testing.assert_close(x.grad, expected.detach())
    assert touched(generator, fake, real) == [True, False, False]


def test_vsd_against_finite_differences_of_its_frozen_surrogate() -> None:
    torch.manual_seed(1)
    x, fake, real = (torch.randn(3, 5).double() for _ in range(3))
    w = dmd_weight(x, real)
    goal = x - w * (fake - real)
    x.requires_grad_()
    vsd(x, fake, real, w).mean().backward()
    h = 1e-6
    for i in (0, 7, 14):
        step = torch.zeros(15).double()
        step[i] = h
        up, down = (0.5 * ((x.detach() + sign * step.view(3, 5) - goal) ** 2).mean() for sign in (1, -1))
        assert float((up - down) / (2 * h)) == pytest.approx(float(x.grad.flatten()[i]), rel=1e-6)  # type: ignore[union-attr]


def test_vsd_vanishes_for_a_perfect_fake_and_pulls_a_gaussian_to_the_teachers_mean() -> None:
    flow = Flow()
    real = Gaussian(torch.tensor([1.0, -2.0]).double(), 0.5)
    x = torch.randn(256, 2).double().requires_grad_()
    y, t = flow.mix(x.detach(), torch.randn(256, 2).double(), 0.6), 0.6
    same = real(y, t).x0
    (grad,) = torch.autograd.grad(vsd(x, same, same).sum(), x)
    assert float(grad.abs().max()) == 0.0
    fake = Gaussian(torch.zeros(2).double(), 0.5)
    (grad,) = torch.autograd.grad(vsd(x, fake(y, t).x0, real(y, t).x0).sum(), x)
    assert (grad.mean(0).sign() == torch.tensor([-1.0, 1.0])).all()  # descent moves x towards (1, -2)


def test_vsd_counts_non_finite_scores_as_zero() -> None:
    x = torch.zeros(2, 2, requires_grad=True)
    real = torch.tensor([[float("nan"), 1.0], [1.0, 1.0]])
    vsd(x, torch.zeros(2, 2), real, 1.0).sum().backward()
    assert x.grad is not None
    assert x.grad[0, 0] == 0
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_sid_gradient_against_finite_differences_with_the_scale_frozen(process: object, alpha: float) -> None:
    _, fake, real = players(process)
    torch.manual_seed(2)
    x, noise = torch.randn(3, 2).double().requires_grad_(), torch.randn(3, 2).double()
    t = process.time(torch.tensor([0.5, 1.0, 3.0]))  # type: ignore[attr-defined]

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        y = process.mix(x, noise, t)  # type: ignore[attr-defined]
        return fake(y, t).x0, real(y, t).x0

    sid(x, *parts(x), alpha=alpha).mean().backward(inputs=[x])  # as `run.update` does for the role that learns
    scale = (x - parts(x)[1]).abs().mean(1, keepdim=True).clamp_min(1e-5).detach()

    def frozen(x: Tensor) -> Tensor:
        f, r = parts(x)
        return (((r - f) * ((r - x) - alpha * (r - f))) / scale).sum(1).mean()

    h = 1e-6
    for i in range(6):
        step = torch.zeros(6).double()
        step[i] = h
        with torch.no_grad():
            slope = (frozen(x + step.view(3, 2)) - frozen(x - step.view(3, 2))) / (2 * h)
        assert float(slope) == pytest.approx(float(x.grad.flatten()[i]), rel=1e-5, abs=1e-8)  # type: ignore[union-attr]


def test_sid_refuses_scores_computed_without_gradient() -> None:
    _, fake, real = players()
    x = torch.randn(2, 2).double().requires_grad_()
    with torch.no_grad():
        f, r = fake(x, 0.5).x0, real(x, 0.5).x0
    with pytest.raises(ValueError, match="without it"):
        sid(x, f, r)


def test_adversarial_generator_step_reaches_the_generator_only_and_the_discriminators_reaches_fake_and_head() -> None:
    generator, fake, _ = players()
    head = Head(fake.net.features).double()  # type: ignore[arg-type]
    flow = Flow()
    z, noise = torch.randn(8, 2).double(), torch.randn(8, 2).double()
    x = generator(z, 0.8).x0

    def judge(x: Tensor, fake: nn.Module, head: nn.Module) -> Tensor:
        with outputs(fake_net.middle) as seen:  # type: ignore[arg-type]
            fake(flow.mix(x, noise, 0.4), 0.4)
        return head(seen[-1])

    fake_net = fake.net
    softplus_generator(judge(x, fake, head)).mean().backward(inputs=list(generator.parameters()))
    assert touched(generator, fake, head) == [True, False, False]
    generator.zero_grad()
    softplus_discriminator(judge(torch.randn(8, 2).double(), fake, head), judge(x.detach(), fake, head)).mean().backward()
    assert touched(generator, fake, head) == [False, True, True]


def test_adversarial_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, -0.5]), torch.tensor([0.5, -3.0])
    soft = lambda v: torch.log1p(torch.exp(v))
    torch.testing.assert_close(softplus_discriminator(real, fake), soft(-real) + soft(fake))
    torch.testing.assert_close(softplus_generator(fake), soft(-fake))
    torch.testing.assert_close(hinge_discriminator(real, fake), torch.tensor([0.0 + 1.5, 1.5 + 0.0]))
    torch.testing.assert_close(hinge_generator(fake), -fake)
    torch.testing.assert_close(approximate_r1(torch.tensor([1.0]), torch.tensor([1.2]), 0.1), torch.tensor([4.0]))


def test_guidance_is_the_same_in_every_parametrization_and_one_means_none() -> None:
    net = PointNet(2, 16, 2, classes=3).double()
    denoiser = Denoiser(net, Flow(), "velocity")
    x, cond, t = torch.randn(5, 2).double(), torch.tensor([0, 1, 2, 0, 1]), torch.rand(5).double() * 0.8 + 0.1
    plain, null = denoiser(x, t, cond), denoiser(x, t, None)
    torch.testing.assert_close(Guided(denoiser, 1.0, -1)(x, t, cond).x0, plain.x0)
    w = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    guided = Guided(denoiser, w, -1)
    wide = w.double()[:, None]
    torch.testing.assert_close(guided(x, t, cond).x0, null.x0 + wide * (plain.x0 - null.x0))
    from_raw = denoiser.read(guided.raw(x, t, cond), x, t)
    torch.testing.assert_close(from_raw.x0, guided(x, t, cond).x0)
    torch.testing.assert_close(guided(x, t, cond, Trig(1.0)).eps, null_gap(denoiser, x, t, cond, wide))


def null_gap(denoiser: Denoiser, x: Tensor, t: Tensor, cond: Tensor, w: Tensor) -> Tensor:
    null, plain = denoiser(x, t, None, Trig(1.0)).eps, denoiser(x, t, cond, Trig(1.0)).eps
    return null + w * (plain - null)


@pytest.mark.parametrize("step", [ddim, consistency])
def test_rollout_differentiates_exactly_one_step(step: object) -> None:
    denoiser = players()[0]
    calls: list[bool] = []
    handle = denoiser.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    times = Flow().grid(4, shift=5.0)
    assert [round(1000 * t) for t in times] == [1000, 938, 833, 625, 0]
    x, pair = rollout(denoiser, torch.randn(3, 2).double(), times, at=2, end=0.5, step=step)  # type: ignore[arg-type]
    handle.remove()
    assert calls == [False, False, True]
    torch.testing.assert_close(x, Flow().mix(*pair, 0.5))
    assert x.requires_grad


def test_a_dmd_generator_step_keeps_one_graph_and_none_for_the_scores() -> None:
    """Tensors saved for backward: those of the generator's one call, and a handful in the surrogate; nothing of teacher or fake."""
    generator, fake, teacher = players()
    fake, teacher = copy.deepcopy(fake), copy.deepcopy(teacher)
    flow, counts = Flow(), {"saved": 0}
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda v: (counts.__setitem__("saved", counts["saved"] + 1), v)[1], lambda v: v)
    z, noise = torch.randn(4, 2).double(), torch.randn(4, 2).double()
    with hooks:
        x, _ = rollout(generator, z, [1.0, 0.5, 0.0], at=1)
        generator_only = counts["saved"]
        with torch.no_grad():
            y = flow.mix(x, noise, 0.6)
            d_fake, d_real = fake(y, 0.6).x0, teacher(y, 0.6).x0
        assert counts["saved"] == generator_only
        vsd(x, d_fake, d_real, dmd_weight(x, d_real)).mean()
    assert generator_only > 0
    assert counts["saved"] - generator_only <= 2


def test_mixtures_teach_images_too_and_the_unet_keeps_shapes() -> None:
    from stillroom.core.errors import UserError

    centres = torch.randn(3, 1, 8, 8)
    pair = Mixture(centres, 0.2)(torch.randn(5, 1, 8, 8), 0.5)
    assert pair.x0.shape == (5, 1, 8, 8)
    net = UNet(1, 8, classes=10)
    assert net(torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([3, -1])).shape == (2, 1, 8, 8)
    with pytest.raises(UserError, match="not divisible by 2"):
        net(torch.randn(2, 1, 7, 7), torch.rand(2))
