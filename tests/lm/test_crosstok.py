"""Cross-tokenizer signals: ULD by hand, groups against brute force, on text with characters of several bytes."""

import pytest
import torch

from stillroom.core.errors import UserError
from stillroom.lm.cache import Capture, capture
from stillroom.lm.crosstok import (
    Paired,
    Read,
    Sorted,
    aligned,
    byte_ends,
    group_log_probs,
    group_loss,
    groups,
    likelihood_gap,
    require_same,
    student_likelihoods,
    uld,
)
from stillroom.lm.output import head
from stillroom.lm.signals import Sampled
from stillroom.lm.text import states
from stillroom.lm.tokenizer import Characters, encode_with_offsets, fingerprint
from stillroom.lm.traces import Trace
from stillroom.losses.tokens import align


def test_uld_compares_sorted_probabilities_across_widths():
    teacher, student = torch.tensor([[0.1, 0.7, 0.2]]).log(), torch.tensor([[0.25, 0.05, 0.3, 0.4]]).log()
    assert uld(teacher, student).item() == pytest.approx(0.3 + 0.1 + 0.15 + 0.05)
    torch.testing.assert_close(uld(student[:, [2, 0, 3, 1]], student), torch.zeros(1))


def bytes_bpe(words, size):
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.train_from_iterator(words, trainers.BpeTrainer(vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=core)


TEXT = "naïve 日本 über 🙂 done"


def ends_of(tokenizer, text):
    ids, offsets = encode_with_offsets(tokenizer, text)
    return ids, byte_ends(text, offsets)


def test_groups_are_the_shortest_that_share_their_bytes():
    a, b = bytes_bpe(["naïve über done"] * 3, 270), bytes_bpe(["日本 🙂 done", "ve ü"] * 3, 275)
    (ids_a, ends_a), (ids_b, ends_b) = ends_of(a, TEXT), ends_of(b, TEXT)
    assert ends_a[-1] == ends_b[-1] == len(TEXT.encode())
    pairs = groups(ends_a, ends_b)
    assert [i for t, _ in pairs for i in t] == list(range(len(ids_a)))
    assert [i for _, s in pairs for i in s] == list(range(len(ids_b)))
    for t, s in pairs:
        assert a.decode(ids_a[t.start : t.stop]) == b.decode(ids_b[s.start : s.stop])
    cuts = (set(ends_a) & set(ends_b)) - {-1}
    assert len(pairs) == len(cuts)
    assert len(pairs) > 3


def words(*pieces):
    """A tokenizer of exactly these pieces, longest first."""
    return Characters("".join(p for p in pieces if len(p) == 1), symbols=[p for p in pieces if len(p) > 1])


def test_alignment_of_hand_made_tokenizations_with_characters_of_several_bytes():
    teacher, student = words("日本", "é", "日", "本", "a", "b"), words("本é", "日", "本", "é", "ab", "a", "b")
    text = "a日本éab"  # teacher: a 日本 é a b; student: a 日 本é ab
    theirs, own = Read.of(teacher, text), Read.of(student, text)
    assert theirs.ends == [1, 7, 9, 10, 11]
    assert own.ends == [1, 4, 9, 11]
    # "a" is predicted by nothing; 日本é ends together at byte 9, "ab" at 11
    assert aligned(theirs, own, 99, 99) == [(range(1, 3), range(1, 3)), (range(3, 5), range(3, 4))]
    assert aligned(theirs, own, 99, 3) == [(range(1, 3), range(1, 3))]  # cut: what is not whole is not compared
    assert aligned(theirs, own, 4, 99) == [(range(1, 3), range(1, 3))]


def test_of_a_conversation_the_replies_and_their_ends_are_aligned():
    turns = [("user", "ab"), ("assistant", "日本a"), ("user", "b"), ("assistant", "éb")]
    trace = Trace.of([{"role": role, "content": text} for role, text in turns])
    roles = ("<|user|>", "<|assistant|>")
    teacher, student = words(*roles, "a", "b", "日", "本", "é"), words(*roles, "日本", "ab", "a", "b", "é")
    theirs, own = Read.of(teacher, trace), Read.of(student, trace)
    found = aligned(theirs, own, 99, 99)
    texts = [(teacher.decode([theirs.ids[i] for i in t]), student.decode([own.ids[i] for i in s])) for t, s in found]
    assert texts == [(x, x) for x in ("日本", "a", "<|end|>", "é", "b", "<|end|>")]
    assert all(own.labels[i] != -100 for _, s in found for i in s)
    assert aligned(theirs, own, 99, own.ids.index(student.ids["日本"])) == []


def test_equal_tokenizers_give_groups_of_one_token_and_its_own_likelihood(model, tokenizer):
    text = "a1 +b=\n0"
    pairs = Paired.of(tokenizer, tokenizer, [text, "12"], 99, 99)
    assert pairs.groups[0] == [(range(i, i + 1), range(i, i + 1)) for i in range(1, len(text))]
    ids = pairs.student.ids
    hidden, labels = align(states(model, pairs.student), pairs.student.labels)
    log_probs = model(ids[:1]).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
    torch.testing.assert_close(student_likelihoods(hidden, head(model), labels, pairs, [0]), log_probs)
    assert pairs.members([1, 0], 1).tolist() == [0, *range(7, 14)]
    torch.testing.assert_close(pairs.members([1, 0], 0, starts=True), pairs.members([1, 0], 1))


@pytest.mark.parametrize("kind", ["text", "states"])
def test_a_student_that_is_its_teacher_loses_nothing_and_another_gets_the_gradient_of_the_naive_sum(tmp_path, model, tokenizer, kind):
    pairs = Paired.of(tokenizer, tokenizer, ["a1 +b", "12=3", "ab"], 99, 99)
    cache = capture(tmp_path, model, tokenizer, pairs.teacher.lists(), Capture(kind), progress=False)
    loss = group_loss(cache, pairs, 0.0, 1.0)
    batch = pairs.student.take(torch.tensor([2, 0]))
    hidden, labels = align(states(model, batch), batch.labels)
    assert loss(hidden, head(model), labels, torch.tensor([2, 0])).loss.abs() < 1e-3  # states are kept in float16
    weight = (head(model).weight.detach() + 0.1 * torch.randn(head(model).weight.shape)).requires_grad_()
    kept = labels != -100
    teacher, student = hidden[kept].detach() @ head(model).weight.T, hidden[kept].detach() @ weight.T
    if kind == "states":
        want = uld(teacher, student).mean()
    else:
        p, q = (z.log_softmax(-1).gather(-1, labels[kept, None]).squeeze(-1).exp() for z in (teacher.detach(), student))
        want = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    got = loss(hidden.detach(), weight, labels, torch.tensor([2, 0]))
    torch.testing.assert_close(got.loss, want, atol=2e-3, rtol=1e-3)
    for ours, theirs in zip(torch.autograd.grad(got.loss, weight), torch.autograd.grad(want, weight)):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-2)


