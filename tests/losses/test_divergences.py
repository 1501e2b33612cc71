import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from stillroom.losses.divergences import cross_entropy, jeffreys, jsd, kl, mse_probs, reverse_kl, soft_cross_entropies, soft_cross_entropy


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(3 * torch.randn(2, 4, 3, 7, generator=generator, dtype=torch.float64))


def probs(logits: torch.Tensor, temperature: float = 1.0) -> np.ndarray:
    return softmax(logits.numpy() / temperature, axis=-1)


def test_cross_entropies_by_scipy(pair):
    logits, other = pair
    labels = other.argmax(-1)
    expected = -np.take_along_axis(log_softmax(logits.numpy(), axis=-1), labels.numpy()[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(cross_entropy(logits, labels), expected)
    np.testing.assert_allclose(soft_cross_entropy(logits, torch.nn.functional.one_hot(labels, 7)), expected)
    target = probs(other)
    np.testing.assert_allclose(soft_cross_entropy(logits, torch.tensor(target)), -(target * log_softmax(logits.numpy(), axis=-1)).sum(-1))
    one = cross_entropy(logits[0, 0], labels[0, 0])
    assert one.shape == ()
    np.testing.assert_allclose(one, expected[0, 0])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_both_ways_by_scipy(pair, temperature):
    teacher, student = pair
    p, q = probs(teacher, temperature), probs(student, temperature)
    np.testing.assert_allclose(kl(teacher, student, temperature), rel_entr(p, q).sum(-1))
    np.testing.assert_allclose(reverse_kl(teacher, student, temperature), rel_entr(q, p).sum(-1))
    np.testing.assert_allclose(kl(teacher, student, temperature, times_t2=True), temperature**2 * rel_entr(p, q).sum(-1))
    np.testing.assert_allclose(reverse_kl(teacher, student, temperature, times_t2=True), temperature**2 * rel_entr(q, p).sum(-1))


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_jsd_by_scipy(pair, beta, temperature):
    p, q = (probs(logits, temperature) for logits in pair)
    m = beta * p + (1 - beta) * q
    expected = beta * rel_entr(p, m).sum(-1) + (1 - beta) * rel_entr(q, m).sum(-1)
    np.testing.assert_allclose(jsd(*pair, beta, temperature), expected)
    np.testing.assert_allclose(jsd(*pair, beta, temperature, times_t2=True), temperature**2 * expected)


def test_jsd_tends_to_both_kls_at_its_ends(pair):
    pair = tuple(logits / 3 for logits in pair)
    for beta, limit in ((1e-6, kl), (1 - 1e-6, reverse_kl)):
        torch.testing.assert_close(jsd(*pair, beta) / (beta * (1 - beta)), limit(*pair), rtol=1e-4, atol=1e-6)
    for beta in (0.0, 1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="reverse_kl"):
            jsd(*pair, beta)


def test_soft_cross_entropies_at_several_temperatures(pair):
    logits, targets = pair[0][0], torch.tensor(probs(pair[1][:2]))
    found = soft_cross_entropies(logits, targets, torch.tensor([1.0, 4.0]).view(2, 1, 1))
    for value, target, temperature in zip(found, targets, (1.0, 4.0), strict=True):
        assert float(value) == pytest.approx(-(target.numpy() * log_softmax(logits.numpy() / temperature, axis=-1)).sum())


def test_jeffreys_by_scipy_and_by_hand(pair):
    p, q = (probs(logits) for logits in pair)
    np.testing.assert_allclose(jeffreys(*pair), (rel_entr(p, q) + rel_entr(q, p)).sum(-1) / 2)
    np.testing.assert_allclose(jeffreys(*pair), jeffreys(*pair[::-1]))
    two = jeffreys(torch.tensor([0.75, 0.25], dtype=torch.float64).log(), torch.tensor([0.25, 0.75], dtype=torch.float64).log())
    assert float(two) == pytest.approx(0.5 * math.log(3))  # 1/2 (1/2 log 3 + 1/2 log 3)
    # The released form: both KLs as means over all elements, times the number of classes, halved.
    released = 7 * 0.5 * ((p * np.log(p / q)).mean() + (q * np.log(q / p)).mean())
    assert float(jeffreys(*pair).mean()) == pytest.approx(released)


def test_jeffreys_is_four_times_js_near_agreement_and_unbounded_far_from_it(pair):
    near = pair[0] + 1e-3 * pair[1]
    torch.testing.assert_close(jeffreys(pair[0], near) / jsd(pair[0], near, 0.5), torch.full((4, 3), 4.0).double(), rtol=1e-4, atol=0)
    far = torch.tensor([40.0, 0.0]), torch.tensor([0.0, 40.0])
    assert float(jeffreys(*far)) == pytest.approx(40.0)
    assert float(jsd(*far, 0.5)) < math.log(2) + 1e-6
    half = jeffreys(*(logits.half() for logits in far))
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(40.0)


def test_mse_of_probabilities_sums_over_classes(pair):
    np.testing.assert_allclose(mse_probs(pair[0], torch.tensor(probs(pair[1]))), ((probs(pair[0]) - probs(pair[1])) ** 2).sum(-1))


@pytest.mark.parametrize(
    "loss", [kl, reverse_kl, jeffreys, lambda t, s: jsd(t, s, 0.3, 2.0), lambda t, s: soft_cross_entropy(s, t.softmax(-1))]
)
def test_student_gradients_by_finite_differences(pair, loss):
    teacher, student = pair
    assert torch.autograd.gradcheck(lambda s: loss(teacher, s), (student[0].requires_grad_(),))


def test_kl_gradient_is_that_of_soft_cross_entropy_and_closed(pair):
    teacher, student = pair[0][0], pair[1][0].requires_grad_()
    gradients = [
        torch.autograd.grad(value.sum(), student)[0] for value in (kl(teacher, student), soft_cross_entropy(student, teacher.softmax(-1)))
    ]
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], (student.softmax(-1) - teacher.softmax(-1)).detach())


