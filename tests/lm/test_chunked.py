"""The chunked loss equals the naive computation in value and every gradient."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from stillroom.core.errors import UserError
from stillroom.lm.chunked import chunked_loss, token_log_probs
from stillroom.lm.output import OutputLayer
from stillroom.lm.signals import Dense, Head, Probabilities, Sampled, TopK, log_leftover
from stillroom.losses.tokens import BY_NAME, IGNORE, divergence, tempered, token_mean


def case(n=11, v=13, student_width=6, teacher_width=9, ignored=3, seed=0):
    torch.manual_seed(seed)
    labels = torch.randint(v, (n,))
    labels[torch.randperm(n)[:ignored]] = IGNORE
    leaves = [torch.randn(n, student_width), torch.randn(v, student_width), torch.randn(v)]
    return [x.requires_grad_() for x in leaves], (torch.randn(n, teacher_width), torch.randn(v, teacher_width)), labels


def naive(leaves, teacher, labels, kind, temperature, ce_weight, kd_weight, bias=True, times_t2=False):
    hidden, weight, offset = leaves
    logits = linear(hidden, weight, offset if bias else None)
    kd = divergence(linear(*teacher), logits, kind, temperature, times_t2=times_t2)
    ce = cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    return ce_weight * token_mean(ce, labels) + kd_weight * token_mean(kd, labels)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", BY_NAME)
@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_naive(kind, rows, bias):
    leaves, teacher, labels = case()
    used = leaves if bias else leaves[:2]
    want = naive(leaves, teacher, labels, kind, 2.0, 0.3, 0.7, bias, times_t2=True)
    grads = torch.autograd.grad(3 * want, used)
    got = chunked_loss(
        leaves[0], OutputLayer(leaves[1], leaves[2] if bias else None), labels, Head(*teacher),
        ce_weight=0.3, kd_weight=0.7, kind=kind, temperature=2.0, times_t2=True, rows=rows,
    )  # fmt: skip
    close(got.loss, want)
    for ours, theirs in zip(torch.autograd.grad(3 * got.loss, used), grads):
        close(ours, theirs)
    assert got.tokens.item() == 8


@pytest.mark.parametrize("ignored", [0, 10, 11])
def test_one_row_left_or_none(ignored):
    leaves, teacher, labels = case(ignored=ignored)
    want = naive(leaves, teacher, labels, "forward_kl", 1.0, 1.0, 1.0)
    got = chunked_loss(leaves[0], OutputLayer(leaves[1], leaves[2]), labels, Head(*teacher), ce_weight=1.0, rows=4)
    close(got.loss, want)
    for ours, theirs in zip(torch.autograd.grad(got.loss, leaves), torch.autograd.grad(want, leaves)):
        close(ours, theirs)


def test_a_tied_head_gets_both_gradients_and_a_frozen_one_none():
    torch.manual_seed(0)
    table, ids, labels = torch.randn(13, 6, requires_grad=True), torch.randint(13, (9,)), torch.randint(13, (9,))
    teacher = Dense(torch.randn(9, 13))
    got = torch.autograd.grad(chunked_loss(table[ids].tanh(), table, labels, teacher, ce_weight=0.5, rows=2).loss, table)[0]
    logits = table[ids].tanh() @ table.t()
    want = 0.5 * cross_entropy(logits, labels) + divergence(teacher.logits, logits).mean()
    close(got, torch.autograd.grad(want, table)[0])
    hidden, frozen = torch.randn(9, 6, requires_grad=True), torch.randn(13, 6)
    chunked_loss(hidden, frozen, labels, teacher).loss.backward()
    assert hidden.grad is not None
    assert frozen.grad is None


def test_parts_of_a_batch_add_up_with_the_whole_count():
    leaves, teacher, labels = case()
    whole = chunked_loss(leaves[0], leaves[1], labels, Head(*teacher))
    parts = [
        chunked_loss(leaves[0][rows], leaves[1], labels[rows], Head(teacher[0][rows], teacher[1]), count=whole.tokens).loss
        for rows in (slice(0, 3), slice(3, 11))
    ]
    close(sum(parts), whole.loss)


def test_a_temperature_per_row_and_no_teacher():
    leaves, teacher, labels = case()
    heats = torch.linspace(0.5, 3.0, 11)
    values = divergence(linear(*teacher), linear(*leaves[:2]), "forward_kl", heats)
    got = chunked_loss(leaves[0], leaves[1], labels, Head(*teacher), temperature=heats, rows=3)
    close(got.loss, token_mean(values, labels))
    plain = chunked_loss(leaves[0], leaves[1], labels, ce_weight=1.0)
    close(plain.loss, cross_entropy(linear(*leaves[:2]), labels, ignore_index=IGNORE))
    assert plain.kd.item() == 0.0


def test_closed_forms_leave_their_inputs_alone_and_their_gradients_serve_once():
    leaves, teacher, labels = case()
    dense = linear(*teacher)
    before = dense.clone()
    got = chunked_loss(leaves[0], leaves[1], labels, Dense(dense), ce_weight=0.5)
    close(got.loss, naive(leaves, teacher, labels, "forward_kl", 1.0, 0.5, 1.0, bias=False))
    assert torch.equal(dense, before)
    got.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up"):
        got.loss.backward()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("stored", ["topk", "cut", "all", "sampled"])
def test_stored_signals_give_the_gradient_of_their_own_values(stored, temperature):
    torch.manual_seed(0)
    z = torch.randn(7, 13, dtype=torch.float64, requires_grad=True)
    log_probs, ids = (2 * torch.randn(7, 13, dtype=torch.float64)).log_softmax(-1).topk(12 if stored == "all" else 4)
    tail = torch.full((7,), -torch.inf) if stored == "cut" else log_leftover(log_probs)
    signal = TopK(ids, log_probs, tail, temperature)
    if stored == "sampled":
        signal = Sampled(torch.randint(13, (7, 20)), torch.rand(7, 20, dtype=torch.float64) / 20, temperature)
    want = signal.divergence(z, "forward_kl", temperature)
    values, slope = signal.forward_kl(z.detach().clone(), temperature)
    torch.testing.assert_close(values, want)
    torch.testing.assert_close(slope / temperature, torch.autograd.grad(want.sum(), z)[0])


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_token_log_probs_and_their_gradients(rows):
    leaves, _, _ = case()
    labels = torch.arange(11)
    want = linear(*leaves[:2]).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    got = token_log_probs(*leaves[:2], labels, rows=rows)
    close(got, want)
    slope = torch.randn(11)
    for ours, theirs in zip(torch.autograd.grad(got, leaves[:2], slope), torch.autograd.grad(want, leaves[:2], slope)):
        close(ours, theirs)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_words_that_one_side_excludes_or_lacks(temperature):
    leaves, teacher, labels = case(ignored=0)
    dense = linear(*teacher)[:, :11]  # the student's last two words are padding
    dense[:, 3] = -torch.inf
    labels[labels == 4] = 5
    offset = torch.zeros(13)
    offset[4], dense[:, 4] = -torch.inf, -torch.inf
    logits = linear(leaves[0], leaves[1], offset)
    seen = [i for i in range(11) if i != 4]
    log_p, log_q = (dense / temperature)[:, seen].log_softmax(-1), (logits / temperature)[:, seen].log_softmax(-1)
    kd = (log_p.exp() * (log_p - log_q).masked_fill(log_p == -torch.inf, 0.0)).sum(-1).mean()
    want = torch.autograd.grad(cross_entropy(logits, labels) + kd, leaves[:2])
    got = chunked_loss(leaves[0], OutputLayer(leaves[1], offset), labels, Dense(dense), ce_weight=1.0, temperature=temperature, rows=4)
    close(got.kd, kd)
    for ours, theirs in zip(torch.autograd.grad(got.loss, leaves[:2]), want):
        close(ours, theirs)


def test_any_function_of_the_logits_may_be_the_divergence():
    leaves, teacher, labels = case()
    far = lambda p, q: q.sum(-1)  # its gradient is one number, expanded
    got = torch.autograd.grad(chunked_loss(leaves[0], leaves[1], labels, Head(*teacher), kind=far).loss, leaves[0])[0]
    close(got, torch.autograd.grad(token_mean(far(None, linear(*leaves[:2])), labels), leaves[0])[0])


def test_weight_gradient_accumulates_in_float32():
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(512, 4), torch.randn(6, 4), torch.randint(6, (512,))
    exact = weight.clone().requires_grad_()
    chunked_loss(hidden, exact, labels, ce_weight=1.0).loss.backward()
    half = weight.bfloat16().requires_grad_()
    chunked_loss(hidden.bfloat16(), half, labels, ce_weight=1.0, rows=2).loss.backward()
    assert half.grad.dtype == torch.bfloat16
    assert (half.grad.float() - exact.grad).norm() < 0.02 * exact.grad.norm()


def test_half_precision_states_under_a_float32_head():
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(9, 4).bfloat16(), torch.randn(6, 4, requires_grad=True), torch.randint(6, (9,))
    hidden.requires_grad_()
    chunked_loss(hidden, weight, labels, ce_weight=1.0).loss.backward()
    exact = hidden.detach().float().requires_grad_()
    cross_entropy(exact @ weight.detach().t(), labels).backward()
    assert hidden.grad.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.grad.float(), exact.grad, atol=2e-3, rtol=2e-2)


def test_top_k_with_a_leftover_bucket_is_a_lower_bound_and_exact_at_full_width():
    torch.manual_seed(0)
    teacher, student = 3 * torch.randn(20, 13, dtype=torch.float64), torch.randn(20, 13, dtype=torch.float64)
    log_probs = tempered(teacher).log_softmax(-1)
    full = divergence(teacher, student)
    previous = torch.zeros(20, dtype=torch.float64)
    for k in (2, 6, 12):
        head, ids = log_probs.topk(k)
        signal = TopK(ids, head, log_leftover(head))
        values = signal.divergence(student, "forward_kl", 1.0)
        assert (values <= full + 1e-12).all()
        assert (values >= previous - 1e-12).all()
        assert signal.divergence(teacher, "forward_kl", 1.0).abs().max() < 1e-9
        previous = values
    torch.testing.assert_close(previous, full)


def test_sampled_targets_give_an_unbiased_gradient():
    torch.manual_seed(0)
    teacher, z = torch.randn(1, 8), torch.randn(1, 8)
    draws = torch.multinomial(teacher.softmax(-1), 200_000, replacement=True)
    signal = Sampled(draws, torch.full(draws.shape, 1 / draws.shape[1]))
    z.requires_grad_()
    (slope,) = torch.autograd.grad(signal.divergence(z, "forward_kl", 1.0).sum(), z)
    torch.testing.assert_close(slope, (z.softmax(-1) - teacher.softmax(-1)).detach(), atol=5e-3, rtol=0)


def test_what_a_stored_signal_cannot_give_is_refused():
    signal = TopK(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1) - 1, torch.zeros(1) - 1)
    with pytest.raises(UserError, match="temperature 1"):
        signal.divergence(torch.randn(1, 4), "forward_kl", 2.0)
    with pytest.raises(UserError, match="forward_kl only"):
        Sampled(torch.zeros(1, 1), torch.ones(1, 1)).divergence(torch.randn(1, 4), "reverse_kl", 1.0)


def test_padded_vocabularies_are_cut_not_filled():
    torch.manual_seed(0)
    teacher, student = torch.randn(3, 10), torch.randn(3, 8)
    torch.testing.assert_close(Dense(teacher).divergence(student, "forward_kl", 1.0), divergence(teacher[:, :8], student))


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_row_weights_multiply_each_rows_losses(kind):
    leaves, teacher, labels = case()
    weights = torch.linspace(-1.0, 2.0, 11)
    logits = linear(*leaves[:2])
    ce = cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    kd = divergence(linear(*teacher), logits, kind, 2.0)
    want = token_mean((0.3 * ce + 0.7 * kd) * weights, labels)
    how = {"ce_weight": 0.3, "kd_weight": 0.7, "kind": kind, "temperature": 2.0, "rows": 4}
    got = chunked_loss(*leaves[:2], labels, Head(*teacher), row_weights=weights, **how)
    close(got.loss, want)
    close(got.ce, token_mean(ce * weights, labels))
    close(got.kd, token_mean(kd * weights, labels))
    for ours, theirs in zip(*(torch.autograd.grad(x, leaves[:2]) for x in (got.loss, want))):
        close(ours, theirs)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_given_probabilities_stay_what_they_are_while_the_student_is_tempered(kind):
    leaves, _, labels = case(ignored=0)
    probs = torch.rand(11, 13).softmax(-1) if kind == "reverse_kl" else torch.eye(13)[:11] * 0.75 + torch.eye(13)[1:12] * 0.25
    q = (linear(*leaves[:2]) / 2).softmax(-1)
    want = {"forward_kl": torch.xlogy(probs, probs) - probs * q.log(), "reverse_kl": q * (q / probs).log()}[kind].sum(-1).mean()
    got = chunked_loss(*leaves[:2], labels, Probabilities(probs), kind=kind, temperature=2.0, rows=4)
    close(got.loss, want)
    for ours, theirs in zip(*(torch.autograd.grad(x, leaves[:2]) for x in (got.loss, want))):
        close(ours, theirs)
    with pytest.raises(UserError, match="Probabilities of 5 words"):
        Probabilities(torch.rand(2, 5)).divergence(torch.rand(2, 6), "forward_kl", 1.0)


def test_signals_move_with_all_they_hold():
    ids, numbers = torch.zeros(2, 3, dtype=torch.long), torch.rand(2, 3)
    signals = [
        Dense(numbers), Probabilities(numbers), Head(numbers, OutputLayer(numbers, numbers[0])), Head(numbers, numbers),
        TopK(ids, numbers, numbers[:, 0], 2.0), Sampled(ids, numbers, 2.0),
    ]  # fmt: skip
    for signal in signals:
        there = signal.to("meta")
        held = [x for value in vars(there).values() for x in (value if isinstance(value, tuple) else (value,)) if torch.is_tensor(x)]
        assert held
        assert {x.device.type for x in held} == {"meta"}
        assert getattr(there, "temperature", 1.0) == getattr(signal, "temperature", 1.0)
