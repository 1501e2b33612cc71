"""Signals between models whose tokenizers differ: sorted probabilities (ULD), and likelihoods over byte-aligned groups of tokens.

Each model reads the same text under its own tokenizer and chat template; neither ever sees the other's ids. Where the tokens of both end
at the same byte the two have read the same, so what they say there can be compared. From one such byte to the next reaches a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.core.errors import UserError
from stillroom.data.sequences import Rows
from stillroom.lm.cache import TeacherCache
from stillroom.lm.chunked import Chunked, chunked_loss, token_log_probs
from stillroom.lm.output import OutputLayer, head
from stillroom.lm.signals import Dense, Head, Signal, Temperature
from stillroom.lm.text import states
from stillroom.lm.tokenizer import encode_with_offsets, fingerprint
from stillroom.lm.traces import Trace, labels_within, rendered
from stillroom.losses.tokens import IGNORE, Divergence, align, tempered
from stillroom.metrics.modes import eval_mode

Group = tuple[range, range]
"""(teacher tokens, student tokens) that cover the same bytes."""


def require_same(student: Any, teacher: Any) -> None:
    """UserError unless both tokenizers turn text into the same ids."""
    if fingerprint(student) != fingerprint(teacher):
        raise UserError(
            f"Teacher and student have different tokenizers ({len(teacher)} and {len(student)} words), so their logits mean other words: "
            "give --signal byte-groups (likelihoods of the same bytes) or --signal uld (sorted probabilities) in mode word."
        )


# -- signals -----------------------------------------------------------------------------------------------------------------------
def uld(teacher: Tensor, student: Tensor) -> Tensor:
    """Universal logit distillation (Boizard et al. 2024, arXiv 2402.12030): L1 distance of the probabilities sorted in decreasing order.

    Logits (N, V_t) and (N, V_s), the shorter padded with zeros -> (N,). It sees how sure the teacher is, never of what.
    """
    p = teacher.detach().float().softmax(-1).sort(-1, descending=True).values
    q = student.float().softmax(-1).sort(-1, descending=True).values
    width = max(p.shape[-1], q.shape[-1])
    p, q = (torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in (p, q))
    return (p - q).abs().sum(-1)


@dataclass(frozen=True)
class Sorted:
    """A teacher of another vocabulary, of which `uld` sees the sorted probabilities; the name of the divergence is not asked."""

    teacher: Signal

    def __getitem__(self, rows: slice | Tensor) -> Sorted:
        return Sorted(self.teacher[rows])

    def to(self, device: torch.device | str) -> Sorted:
        return Sorted(self.teacher.to(device))

    def divergence(self, student: Tensor, kind: Divergence, temperature: Temperature) -> Tensor:
        if not isinstance(self.teacher, Dense | Head):
            raise UserError("Sorted probabilities need the teacher's whole distribution: capture states or a full cache.")
        return uld(tempered(self.teacher.logits, temperature), tempered(student, temperature))


def group_log_probs(log_probs: Tensor, sizes: Tensor) -> Tensor:
    """Log-likelihood of consecutive groups of `sizes` (groups,) tokens: the sum of their log-probabilities (N,) -> (groups,)."""
    return log_probs.new_zeros(len(sizes)).index_add(0, torch.repeat_interleave(sizes.to(log_probs.device)), log_probs)


def likelihood_gap(teacher: Tensor, student: Tensor) -> Tensor:
    """Approximate likelihood matching: per group the binary KL between "the text goes on like this" under teacher and student.

    Log-likelihoods (groups,) of both -> (groups,). Zero iff both give the group's bytes the same probability.
    """
    log_p, log_q = teacher.detach(), student
    rest_p, rest_q = (torch.log(-torch.expm1(x.clamp(max=-torch.finfo(x.dtype).eps))) for x in (log_p, log_q))
    return log_p.exp() * (log_p - log_q) + rest_p.exp() * (rest_p - rest_q)


# -- alignment ---------------------------------------------------------------------------------------------------------------------
def byte_ends(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """The UTF-8 byte at which each token of `text` ends. Characters would not do: several tokens may share one.

    -1 marks a token that ends inside a character.
    """
    before = bytes_before(text)
    ends = [before[stop] for _, stop in offsets]
    for i, (here, following) in enumerate(pairwise(offsets)):
        if following[0] < here[1]:  # both report the character that they share, and only the last of its pieces ends it
            ends[i] = -1
    return ends


def bytes_before(text: str) -> list[int]:
    """UTF-8 bytes before each character, and before the end."""
    before = [0]
    for character in text:
        before.append(before[-1] + len(character.encode()))
    return before


def groups(teacher_ends: Sequence[int], student_ends: Sequence[int]) -> list[Group]:
    """Consecutive (teacher tokens, student tokens) that cover the same bytes, each as short as possible.

    Ends in bytes; -1 marks a token that ends inside a character. UserError when the lists do not cover the same text.
    """
    out: list[Group] = []
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


@dataclass(frozen=True)
class Read:
    """A text as one model reads it: ids, labels, the byte each token ends at, and the bytes (start, stop) of what is to be aligned."""

    ids: list[int]
    labels: list[int]
    ends: list[int]
    contents: list[tuple[int, int]]

    @classmethod
    def of(cls, tokenizer: Any, text: str | Trace) -> Read:
        """Plain text is trained and aligned throughout; of a conversation, what the assistant said is aligned, its end of turn trained."""
        if isinstance(text, str):
            ids, offsets = encode_with_offsets(tokenizer, text)
            return cls(ids, ids, byte_ends(text, offsets), [(0, len(text.encode()))])
        whole, spans = rendered(tokenizer, text)
        ids, offsets = encode_with_offsets(tokenizer, whole)
        before, contents = bytes_before(whole), []
        for reply, (start, stop) in zip((s.text.strip() for s in text.segments if s.trained), spans):
            place = whole.find(reply, start, stop)
            contents += [(before[place], before[place + len(reply)])] if place >= 0 else []
        return cls(ids, labels_within(ids, offsets, spans), byte_ends(whole, offsets), contents)

    def trained(self, place: int) -> bool:
        return place < len(self.labels) and self.labels[place] != IGNORE

    def inside(self, start: int, stop: int, length: int) -> tuple[int, list[int], bool]:
        """Of the first `length` tokens: the first beyond byte `start`, the ends (from `start`) of those up to `stop`, and whether one
        begins there."""
        whole = [i for i, end in enumerate(self.ends[:length]) if end != -1]
        first = max((i + 1 for i in whole if self.ends[i] <= start), default=0)
        last = max((i + 1 for i in whole if self.ends[i] <= stop), default=first)
        begins = self.ends[first - 1] == start if first else start == 0
        return first, [end if end == -1 else end - start for end in self.ends[first:last]], begins


def aligned(teacher: Read, student: Read, teacher_length: int, length: int) -> list[Group]:
    """Groups within the first tokens of both, and of a conversation the ends of turn as groups of one token each.

    A group whose first token nothing predicts, or that one side's tokens overlap, is left out.
    """
    if len(teacher.contents) != len(student.contents):
        raise UserError("A chat template leaves out an assistant's message that the other shows: use templates that keep them all.")
    out = []
    for (a, b), (c, d) in zip(teacher.contents, student.contents):
        first_t, ends_t, begins_t = teacher.inside(a, b, teacher_length)
        first_s, ends_s, begins_s = student.inside(c, d, length)
        last = max((set(ends_t) & set(ends_s)) - {-1}, default=None)
        if last is None:
            continue
        found = groups(ends_t[: ends_t.index(last) + 1], ends_s[: ends_s.index(last) + 1])
        moved = [(range(t.start + first_t, t.stop + first_t), range(s.start + first_s, s.stop + first_s)) for t, s in found]
        out += moved if begins_t and begins_s else moved[1:]
        ending = (moved[-1][0].stop, moved[-1][1].stop)
        over = last == b - a and ending[0] < teacher_length and ending[1] < length
        if over and teacher.trained(ending[0]) and student.trained(ending[1]):
            out.append((range(ending[0], ending[0] + 1), range(ending[1], ending[1] + 1)))
    return [(t, s) for t, s in out if t.start and s.start]


@dataclass(frozen=True)
class Paired:
    """The same texts under both tokenizers, and per text the groups that cover the same bytes."""

    teacher: Rows
    student: Rows
    groups: list[list[Group]]

    @classmethod
    def of(cls, teacher: Any, student: Any, texts: Sequence[str | Trace], length: int, teacher_length: int) -> Paired:
        """Cut to the first tokens of each; texts of which nothing is aligned are dropped. UserError when none is left."""
        kept = []
        for text in texts:
            theirs, own = Read.of(teacher, text), Read.of(student, text)
            if shared := aligned(theirs, own, teacher_length, length):
                kept.append((theirs, own, shared))
        if not kept:
            raise UserError(f"No text has a trained word among its first {length} tokens: raise --length.")
        rows = lambda reads, most: Rows.of([(read.ids, read.labels) for read in reads], most)
        reads, own_reads, found = zip(*kept)
        return cls(rows(reads, teacher_length), rows(own_reads, length), list(found))

    def members(self, indices: Sequence[int], side: int, *, starts: bool = False) -> Tensor:
        """Among the rows of `align`ing a batch of these texts (side 0: the teacher's, 1: the student's), those that predict the tokens of
        the groups, or only each group's first."""
        width = (self.teacher, self.student)[side].ids.shape[1] - 1
        chosen = [
            place * width + token - 1
            for place, i in enumerate(indices)
            for group in self.groups[i]
            for token in (group[side][:1] if starts else group[side])
        ]
        return torch.tensor(chosen)

    def sizes(self, indices: Sequence[int], side: int) -> Tensor:
        """Tokens of each group (groups,)."""
        return torch.tensor([len(group[side]) for i in indices for group in self.groups[i]])