def test_t2_keeps_the_gradient_at_high_temperature(pair):
    """Hinton et al., eq. 4: T^2 dKL/dz -> ((z - mean z) - (v - mean v)) / C."""
    teacher, student = pair[0][0], pair[1][0].requires_grad_()
    limit = ((student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))).detach() / 7
    for temperature in (1e3, 1e4):
        gradient = torch.autograd.grad(kl(teacher, student, temperature, times_t2=True).sum(), student)[0]
        torch.testing.assert_close(gradient, limit, rtol=0, atol=20 / temperature)


@pytest.mark.parametrize("divergence", [kl, reverse_kl, jeffreys, lambda t, s: jsd(t, s, 0.5)])
def test_extreme_and_masked_logits_stay_finite(divergence):
    teacher = torch.tensor([[1e4, 0.0, -1e4], [1.0, 2.0, -math.inf]])
    student = torch.tensor([[-1e4, 0.0, 1e4], [2.0, 1.0, -math.inf]], requires_grad=True)
    value = divergence(teacher, student)
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad.isfinite().all()
    assert divergence(teacher, teacher).abs().max() < 1e-6


def test_missing_mass_is_infinite_only_in_its_own_direction():
    missing, there = torch.tensor([0.0, -math.inf]), torch.tensor([0.0, 0.0])
    assert kl(missing, there).item() == pytest.approx(math.log(2))
    assert kl(there, missing).item() == math.inf


def test_only_torch_is_imported():
    code = "import sys, torch; before = set(sys.modules); import stillroom.losses.divergences; "
    code += "new = {m for m in set(sys.modules) - before if not m.startswith('stillroom')}; assert not new, new"
    subprocess.run([sys.executable, "-c", code], check=True)
