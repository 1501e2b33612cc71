"""Cross-tokenizer signals: ULD by hand, groups against brute force, on text with characters of several bytes."""

import pytest
import torch

from stillroom.errors import UserError
from stillroom.lm.crosstok import byte_ends, group_log_probs, groups, likelihood_gap, require_same, uld
from stillroom.lm.tokenizer import Characters, fingerprint


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


def test_groups_are_the_shortest_that_share_their_bytes():
    a, b = bytes_bpe(["naïve über done"] * 3, 270), bytes_bpe(["日本 🙂 done", "ve ü"] * 3, 275)
    (ids_a, ends_a), (ids_b, ends_b) = byte_ends(a, TEXT), byte_ends(b, TEXT)
    assert ends_a[-1] == ends_b[-1] == len(TEXT.encode())
    pairs = groups(ends_a, ends_b)
    assert [i for t, _ in pairs for i in t] == list(range(len(ids_a)))
    assert [i for _, s in pairs for i in s] == list(range(len(ids_b)))
    for t, s in pairs:
        assert a.decode(ids_a[t.start : t.stop]) == b.decode(ids_b[s.start : s.stop])
    cuts = (set(ends_a) & set(ends_b)) - {-1}
    assert len(pairs) == len(cuts)
    assert len(pairs) > 3


def test_a_small_case_by_hand():
    assert groups([2, 3, 6], [1, 3, 4, 6]) == [(range(0, 2), range(0, 2)), (range(2, 3), range(2, 4))]
    with pytest.raises(UserError, match="same text"):
        groups([2, 3], [2, 4])


def test_likelihood_gap_is_a_binary_kl_of_the_groups():
    pairs = [(range(0, 2), range(0, 1)), (range(2, 3), range(1, 3))]
    teacher, student = torch.tensor([-0.5, -0.2, -1.0]), torch.tensor([-0.7, -0.4, -0.6], requires_grad=True)
    assert group_log_probs(teacher, [t for t, _ in pairs]).tolist() == pytest.approx([-0.7, -1.0])
    gap = likelihood_gap(teacher, student, pairs)
    torch.testing.assert_close(gap, torch.zeros(2), atol=1e-6, rtol=0)
    other = likelihood_gap(teacher - 0.5, student, pairs)
    p, q = torch.tensor([-1.7, -1.5]).exp(), torch.tensor([-0.7, -1.0]).exp()
    torch.testing.assert_close(other, p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
    other.sum().backward()
    assert student.grad.isfinite().all()


def test_different_tokenizers_need_a_signal_chosen():
    assert fingerprint(Characters("abc")) == fingerprint(Characters("cba"))
    with pytest.raises(UserError, match="different tokenizers"):
        require_same(Characters("abc"), Characters("abcd"))
