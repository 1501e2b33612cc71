"""The two players' steps: signs, gradients, modes; and pairs."""

from __future__ import annotations

import pytest
import torch

from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.matching import answering, denoising_loss, features, fooling_loss, gap_loss, scores, telling_loss
from stillroom.diffusion.pairs import Pairs
from stillroom.diffusion.processes import Flow
from stillroom.diffusion.sampling import ddim
from stillroom.nets.denoisers import PointNet
from tests.diffusion.tiny import untrained


def test_descent_on_the_gap_moves_samples_from_the_fake_to_the_teacher() -> None:
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0]]).double().requires_grad_()
    real, fake = torch.tensor([[3.0, 2.0], [1.0, 0.0]]).double(), torch.tensor([[0.0, 2.5], [-1.0, 0.0]]).double()
    (grad,) = torch.autograd.grad(gap_loss(x, real, fake).sum(), x)
    torch.testing.assert_close(grad, torch.tensor([[-3.0, 0.5], [-4.0, 0.0]]).double() / 2)  # (fake - real) / mean|x - real| / 2


def test_scores_are_asked_without_gradient_and_dropout_and_must_be_finite(run: Run) -> None:
    setting = untrained("ring", width=8)
    fake = Denoiser(PointNet(2, 8, 1, dropout=0.9), Flow(), "velocity").train()
    y = torch.randn(5, 2, requires_grad=True)
    real_x0, fake_x0 = scores(run, setting.teacher, fake, y, torch.full((5,), 0.4), None)
    assert fake.training
    assert not real_x0.requires_grad
    assert not fake_x0.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(real_x0, setting.teacher(y, 0.4).x0)
        torch.testing.assert_close(fake_x0, fake.eval()(y, 0.4).x0)
    with answering(fake):
        assert not fake.training
    assert not fake.training  # as it was
    setting.teacher.centres.fill_(float("nan"))
    with pytest.raises(UserError, match=r"scores.*not finite"):
        scores(run, setting.teacher, fake, y, torch.full((5,), 0.4), None)


def test_the_game_by_hand() -> None:
    soft = lambda v: torch.log1p(torch.exp(v))
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -3.0])
    torch.testing.assert_close(fooling_loss(0.3, fake), 0.3 * soft(-fake))
    torch.testing.assert_close(telling_loss(0.3, real, fake), 0.3 * (soft(-real) + soft(fake)))


def test_the_fakes_loss_and_features_are_those_of_one_call() -> None:
    net = Denoiser(PointNet(2, 8, 3).double(), Flow(), "velocity")
    x, eps, t = torch.randn(4, 2).double().requires_grad_(), torch.randn(4, 2).double(), torch.rand(4).double()
    y = Flow().mix(x, eps, t)
    raw, hidden = features(net, net.net.middle, y, t, None)  # type: ignore[arg-type]
    torch.testing.assert_close(raw, net.raw(y, t))
    assert hidden.shape == (4, 8)
    loss = denoising_loss(raw, x, eps, t, net)
    torch.testing.assert_close(loss, (raw - (eps - x)).square().mean(1))
    net_only = denoising_loss(raw.detach(), x, eps, t, net)
    assert not net_only.requires_grad


@pytest.mark.parametrize("size", [0, 10])
def test_pairs_are_noise_and_where_the_teachers_ode_ends(run: Run, size: int) -> None:
    setting, times = untrained("classes", width=8), [999.0, 500.0, -1.0]
    bank = Pairs(run, setting, setting.teacher, times, size, ddim)
    for _ in run.steps(1):
        z, x, cond = bank.draw(run, 6)
        again = bank.draw(run, 6)[0]
    y = z
    for t, s in ((999.0, 500.0), (500.0, -1.0)):
        y = setting.process.mix(*setting.teacher(y, t, cond), s)
    torch.testing.assert_close(x, y)
    assert not torch.equal(z, again)
    assert (len({tuple(row) for row in torch.cat([z, again]).tolist()}) <= 10) == bool(size)
