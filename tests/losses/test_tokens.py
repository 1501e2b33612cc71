"""Token divergences against closed forms in float64, their gradients against the sheet's formulas."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from stillroom.losses.divergences import jsd
from stillroom.losses.tokens import BY_NAME, IGNORE, align, divergence, reduce, sequence_mean, token_mean


def rows(n=5, v=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(n, v, generator=generator, dtype=torch.float64) for _ in range(2)]


def expected(kind, p, q):
    if kind == "total_variation":
        return np.abs(p - q).sum(-1) / 2
    if kind == "jsd":
        m = (p + q) / 2
        return 0.5 * rel_entr(p, m).sum(-1) + 0.5 * rel_entr(q, m).sum(-1)
    a, b = {
        "forward_kl": (p, q),
        "reverse_kl": (q, p),
        "skew_kl": (p, 0.1 * p + 0.9 * q),
        "skew_reverse_kl": (q, 0.9 * q + 0.1 * p),
    }[kind]
    return rel_entr(a, b).sum(-1)


@pytest.mark.parametrize("kind", BY_NAME)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_values(kind, temperature):
    teacher, student = rows()
    want = expected(kind, softmax(teacher.numpy() / temperature, -1), softmax(student.numpy() / temperature, -1))
    np.testing.assert_allclose(divergence(teacher, student, kind, temperature).numpy(), want, rtol=1e-10)
    np.testing.assert_allclose(divergence(teacher, student, kind, temperature, times_t2=True).numpy(), want * temperature**2, rtol=1e-10)


def test_gradients_are_those_of_the_sheet():
    teacher, student = rows()
    p, q = teacher.softmax(-1), student.softmax(-1)

    def gradient(kind):
        z = student.clone().requires_grad_()
        return torch.autograd.grad(divergence(teacher, z, kind).sum(), z)[0]

    torch.testing.assert_close(gradient("forward_kl"), q - p)
    gap = q.log() - p.log()
    torch.testing.assert_close(gradient("reverse_kl"), q * (gap - (q * gap).sum(-1, keepdim=True)))
    m = (p + q) / 2
    gap = q.log() - m.log()
    torch.testing.assert_close(gradient("jsd"), 0.5 * q * (gap - (q * gap).sum(-1, keepdim=True)))
    m = 0.1 * p + 0.9 * q
    torch.testing.assert_close(gradient("skew_kl"), -0.9 * q * (p / m - (q * p / m).sum(-1, keepdim=True)))


def test_a_temperature_per_row():
    teacher, student = rows()
    heats = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    one_by_one = [divergence(teacher[i : i + 1], student[i : i + 1], "forward_kl", float(t))[0] for i, t in enumerate(heats)]
    torch.testing.assert_close(divergence(teacher, student, "forward_kl", heats), torch.stack(one_by_one))


def test_any_function_of_two_logits_is_a_divergence():
    teacher, student = rows()
    torch.testing.assert_close(divergence(teacher, student, partial(jsd, beta=0.3), 2.0), jsd(teacher, student, 0.3, 2.0))


@pytest.mark.parametrize("kind", BY_NAME)
def test_padded_words_have_no_probability_and_no_nan(kind):
    teacher, student = rows()
    padded = [torch.cat([x, torch.full((5, 2), -torch.inf, dtype=x.dtype)], -1) for x in (teacher, student)]
    z = padded[1].requires_grad_()
    values = divergence(padded[0], z, kind)
    torch.testing.assert_close(values, divergence(teacher, student, kind))
    (slope,) = torch.autograd.grad(values.sum(), z)
    assert slope.isfinite().all()
    assert (slope[:, -2:] == 0).all()


def test_half_precision_logits_are_read_in_float32():
    teacher, student = (x.bfloat16() for x in rows())
    assert divergence(teacher, student).dtype == torch.float32


def test_means_and_masks():
    values = torch.tensor([1.0, 2.0, 3.0, float("nan")], requires_grad=True)
    labels = torch.tensor([4, IGNORE, 0, IGNORE])
    total, count = reduce(values, labels)
    assert (total.item(), count.item()) == (4.0, 2)
    assert token_mean(values, labels).item() == 2.0
    assert token_mean(values, labels, count=8).item() == 0.5
    nothing = token_mean(values, torch.full((4,), IGNORE))
    nothing.backward()
    assert nothing.item() == 0.0
    assert values.grad.tolist() == [0.0] * 4
    halves = [(values[:1], labels[:1]), (values[1:], labels[1:])]
    assert sum(token_mean(v, y, count=2) for v, y in halves).item() == 2.0


def test_sequence_mean_weighs_sequences_equally():
    values = torch.tensor([[1.0, 3.0], [5.0, 9.0], [7.0, 7.0]])
    labels = torch.tensor([[1, 1], [1, IGNORE], [IGNORE, IGNORE]])
    assert sequence_mean(values, labels).item() == 3.5


def test_align_moves_labels_once():
    states, labels = torch.arange(12.0).reshape(1, 4, 3), torch.tensor([[5, 6, 7, 8]])
    hidden, wanted = align(states, labels)
    assert hidden.tolist() == states[0, :3].tolist()
    assert wanted.tolist() == [6, 7, 8]
