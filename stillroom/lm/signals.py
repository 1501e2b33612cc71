"""What a language teacher says about N positions: dense logits or probabilities, states with a head, top-k with the leftover mass, or
samples.

Every signal slices by rows and answers `divergence(student_logits, kind, temperature)` with one value per row, so that the
chunked loss needs to know none of them. Those that know the gradient of their forward KL give it with the value, `forward_kl`, in the
memory of the student's logits: a fresh block of memory costs more than the arithmetic on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import pad

from stillroom.core.errors import UserError
from stillroom.lm.output import OutputLayer
from stillroom.losses.tokens import Divergence, divergence, tempered

Temperature = float | Tensor


class Signal(Protocol):
    """One teacher's word on N positions."""

    def __getitem__(self, rows: slice | Tensor) -> Signal: ...

    def to(self, device: torch.device | str) -> Signal: ...

    def divergence(self, student: Tensor, kind: Divergence, temperature: Temperature) -> Tensor:
        """One value per row for student logits (n, V)."""
        ...


@runtime_checkable
class ClosedForm(Protocol):
    """A signal that knows the gradient of its forward KL."""

    def forward_kl(self, student: Tensor, temperature: Temperature) -> tuple[Tensor, Tensor]:
        """Values (n,), and the gradient (n, V) of their sum with respect to student / temperature. Overwrites the logits."""
        ...


@dataclass(frozen=True)
class Dense:
    """Teacher logits (N, V). Words beyond the shorter vocabulary are padding of the embedding matrix: `same_vocabulary` drops them."""

    logits: Tensor

    def __getitem__(self, rows: slice | Tensor) -> Dense:
        return Dense(self.logits[rows])

    def to(self, device: torch.device | str) -> Dense:
        return Dense(self.logits.to(device))

    def divergence(self, student: Tensor, kind: Divergence, temperature: Temperature) -> Tensor:
        teacher, student = same_vocabulary(self.logits, student)
        return divergence(teacher, student, kind, temperature)

    def forward_kl(self, student: Tensor, temperature: Temperature) -> tuple[Tensor, Tensor]:
        return _dense_forward_kl(self.logits.clone(), student, temperature)


@dataclass(frozen=True)
class Probabilities:
    """Probabilities (N, V), however they were found: a vote, an average of teachers, labels with their smoothing. The target is what was
    given at every temperature, which is the student's alone."""

    probs: Tensor

    def __getitem__(self, rows: slice | Tensor) -> Probabilities:
        return Probabilities(self.probs[rows])

    def to(self, device: torch.device | str) -> Probabilities:
        return Probabilities(self.probs.to(device))

    def divergence(self, student: Tensor, kind: Divergence, temperature: Temperature) -> Tensor:
        return divergence(self._log(student), tempered(student, temperature), kind)

    def forward_kl(self, student: Tensor, temperature: Temperature) -> tuple[Tensor, Tensor]:
        return _forward_kl(self._log(student), _log_softmax_(student, temperature), student.shape[-1])

    def _log(self, like: Tensor) -> Tensor:
        if self.probs.shape[-1] != like.shape[-1]:
            raise UserError(f"Probabilities of {self.probs.shape[-1]} words were given to a student of {like.shape[-1]}.")
        return self.probs.to(like).log()


@dataclass(frozen=True)
class Head:
    """Teacher states (N, d) and its output layer, or that one's weight (V, d): exact logits, made only for the rows in hand."""

    hidden: Tensor
    layer: OutputLayer | Tensor

    def __getitem__(self, rows: slice | Tensor) -> Head:
        return Head(self.hidden[rows], self.layer)

    def to(self, device: torch.device | str) -> Head:
        return Head(self.hidden.to(device), self.layer.to(device))

    @property
    def logits(self) -> Tensor:
        """(N, V), made anew each time."""
        with torch.no_grad():
            return OutputLayer.of(self.layer).logits(self.hidden)

    def divergence(self, student: Tensor, kind: Divergence, temperature: Temperature) -> Tensor:
        return Dense(self.logits).divergence(student, kind, temperature)

    def forward_kl(self, student: Tensor, temperature: Temperature) -> tuple[Tensor, Tensor]:
        return _dense_forward_kl(self.logits, student, temperature)