def test_texts_without_a_shared_group_are_dropped_and_none_left_is_explained(tokenizer):
    assert len(Paired.of(tokenizer, tokenizer, ["a", "ab"], 9, 9).groups) == 1
    with pytest.raises(UserError, match="raise --length"):
        Paired.of(tokenizer, tokenizer, ["a"], 9, 9)


def test_sorted_probabilities_need_a_whole_distribution():
    with pytest.raises(UserError, match="whole distribution"):
        Sorted(Sampled(torch.zeros(1, 1).long(), torch.ones(1, 1))).divergence(torch.randn(1, 4), "forward_kl", 1.0)


def test_a_small_case_by_hand():
    assert groups([2, 3, 6], [1, 3, 4, 6]) == [(range(0, 2), range(0, 2)), (range(2, 3), range(2, 4))]
    with pytest.raises(UserError, match="same text"):
        groups([2, 3], [2, 4])


def test_likelihood_gap_is_a_binary_kl_of_the_groups():
    teacher, student = torch.tensor([-0.5, -0.2, -1.0]), torch.tensor([-0.7, -0.4, -0.6], requires_grad=True)
    log_p, log_q = group_log_probs(teacher, torch.tensor([2, 1])), group_log_probs(student, torch.tensor([1, 2]))
    assert log_p.tolist() == pytest.approx([-0.7, -1.0])
    torch.testing.assert_close(likelihood_gap(log_p, log_q), torch.zeros(2), atol=1e-6, rtol=0)
    other = likelihood_gap(log_p - torch.tensor([1.0, 0.5]), log_q)
    p, q = torch.tensor([-1.7, -1.5]).exp(), torch.tensor([-0.7, -1.0]).exp()
    torch.testing.assert_close(other, p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
    other.sum().backward()
    assert student.grad.isfinite().all()


def test_different_tokenizers_need_a_signal_chosen():
    assert fingerprint(Characters("abc")) == fingerprint(Characters("cba"))
    with pytest.raises(UserError, match="different tokenizers"):
        require_same(Characters("abc"), Characters("abcd"))
