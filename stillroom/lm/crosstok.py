"""Signals between models whose tokenizers differ: sorted probabilities (ULD), and likelihoods over byte-aligned groups of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import UserError
from stillroom.lm.tokenizer import encode_with_offsets, fingerprint


def require_same(student: Any, teacher: Any) -> None:
    """UserError unless both tokenizers turn text into the same ids."""
    if fingerprint(student) != fingerprint(teacher):
        raise UserError(
            f"Teacher and student have different tokenizers ({len(teacher)} and {len(student)} words), so their logits mean other words: "
            "choose a cross-tokenizer signal (uld or groups), or sequence-level distillation."
        )


def uld(teacher: Tensor, student: Tensor) -> Tensor:
    """Universal logit distillation (Boizard et al. 2024, arXiv 2402.12030): L1 distance of the probabilities sorted in decreasing order.

    Logits (N, V_t) and (N, V_s), the shorter padded with zeros -> (N,). It sees how sure the teacher is, never of what.
    """
    p = teacher.detach().float().softmax(-1).sort(-1, descending=True).values
    q = student.float().softmax(-1).sort(-1, descending=True).values
    width = max(p.shape[-1], q.shape[-1])
    p, q = (torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in (p, q))
    return (p - q).abs().sum(-1)


def byte_ends(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Token ids of `text` and the UTF-8 byte at which each ends. Characters would not do: several tokens may share one character."""
    ids, offsets = encode_with_offsets(tokenizer, text)
    before = [0]
    for character in text:
        before.append(before[-1] + len(character.encode()))
    ends = [before[stop] for _, stop in offsets]
    for i, (here, following) in enumerate(pairwise(offsets)):
        if following[0] < here[1]:  # both report the character that they share, and only the last of its pieces ends it
            ends[i] = -1
    return ids, ends


def groups(teacher_ends: Sequence[int], student_ends: Sequence[int]) -> list[tuple[range, range]]:
    """Consecutive (teacher tokens, student tokens) that cover the same bytes, each as short as possible.

    Ends in bytes; -1 marks a token that ends inside a character. UserError when the lists do not cover the same text.
    """
    out: list[tuple[range, range]] = []
    t = s = start_t = start_s = 0
    while t < len(teacher_ends) and s < len(student_ends):
        a, b = teacher_ends[t], student_ends[s]
        if a == b and a != -1:
            out.append((range(start_t, t + 1), range(start_s, s + 1)))
            t = start_t = t + 1
            s = start_s = s + 1
        elif a == -1 or (b != -1 and a < b):
            t += 1
        else:
            s += 1
    if t < len(teacher_ends) or s < len(student_ends):
        raise UserError("Teacher and student tokens do not cover the same text: align the completion alone, without special tokens.")
    return out


def group_log_probs(log_probs: Tensor, members: Sequence[range]) -> Tensor:
    """Log-likelihood of each group: the sum of its actual tokens' log-probabilities (N,) -> (groups,)."""
    index = torch.tensor([i for i, group in enumerate(members) for _ in group], device=log_probs.device)
    return log_probs.new_zeros(len(members)).index_add(0, index, log_probs[: len(index)])


def likelihood_gap(teacher_log_probs: Tensor, student_log_probs: Tensor, pairs: Sequence[tuple[range, range]]) -> Tensor:
    """Approximate likelihood matching: per group the binary KL between "the text goes on like this" under teacher and student.

    Log-probabilities (N_t,) and (N_s,) of the actual tokens -> (groups,). Zero iff both give the group's bytes the same probability.
    """
    log_p = group_log_probs(teacher_log_probs.detach(), [t for t, _ in pairs])
    log_q = group_log_probs(student_log_probs, [s for _, s in pairs])
    rest_p, rest_q = (torch.log(-torch.expm1(x.clamp(max=-torch.finfo(x.dtype).eps))) for x in (log_p, log_q))
    return log_p.exp() * (log_p - log_q) + rest_p.exp() * (rest_p - rest_q)
