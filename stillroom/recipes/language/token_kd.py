"""Token KD: word-level, sequence-level and on-policy distillation of causal language models (Kim & Rush 2016, arXiv 1606.07947).

    word       ce_weight CE(y) + kd_weight D( p(.|y<t) || q(.|y<t) )   at every position of a fixed corpus
    sequence   cross-entropy on what the teacher writes after the corpus's prompts
    on-policy  with probability `own_text` of a step, D on what the student itself just wrote; no gradient through the writing
               (GKD, Agarwal et al. 2023, arXiv 2306.13649)

The teacher's word on a fixed corpus is captured once into a cache and read from there: the k likeliest words with the leftover mass as
one more, or sampled words, or its states. Logits are made a chunk of positions at a time and never held.

A student with another tokenizer learns, in word mode, from what both mean on the same bytes (`stillroom.lm.crosstok`): `byte-groups`, the
likelihoods of groups of tokens that cover the same bytes, or `uld`, the sorted probabilities where a group begins. ULD's paper compares the
t-th positions of both instead, whatever text they have reached.

Exact: losses, masks by predicted token, full-distribution divergences on-policy, end tokens trained once. Shrunk: networks and data.
Students are saved for `from_pretrained` of their own library.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom.catalogue.claims import Claim
from stillroom.core.config import Count, Natural, NonNegative, Positive, Share
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.data.sequences import BackCopy, Rows, shuffled
from stillroom.lm.cache import Capture, TeacherCache, capture
from stillroom.lm.chunked import chunked_loss
from stillroom.lm.crosstok import Paired, group_divergence, group_loss, require_same
from stillroom.lm.signals import Head, Signal, TopK
from stillroom.lm.teachers import fewer_layers, load_causal, save_causal
from stillroom.lm.text import continued, head, read_rows, read_texts, states
from stillroom.lm.tokenizer import Characters, Known, fingerprint
from stillroom.losses.tokens import Name, align
from stillroom.metrics.modes import eval_mode
from stillroom.nets.decoder import Decoder

BASELINE = True


@dataclass(frozen=True)
class Config:
    """Laptop defaults: a procedural language of which the student sees 256 sentences and the teacher has seen many thousands."""

    data: str = "back-copy"
    """back-copy, a text file, or JSON lines of chats ({"messages": ...}) or of {"question", "answer"}."""
    test: str = ""
    """A file of test text; default: the last twentieth of `data`."""
    length: Count = 32
    """Tokens per sequence; longer ones are cut."""
    limit: Natural = 256
    """Training sequences of the student; 0: all."""
    test_limit: Natural = 256
    teacher: str = "small"
    """small is trained first; hf:ID-or-folder, gguf:FILE-or-package and run:FOLDER are taken as they are."""
    teacher_width: Count = 64
    teacher_layers: Count = 2
    teacher_steps: Count = 500
    teacher_optimizer: Optimizer = Optimizer("adamw", 5e-3, weight_decay=0.1, beta2=0.95, schedule="cosine", warmup=50, clip=1.0)
    student: str = "small"
    """small, hf:ID-or-folder, layers:N for N of the teacher's layers, started from it, or pairs:N, a small one whose tokenizer has the N
    commonest pairs of the teacher's words as well."""
    student_width: Count = 32
    student_layers: Count = 1
    mode: Literal["word", "sequence", "on-policy"] = "word"
    kind: Name = "forward_kl"
    """The divergence D."""
    signal: Literal["topk", "topk-cut", "sampled", "states", "full", "online", "byte-groups", "uld"] = "topk"
    """Where the teacher's word comes from; topk-cut drops the leftover mass (biased, for comparison), online asks it at every step.
    byte-groups and uld are for a student with another tokenizer."""
    signal_size: Count = 8
    """Words kept per token by topk and sampled."""
    temperature: Positive = 1.0
    ce_weight: NonNegative = 0.0
    kd_weight: NonNegative = 1.0
    own_text: Share = 0.5
    """On-policy: the share of steps on the student's own text; the others are word-level."""
    writings: Count = 8
    """Sequence mode: texts that the teacher writes after each prompt; unlike the corpus they cost no one's labour."""
    sampling_temperature: Positive = 1.0
    max_new_tokens: Natural = 0
    """Longest writing of the sequence and on-policy modes; 0: up to `length`."""
    steps: Count = 600
    batch_size: Count = 32
    optimizer: Optimizer = Optimizer("adamw", 5e-3, weight_decay=0.1, beta2=0.95, schedule="cosine", warmup=50, clip=1.0)