# -- losses ------------------------------------------------------------------------------------------------------------------------
def group_likelihoods(cache: TeacherCache, pairs: Paired) -> list[Tensor]:
    """Of every text, the log-likelihood (groups,) of each of its groups under the teacher, from a cache of kind text."""
    return [group_log_probs(cache.log_probs([i])[pairs.members([i], 0)], pairs.sizes([i], 0)) for i in range(len(pairs.groups))]


def group_loss(
    cache: TeacherCache | None, pairs: Paired, ce_weight: float, kd_weight: float, temperature: float = 1.0
) -> Callable[[Tensor, OutputLayer | Tensor, Tensor, Tensor], Chunked]:
    """`loss(hidden, head, labels, index)` for the aligned rows of a batch of the student's texts: its cross-entropy, and beside it
    `likelihood_gap` over the groups when the cache of the teacher's rows is of kind text, `uld` where they begin when it is of kind states.

    Both are sums over the number of trained tokens, so that with equal tokenizers a group counts as a token.
    """
    kept = group_likelihoods(cache, pairs) if cache and cache.capture.kind == "text" else []

    def loss(hidden: Tensor, layer: OutputLayer | Tensor, labels: Tensor, index: Tensor) -> Chunked:
        chosen, out = index.tolist(), chunked_loss(hidden, layer, labels, ce_weight=ce_weight)
        count = out.tokens.clamp(min=1)
        if cache is None:
            return out
        if kept:
            log_q = student_likelihoods(hidden, layer, labels, pairs, chosen)
            kd = likelihood_gap(torch.cat([kept[i] for i in chosen]).to(log_q), log_q).sum() / count
        else:
            rows, width = pairs.members(chosen, 1, starts=True).to(hidden.device), pairs.teacher.ids.shape[1]
            taught = Sorted(cache.signal(chosen, width=width)[pairs.members(chosen, 0, starts=True)]).to(hidden.device)
            kd = chunked_loss(hidden[rows], layer, labels[rows], taught, temperature=temperature, count=count).loss
        return out._replace(loss=out.loss + kd_weight * kd, kd=kd.detach())

    return loss


def student_likelihoods(hidden: Tensor, layer: OutputLayer | Tensor, labels: Tensor, pairs: Paired, indices: Sequence[int]) -> Tensor:
    """Log-likelihoods (groups,) under the student, from the aligned rows of a batch."""
    rows = pairs.members(indices, 1).to(hidden.device)
    return group_log_probs(token_log_probs(hidden[rows], layer, labels[rows]), pairs.sizes(indices, 1))


@torch.no_grad()
def group_divergence(net: nn.Module, cache: TeacherCache, pairs: Paired) -> float:
    """Mean of `likelihood_gap` over the groups of all texts."""
    total = count = 0.0
    with eval_mode(net):
        for i, log_p in enumerate(group_likelihoods(cache, pairs)):
            rows = pairs.student.take(slice(i, i + 1))
            hidden, labels = align(states(net, rows), rows.labels)
            log_q = student_likelihoods(hidden, head(net), labels.to(hidden.device), pairs, [i])
            total, count = total + float(likelihood_gap(log_p.to(log_q), log_q).sum()), count + len(log_q)
    return total / count