@dataclass(frozen=True)
class TopK:
    """Ids (N, k) and log-probabilities (N, k) of the k likeliest words, and the log of the leftover mass (N,), at `temperature`.

    The leftover is one more word on both sides: a lower bound of the full divergence, zero when head and leftover match. Dropping or
    renormalising it instead makes the student over-confident by 1 / (head mass).
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor
    temperature: float = 1.0

    def __getitem__(self, rows: slice | Tensor) -> TopK:
        return TopK(self.ids[rows], self.log_probs[rows], self.log_tail[rows], self.temperature)

    def to(self, device: torch.device | str) -> TopK:
        return TopK(self.ids.to(device), self.log_probs.to(device), self.log_tail.to(device), self.temperature)

    def divergence(self, student: Tensor, kind: Divergence, temperature: Temperature) -> Tensor:
        _same_temperature(temperature, self.temperature)
        head = tempered(student, temperature).log_softmax(-1).gather(-1, self.ids.long())
        student = torch.cat([head, log_leftover(head).unsqueeze(-1)], -1)
        return divergence(self._buckets(head), student, kind)

    def forward_kl(self, student: Tensor, temperature: Temperature) -> tuple[Tensor, Tensor]:
        """With leftovers p_r and q_r the gradient is q - p on the head, (1 - p_r / q_r) q elsewhere."""
        _same_temperature(temperature, self.temperature)
        log_q, ids = _log_softmax_(student, temperature), self.ids.long()
        head = log_q.gather(-1, ids)
        teacher, own = self._buckets(head), torch.cat([head, log_leftover(head).unsqueeze(-1)], -1)
        p = teacher.softmax(-1)
        slope = log_q.exp_().mul_(1 - (p / own.exp())[:, -1:])
        return divergence(teacher, own), slope.scatter_(-1, ids, head.exp() - p[:, :-1])

    def _buckets(self, like: Tensor) -> Tensor:
        return torch.cat([self.log_probs, self.log_tail.unsqueeze(-1)], -1).to(like)


@dataclass(frozen=True)
class Sampled:
    """Words (N, n) drawn from the teacher with weights (N, n) = p / (n * proposal): an unbiased cross-entropy gradient.

    Its value is the cross-entropy -sum w log q, forward KL up to the teacher's unknown entropy; no other divergence can be had.
    """

    ids: Tensor
    weights: Tensor
    temperature: float = 1.0

    def __getitem__(self, rows: slice | Tensor) -> Sampled:
        return Sampled(self.ids[rows], self.weights[rows], self.temperature)

    def to(self, device: torch.device | str) -> Sampled:
        return Sampled(self.ids.to(device), self.weights.to(device), self.temperature)

    def divergence(self, student: Tensor, kind: Divergence, temperature: Temperature) -> Tensor:
        if kind != "forward_kl":
            raise UserError("A sampled teacher gives forward_kl only: capture a top-k or full cache for that.")
        _same_temperature(temperature, self.temperature)
        log_q = tempered(student, temperature).log_softmax(-1).gather(-1, self.ids.long())
        return -(self.weights.to(log_q) * log_q).sum(-1)

    def forward_kl(self, student: Tensor, temperature: Temperature) -> tuple[Tensor, Tensor]:
        _same_temperature(temperature, self.temperature)
        log_q = _log_softmax_(student, temperature)
        ids, weights = self.ids.long(), self.weights.to(log_q)
        values = -(weights * log_q.gather(-1, ids)).sum(-1)
        return values, log_q.exp_().mul_(weights.sum(-1, keepdim=True)).scatter_add_(-1, ids, -weights)


def _log_softmax_(logits: Tensor, temperature: Temperature) -> Tensor:
    """log softmax(logits / temperature) over the last dimension, in the memory of float logits."""
    logits = tempered(logits, temperature)
    return torch.log_softmax(logits, -1, out=logits)


def _dense_forward_kl(teacher: Tensor, student: Tensor, temperature: Temperature) -> tuple[Tensor, Tensor]:
    log_p, log_q = (_log_softmax_(logits, temperature) for logits in same_vocabulary(teacher, student))
    return _forward_kl(log_p, log_q, student.shape[-1])


def _forward_kl(ratio: Tensor, log_q: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Of log p (overwritten by log p/q) and log q (overwritten). The gradient is q - p, zero for the student's words beyond the vocabulary,
    up to `width`. A word that a side excludes costs nothing where p is zero."""
    p = ratio.exp()
    ratio -= log_q
    values = torch.linalg.vecdot(p, ratio)
    if values.isnan().any():  # 0 times infinity
        values = torch.linalg.vecdot(p, ratio.masked_fill_(p == 0, 0.0))
    slope = log_q.exp_().sub_(p)
    return values, pad(slope, (0, width - slope.shape[-1])) if slope.shape[-1] < width else slope


def log_leftover(head: Tensor) -> Tensor:
    """log(1 - sum exp head) over the last dimension, finite also where the head holds all the mass."""
    return torch.log(-torch.expm1(head.logsumexp(-1).clamp(max=-torch.finfo(head.dtype).eps)))


def same_vocabulary(a: Tensor, b: Tensor, vocabulary: int | None = None) -> tuple[Tensor, Tensor]:
    """Both logits cut to the true vocabulary (default: the smaller width), for models of one tokenizer with padded embeddings."""
    width = min(a.shape[-1], b.shape[-1], vocabulary or a.shape[-1])
    return a[..., :width], b[..., :width]


def _same_temperature(asked: Temperature, stored: float) -> None:
    if isinstance(asked, Tensor) or asked != stored:
        raise UserError(
            f"The teacher's signal was stored at temperature {stored:g} and cannot be read at another one (the loss asks for "
            f"{'one per row' if isinstance(asked, Tensor) else format(asked, 'g')}): capture it again at that temperature."
        )