def full() -> Config:
    """A chat model into a quarter of its layers, word by word; give `--data` a file of chats."""
    return Config(
        data="chats.jsonl", length=1024, limit=0, teacher="hf:HuggingFaceTB/SmolLM2-1.7B-Instruct", student="layers:6", signal_size=64,
        ce_weight=0.1, kd_weight=0.9, steps=20_000, batch_size=64,
        optimizer=Optimizer("adamw", 2e-4, weight_decay=0.01, beta2=0.95, schedule="cosine", warmup=500, clip=1.0),
    )  # fmt: skip


TINY = {"teacher_steps": 4, "steps": 4}
ARMS = {
    "plain": {"kd_weight": 0.0, "ce_weight": 1.0},
    "word": {},
    "word, online": {"signal": "online"},
    "word, cut": {"signal": "topk-cut"},
    "word, sampled": {"signal": "sampled", "signal_size": 12},
    "sequence": {"mode": "sequence"},
    "on-policy": {"mode": "on-policy"},
    "other tokens, plain": {"student": "pairs:64", "kd_weight": 0.0, "ce_weight": 1.0},
    "other tokens, byte groups": {"student": "pairs:64", "signal": "byte-groups"},
    "other tokens, uld": {"student": "pairs:64", "signal": "uld", "ce_weight": 1.0},
}
CLAIMS = [
    Claim("a teacher's distributions on the same few sentences make a better language model", "nll", "word", "plain", "lower"),
    Claim("the leftover mass matters: cutting the cache to its k words leaves the student further from the teacher",
          "kl", "word", "word, cut", "lower"),
    Claim("8 words and their leftover serve as well as all words, within 0.05 nats", "nll", "word", "word, online", "lower", -0.05),
    Claim("a dozen sampled words are unbiased: closer to the teacher than 8 words cut off", "kl", "word, sampled", "word, cut", "lower"),
    Claim("text that the teacher writes is worth more than the few sentences", "nll", "sequence", "plain", "lower"),
    Claim("on its own text, the student trained there is closer to the teacher", "own_kl", "on-policy", "word", "lower",
          paper="GKD beats supervised KD on XSum, WMT and GSM8K"),
    Claim("to a student with another tokenizer, the teacher's likelihoods of groups of bytes are worth more than the few sentences",
          "nll", "other tokens, byte groups", "other tokens, plain", "lower"),
    Claim("so are its sorted probabilities beside the sentences", "nll", "other tokens, uld", "other tokens, plain", "lower"),
]  # fmt: skip


def main(
    cfg: Config, run: Run, *, teacher: tuple[nn.Module, Any] | None = None, student: nn.Module | tuple[nn.Module, Any] | None = None
) -> dict[str, float]:
    """Teacher, cache, student, metrics. `teacher` (a model and its tokenizer) and `student` (a model, and its tokenizer if it has another)
    replace what the config names."""
    model, tokenizer = teacher or find_teacher(cfg, run)
    model = run.frozen(model)
    if student is None:
        student = find_student(cfg, model, tokenizer, run.seed)
    student, own = student if isinstance(student, tuple) else (student, tokenizer)
    pairs = corpus_pairs(cfg, model, tokenizer, own, run.seed) if crosses(cfg, own, tokenizer) else None
    train, test = (pairs[0].student, pairs[1].student) if pairs else corpus(cfg, tokenizer, run.seed)
    for who, net in (("student", student),) if pairs else (("teacher", model), ("student", student)):
        if (room := context(net, cfg.length)) < train.ids.shape[1]:
            raise UserError(f"Sequences of {train.ids.shape[1]} tokens exceed the {who}'s context of {room}: lower --length.")
    exact = None if pairs else capture(run.store.folder, model, tokenizer, test.lists(), Capture("states"), progress=run.progress)
    if cfg.mode == "sequence":
        train = written(cfg, run, model, tokenizer, train)
    keep = lambda kind, part: capture(run.store.folder, model, tokenizer, part.teacher.lists(), Capture(kind), progress=run.progress)
    said = keep("states" if cfg.signal == "uld" else "text", pairs[0]) if pairs and cfg.kd_weight else None
    across = group_loss(said, pairs[0], cfg.ce_weight, cfg.kd_weight, cfg.temperature) if pairs else None
    signal, cache = (lambda index, batch: None, said) if pairs else word_signal(cfg, run, model, tokenizer, train)

    net, optimizer = run.trainable("student", student, cfg.optimizer)
    started, seen = time.monotonic(), 0
    for step in run.steps(cfg.steps):
        index = run.shard(shuffled(len(train), cfg.batch_size, run.seed, step))
        batch = train.take(index.cpu())
        if cfg.mode == "on-policy" and torch.rand(()) < cfg.own_text:
            writer, prompts = run.unwrap(net), batch.prompts()
            batch = continued(writer, tokenizer, prompts, max_new_tokens=longest(cfg, batch), temperature=cfg.sampling_temperature)
            teacher_says: Signal | None = online(model, batch)
        else:
            teacher_says = signal(index, batch)
        hidden, labels = align(states(net, batch), batch.labels.to(run.device))
        out = across(hidden, head(run.unwrap(net)), labels, index) if across else chunked_loss(
            hidden, head(run.unwrap(net)), labels, teacher_says, ce_weight=1.0 if cfg.mode == "sequence" else cfg.ce_weight,
            kd_weight=cfg.kd_weight, kind=cfg.kind, temperature=cfg.temperature,
        )  # fmt: skip
        count = out.tokens.clamp(min=1)
        run.update(optimizer, loss=(out.loss * count)[None], count=count)
        run.log(ce=out.ce, kd=out.kd)
        seen += int(count)
    speed = seen / max(time.monotonic() - started, 1e-9)

    net = run.unwrap(net)
    metrics = measure(net, test, exact)
    if pairs:
        metrics["group_kl"] = group_divergence(net, keep("text", pairs[1]), pairs[1])
    run.row("teacher", **measure(model, pairs[1].teacher if pairs else test), parameters=parameters(model))
    run.row("student", **metrics, parameters=parameters(net), tokens_per_second=speed)
    if not pairs:
        metrics["own_kl"] = own_divergence(cfg, run, net, model, tokenizer, test)
        place = int((test.lengths.max() - 1) // 2)
        run.figure("one position", lambda axes: draw_position(axes, model, net, test, place, tokenizer))
    if cache is not None:
        metrics["bytes_per_token"] = cache.bytes_per_token
    run.save_student(net, lambda whole, folder: save_causal(whole, own, folder))
    return metrics


# -- text --------------------------------------------------------------------------------------------------------------------------
def corpus(cfg: Config, tokenizer: Any, seed: int) -> tuple[Rows, Rows]:
    """Training and test rows under the teacher's tokenizer."""
    if cfg.data == "back-copy":
        draw = lambda count, first: Rows.plain(BackCopy().draw(count, cfg.length, torch.Generator().manual_seed(first + seed)))
        return draw(cfg.limit or 4096, 20_000), draw(cfg.test_limit or 512, 10_000)
    train, test = parted(cfg, lambda path: read_rows(path, tokenizer, cfg.length), lambda rows, part: rows.take(part))
    return train, test


def corpus_pairs(cfg: Config, teacher: nn.Module, tokenizer: Any, own: Any, seed: int) -> tuple[Paired, Paired]:
    """The same training and test texts under the teacher's tokenizer and the student's own; cut to `length` of the student's tokens."""
    if cfg.data == "back-copy":
        train, test = ([tokenizer.decode(ids) for ids in rows.lists()] for rows in corpus(cfg, tokenizer, seed))
    else:
        train, test = parted(cfg, lambda path: read_texts(path, own, cfg.length), lambda texts, part: texts[part])
    room = context(teacher, 2**30)
    return Paired.of(tokenizer, own, train, cfg.length, room), Paired.of(tokenizer, own, test, cfg.length, room)


def parted(cfg: Config, read: Callable[[str], Any], take: Callable[[Any, slice], Any]) -> tuple[Any, Any]:
    """Training and test part of `data`, or of `data` and `test`."""
    train, test = read(cfg.data), read(cfg.test) if cfg.test else None
    if test is None:
        held = max(1, len(train) // 20)
        train, test = take(train, slice(0, -held)), take(train, slice(-held, None))
    return take(train, slice(0, cfg.limit or None)), take(test, slice(0, cfg.test_limit or None))


def context(net: nn.Module, otherwise: int) -> int:
    """Tokens that a network can read, where it says so."""
    return getattr(getattr(net, "config", None), "max_position_embeddings", otherwise)


# -- networks ----------------------------------------------------------------------------------------------------------------------
def find_teacher(cfg: Config, run: Run) -> tuple[nn.Module, Any]:
    """A pretrained teacher as it is, or a small one trained on fresh sentences (or on the whole text), once for all runs alike."""
    if cfg.teacher != "small":
        return load_causal(cfg.teacher, store=run.store)
    inputs = (train_teacher, replace(cfg, **{k: getattr(Config(), k) for k in STUDENT_ONLY}), BackCopy.draw)
    tokenizer = small_tokenizer(cfg)
    with run.stage("teacher", shared=inputs) as stage:
        return train_teacher(stage, cfg, tokenizer), tokenizer


STUDENT_ONLY = (
    "limit", "test_limit", "student", "student_width", "student_layers", "mode", "kind", "signal", "signal_size", "temperature",
    "ce_weight", "kd_weight", "own_text", "writings", "sampling_temperature", "max_new_tokens", "steps", "optimizer",
)  # fmt: skip


def small_tokenizer(cfg: Config) -> Characters:
    if cfg.data == "back-copy":
        return Characters("".join(chr(0x4E00 + i) for i in range(BackCopy().words - 2)), symbols=())
    if not Path(cfg.data).is_file():
        raise UserError(f"{cfg.data}: there is no such file; give back-copy or a text file.")
    return Characters(Path(cfg.data).read_text(encoding="utf-8"))


def train_teacher(stage: Run, cfg: Config, tokenizer: Characters) -> nn.Module:
    net, optimizer = stage.trainable("teacher", Decoder(len(tokenizer), cfg.teacher_width, cfg.teacher_layers, 2), cfg.teacher_optimizer)
    rows = None if cfg.data == "back-copy" else corpus(replace(cfg, limit=0), tokenizer, 0)[0]
    for step in stage.steps(cfg.teacher_steps):
        batch = (
            Rows.plain(BackCopy().draw(cfg.batch_size, cfg.length))
            if rows is None
            else rows.take(shuffled(len(rows), cfg.batch_size, stage.seed, step))
        )
        hidden, labels = align(states(net, batch), batch.labels.to(stage.device))
        out = chunked_loss(hidden, head(stage.unwrap(net)), labels, ce_weight=1.0)
        stage.update(optimizer, ce=out.loss)
    return stage.unwrap(net)


def find_student(cfg: Config, teacher: nn.Module, tokenizer: Any, seed: int) -> tuple[nn.Module, Any]:
    """A student and its tokenizer."""
    kind, _, rest = cfg.student.partition(":")
    if kind == "small":
        return Decoder(len(tokenizer), cfg.student_width, cfg.student_layers, 2), tokenizer
    if kind == "layers" and rest.isdigit():
        return fewer_layers(teacher, int(rest)), tokenizer
    if kind == "pairs" and rest.isdigit():
        if not isinstance(tokenizer, Characters):
            raise UserError("--student pairs:N is for small teachers: give a student with its own tokenizer by hf:ID-or-folder.")
        own = tokenizer.with_pairs(corpus(cfg, tokenizer, seed)[0].lists(), int(rest))
        return Decoder(len(own), cfg.student_width, cfg.student_layers, 2), own
    return load_causal(cfg.student)


def crosses(cfg: Config, own: Any, tokenizer: Any) -> bool:
    """Whether teacher and student each read the text their own way. UserError when that is needed and was not asked for, or cannot be."""
    asked, same = cfg.signal in ("byte-groups", "uld"), fingerprint(own) == fingerprint(tokenizer)
    if cfg.mode != "word" or not (asked or not cfg.kd_weight):
        require_same(own, tokenizer)
    if asked and cfg.mode != "word":
        raise UserError(f"--signal {cfg.signal} compares both models on a fixed text: give --mode word.")
    if cfg.signal == "byte-groups" and cfg.temperature != 1:
        raise UserError("--signal byte-groups compares likelihoods of text, which have no temperature: leave --temperature at 1.")
    if cfg.signal == "uld" and cfg.kd_weight and not cfg.ce_weight:
        raise UserError("--signal uld says how sure the teacher is and never of what: give --ce-weight too.")
    return asked or not same


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


# -- the teacher's word ------------------------------------------------------------------------------------------------------------
def word_signal(
    cfg: Config, run: Run, teacher: nn.Module, tokenizer: Any, train: Rows
) -> tuple[Callable[[Tensor, Rows], Signal | None], TeacherCache | None]:
    """`signal(index, batch)` for word-level steps, and the cache that it reads, if any."""
    if not cfg.kd_weight or cfg.mode == "sequence":
        return lambda index, batch: None, None
    if cfg.signal == "online":
        return lambda index, batch: online(teacher, batch), None
    kind: Any = "topk" if cfg.signal == "topk-cut" else cfg.signal
    bound = cfg.temperature if kind in ("topk", "sampled") else 1.0
    what = Capture(kind, cfg.signal_size, bound, seed=run.seed)
    cache = capture(run.store.folder, teacher, tokenizer, train.lists(), what, progress=run.progress)

    def signal(index: Tensor, batch: Rows) -> Signal:
        found = cache.signal(index.tolist(), width=batch.ids.shape[1])
        if cfg.signal == "topk-cut" and isinstance(found, TopK):
            return TopK(found.ids, found.log_probs, torch.full_like(found.log_tail, -torch.inf), found.temperature)
        return found

    return signal, cache


@torch.no_grad()
def online(teacher: nn.Module, batch: Rows) -> Head:
    hidden = states(teacher, batch)[:, :-1]
    return Head(hidden.reshape(-1, hidden.shape[-1]), head(teacher))


def written(cfg: Config, run: Run, teacher: nn.Module, tokenizer: Any, train: Rows) -> Rows:
    """What the teacher writes after each training prompt: the corpus of sequence-level distillation, kept in the store."""
    prompts = train.prompts() * cfg.writings
    found = run.cached("teacher-text", write, teacher, Known(tokenizer), prompts, longest(cfg, train), run.seed)
    return Rows(found["ids"].cpu(), found["labels"].cpu(), found["lengths"].cpu())


def write(teacher: nn.Module, known: Known, prompts: list[list[int]], budget: int, seed: int) -> dict[str, Tensor]:
    draws = torch.Generator(next(teacher.parameters()).device).manual_seed(seed)
    rows = continued(teacher, known.tokenizer, prompts, max_new_tokens=budget, generator=draws)
    return {"ids": rows.ids, "labels": rows.labels, "lengths": rows.lengths}


def longest(cfg: Config, rows: Rows) -> int:
    return cfg.max_new_tokens or max(1, cfg.length - max(map(len, rows.prompts())))


# -- metrics -----------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def measure(net: nn.Module, test: Rows, teacher: TeacherCache | None = None) -> dict[str, float]:
    """nll and perplexity per trained token of the whole test set, and the KL divergence from the teacher there."""
    ce = kd = count = 0.0
    with eval_mode(net):
        for first in range(0, len(test), 16):
            batch = test.take(slice(first, first + 16))
            hidden, labels = align(states(net, batch), batch.labels.to(next(net.parameters()).device))
            signal = teacher.signal(range(first, first + len(batch)), width=batch.ids.shape[1]) if teacher else None
            out = chunked_loss(hidden, head(net), labels, signal, ce_weight=1.0)
            tokens = float(out.tokens)
            ce, kd, count = ce + float(out.ce) * tokens, kd + float(out.kd) * tokens, count + tokens
    found = {"nll": ce / count, "perplexity": math.exp(min(ce / count, 50))}
    return found | ({"kl": kd / count} if teacher else {})


@torch.no_grad()
def own_divergence(cfg: Config, run: Run, net: nn.Module, teacher: nn.Module, tokenizer: Any, test: Rows) -> float:
    """Reverse KL per token on text that the student writes after test prompts: how far it strays where it is used."""
    prompts = test.take(slice(0, 128 if cfg.data == "back-copy" else 4)).prompts()
    draws = torch.Generator(run.device).manual_seed(run.seed)
    batch = continued(net, tokenizer, prompts, max_new_tokens=min(longest(cfg, test), 64), generator=draws)
    with eval_mode(net):
        hidden, labels = align(states(net, batch), batch.labels.to(run.device))
        return float(chunked_loss(hidden, head(net), labels, online(teacher, batch), kind="reverse_kl").kd)


@torch.no_grad()
def draw_position(axes: Any, teacher: nn.Module, student: nn.Module, test: Rows, place: int, tokenizer: Any) -> None:
    """The twelve likeliest next words of the teacher at one test position, beside the student's."""
    row = test.take(slice(0, 1))
    device = next(student.parameters()).device
    p, q = ((states(net, row)[0, place] @ head(net).T).softmax(-1).to(device) for net in (teacher, student))
    words = p[: len(tokenizer)].topk(12).indices
    spots = range(len(words))
    axes.bar([x - 0.2 for x in spots], p[words].tolist(), 0.4, label="teacher")
    axes.bar([x + 0.2 for x in spots], q[words].tolist(), 0.4, label="student")
    names = [str(int(w)) if isinstance(tokenizer, Characters) else repr(tokenizer.decode([int(w)]))[1:-1] for w in words]
    axes.set_xticks(list(spots), names, rotation=60, fontsize=8)
    axes.set(ylabel="probability", title=f"next word after {place + 1} tokens of the first test row")
    axes.legend()
