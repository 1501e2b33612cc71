"""Token KD: word-level, sequence-level and on-policy distillation of causal language models (Kim & Rush 2016, arXiv 1606.07947).

    word       ce_weight CE(y) + kd_weight D( p(.|y<t) || q(.|y<t) )   at every position of a fixed corpus
    sequence   cross-entropy on what the teacher writes after the corpus's prompts
    on-policy  with probability `own_text` of a step, kd_weight D on what the student itself just wrote, else a word-level step; no
               gradient through the writing, no labels from it (GKD, Agarwal et al. 2023, arXiv 2306.13649)

The teacher's distributions on a fixed corpus are captured once into a cache and read from there: the k likeliest words with the leftover
mass as one more, or sampled words, or its states. Logits are made a chunk of positions at a time and never held.

A student with another tokenizer learns, in word mode, from what both mean on the same bytes (`stillroom.lm.crosstok`): `byte-groups`, the
likelihoods of groups of tokens that cover the same bytes, or `uld`, the sorted probabilities where a group begins. ULD's paper compares the
t-th positions of both instead, whatever text they have reached.

Exact: losses, masks by predicted token, full-distribution divergences on-policy, end tokens trained once, one coin per step.
Shrunk: networks and data; the procedural language has 64 words, and sampling stands for beam search in sequence mode.
Ours: caches and their leftover word, byte groups, that uld compares where groups begin; a coin for a whole step, on all processes.
Left out: students that learn from a teacher's writing inside the on-policy loop (GKD's third source), reinforcement learning (MiniLLM).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from annotated_types import Interval
from torch import Tensor, nn

from stillroom.catalogue.claims import Claim
from stillroom.catalogue.idle import refuse_unread
from stillroom.core.config import Count, Natural, NonNegative, Positive, Share
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.data.sequences import BackCopy, Rows
from stillroom.lm.cache import Capture, TeacherCache, capture
from stillroom.lm.chunked import Chunked, chunked_loss
from stillroom.lm.crosstok import Paired, group_divergence, group_loss, require_same
from stillroom.lm.measure import measure
from stillroom.lm.output import OutputLayer, head, require_head
from stillroom.lm.settings import Corpus
from stillroom.lm.signals import Head, Signal, TopK
from stillroom.lm.teachers import fewer_layers, load_causal, save_causal
from stillroom.lm.text import continued, read_texts, states
from stillroom.lm.tokenizer import Characters, Known, fingerprint
from stillroom.lm.train import predicting, sft, taken
from stillroom.losses.divergences import jsd
from stillroom.losses.tokens import Divergence, Name, align
from stillroom.metrics.cost import parameters
from stillroom.metrics.modes import eval_mode
from stillroom.nets.decoder import Decoder

BASELINE = True


Open = Annotated[float, Interval(gt=0.0, lt=1.0)]


@dataclass(frozen=True)
class Config(Corpus):
    """Laptop defaults: a procedural language of which the student sees 256 sentences and the teacher has seen many thousands."""

    limit: Natural = 256
    """Training sequences of the student; 0: all of a file, 4096 of back-copy."""
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
    beta: Open = 0.5
    """Of jsd: the teacher's share of the mixture."""
    temperature: Positive = 1.0
    times_t2: bool = False
    """Multiply D by temperature^2, so that its gradient keeps its size (classical distillation does, language model libraries do not)."""
    signal: Literal["topk", "topk-cut", "sampled", "states", "full", "online", "byte-groups", "uld"] = "topk"
    """Where the teacher's word comes from; topk-cut drops the leftover mass (biased, for comparison), online asks it at every step.
    byte-groups and uld are for a student with another tokenizer."""
    signal_size: Count = 8
    """Words kept per token by topk and sampled."""
    ce_weight: NonNegative = 0.0
    kd_weight: NonNegative = 1.0
    own_text: Share = 0.5
    """On-policy: the share of steps on the student's own text; the others are word-level."""
    writings: Count = 8
    """Sequence mode: texts that the teacher writes after each prompt; unlike the corpus they cost no one's labour."""
    sampling_temperature: Positive = 1.0
    """Of who writes: the teacher in sequence mode, the student on-policy."""
    max_new_tokens: Natural = 0
    """Longest writing, the student's in the metrics too; 0: up to `length`."""
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
    "on-policy": {"mode": "on-policy", "signal": "online"},
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
    Claim("on its own text, the student trained there is closer to the teacher", "own_kl", "on-policy", "word, online", "lower",
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
    check_flags(cfg)
    for who, given in (("teacher", teacher), ("student", student)):  # those that are loaded by name are compared there
        if given is not None:
            require_head(given[0] if isinstance(given, tuple) else given, f"The {who}")
    model, tokenizer = teacher or find_teacher(cfg, run)
    model = run.frozen(model)
    if student is None:
        student = find_student(cfg, model, tokenizer, run.seed)
    student, own = student if isinstance(student, tuple) else (student, tokenizer)
    pairs = corpus_pairs(cfg, model, tokenizer, own, run.seed) if crosses(cfg, own, tokenizer) else None
    train, test = (pairs[0].student, pairs[1].student) if pairs else cfg.rows(tokenizer, run.seed)
    for who, net in (("student", student),) if pairs else (("teacher", model), ("student", student)):
        if (room := context(net, cfg.length)) < train.ids.shape[1]:
            raise UserError(f"Sequences of {train.ids.shape[1]} tokens exceed the {who}'s context of {room}: lower --length.")
    exact = None if pairs else capture(run.store.folder, model, tokenizer, test.lists(), Capture("states"), progress=run.progress)
    if cfg.mode == "sequence":
        train = written(cfg, run, model, tokenizer, train)
    keep = lambda kind, part: capture(run.store.folder, model, tokenizer, part.teacher.lists(), Capture(kind), progress=run.progress)
    cache = keep("states" if cfg.signal == "uld" else "text", pairs[0]) if pairs and cfg.kd_weight else None
    across = group_loss(cache, pairs[0], cfg.ce_weight, cfg.kd_weight, cfg.temperature) if pairs else None
    signal, cache = (lambda index, batch: None, cache) if pairs else corpus_signal(cfg, run, model, tokenizer, train)

    net, optimizer = run.trainable("student", student, cfg.optimizer)
    for step in run.steps(cfg.steps):
        index, batch = taken(run, train, cfg.batch_size, step)
        own_text = cfg.mode == "on-policy" and bool(torch.rand((), generator=run.common) < cfg.own_text)
        if own_text:
            writer, budget = run.unwrap(net), longest(cfg, batch)
            batch = continued(writer, tokenizer, batch.prompts(), max_new_tokens=budget, temperature=cfg.sampling_temperature)
        teacher_signal = online(model, batch) if own_text else signal(index, batch)
        rows = predicting(run, net, batch)
        out = across(*rows, index) if across else token_loss(cfg, *rows, teacher_signal, own_text=own_text)
        run.update(optimizer, out.loss, count=out.tokens)
        run.log(ce=out.ce, kd=out.kd)

    net = run.unwrap(net)
    metrics = measure(net, test, exact)
    if pairs:
        metrics["group_kl"] = group_divergence(net, keep("text", pairs[1]), pairs[1])
    run.row("teacher", **measure(model, pairs[1].teacher if pairs else test), parameters=parameters(model))
    run.row("student", **metrics, parameters=parameters(net))
    if not pairs:
        metrics["own_kl"] = own_divergence(cfg, run, net, model, tokenizer, test)
        place = int((test.lengths.max() - 1) // 2)
        run.figure("one position", lambda axes: draw_position(axes, model, net, test, place, tokenizer))
    if cache is not None:
        metrics["bytes_per_token"] = cache.bytes_per_token
    run.save_student(net, lambda whole, folder: save_causal(whole, own, folder))
    return metrics


def token_loss(
    cfg: Config, hidden: Tensor, layer: OutputLayer | Tensor, labels: Tensor, signal: Signal | None, *, own_text: bool = False
) -> Chunked:
    """ce_weight CE + kd_weight D, a mean over trained tokens, of the aligned states (N, d) of a batch. Cross-entropy alone in sequence
    mode, the divergence alone on the student's own text: its words are samples, not labels."""
    kind: Divergence = partial(jsd, beta=cfg.beta) if cfg.kind == "jsd" else cfg.kind
    ce_weight = 1.0 if cfg.mode == "sequence" else 0.0 if own_text else cfg.ce_weight
    return chunked_loss(
        hidden, layer, labels, signal, ce_weight=ce_weight, kd_weight=cfg.kd_weight, kind=kind, temperature=cfg.temperature,
        times_t2=cfg.times_t2,
    )  # fmt: skip


def check_flags(cfg: Config) -> None:
    """UserError for a flag that the mode and the others leave without effect."""
    if not (cfg.kd_weight or (cfg.ce_weight and cfg.mode != "on-policy") or cfg.mode == "sequence"):
        raise UserError("Nothing would be learned: on-policy needs a --kd-weight, word mode that or a --ce-weight.", code=2)
    soft = ("kind", "temperature", "signal")
    idle: dict[str, str] = {}
    if cfg.mode == "sequence":
        idle |= dict.fromkeys((*soft, "ce_weight", "kd_weight"), "in sequence mode the teacher's text is learned by cross-entropy")
    elif not cfg.kd_weight:
        idle |= dict.fromkeys(soft, "--kd-weight is 0")
    elif cfg.signal in ("byte-groups", "uld"):
        idle |= {"kind": f"--signal {cfg.signal} has a divergence of its own"}
    if cfg.mode == "word":
        idle |= {"sampling_temperature": "in word mode nobody writes"}
    if cfg.mode == "on-policy" and cfg.own_text == 1:
        idle |= dict.fromkeys(("ce_weight", "signal"), "with --own-text 1 no step reads the corpus")
    if cfg.mode != "on-policy":
        idle |= {"own_text": "it belongs to --mode on-policy"}
    if cfg.mode != "sequence":
        idle |= {"writings": "it belongs to --mode sequence"}
    if cfg.signal not in ("topk", "topk-cut", "sampled") or "signal" in idle:
        idle |= {"signal_size": "it belongs to the signals topk, topk-cut and sampled"}
    if cfg.kind != "jsd":
        idle |= {"beta": "it belongs to --kind jsd"}
    if cfg.temperature == 1:
        idle |= {"times_t2": "--temperature is 1"}
    if cfg.teacher != "small":
        idle |= dict.fromkeys(("teacher_width", "teacher_layers", "teacher_optimizer", "tokenizer"), f"{cfg.teacher} is taken as it is")
    if cfg.student.partition(":")[0] not in ("small", "pairs"):
        idle |= dict.fromkeys(("student_width", "student_layers"), f"{cfg.student} has its own size")
    refuse_unread(cfg, idle)


# -- text --------------------------------------------------------------------------------------------------------------------------
def corpus_pairs(cfg: Config, teacher: nn.Module, tokenizer: Any, own: Any, seed: int) -> tuple[Paired, Paired]:
    """The same training and test texts under the teacher's tokenizer and the student's own; cut to `length` of the student's tokens."""
    if cfg.procedural:
        train, test = ([tokenizer.decode(ids) for ids in rows.lists()] for rows in cfg.rows(tokenizer, seed))
    else:
        train, test = cfg.parted(lambda path: read_texts(path, own, cfg.length), lambda texts, part: texts[part])
    room = context(teacher, 2**30)
    return Paired.of(tokenizer, own, train, cfg.length, room), Paired.of(tokenizer, own, test, cfg.length, room)


def context(net: nn.Module, otherwise: int) -> int:
    """Tokens that a network can read, where it says so."""
    return getattr(getattr(net, "config", None), "max_position_embeddings", otherwise)


# -- networks ----------------------------------------------------------------------------------------------------------------------
def find_teacher(cfg: Config, run: Run) -> tuple[nn.Module, Any]:
    """A pretrained teacher as it is, or a small one trained on fresh sentences (or on the whole text), once for all runs alike."""
    if cfg.teacher != "small":
        return load_causal(cfg.teacher, store=run.store)
    tokenizer = cfg.words()
    sizes = (cfg.teacher_width, cfg.teacher_layers, cfg.teacher_steps, cfg.teacher_optimizer, cfg.batch_size)
    with run.stage("teacher", shared=(train_teacher, cfg.decides(), Known(tokenizer), sizes)) as stage:
        return train_teacher(stage, cfg, tokenizer), tokenizer


def train_teacher(stage: Run, cfg: Config, tokenizer: Any) -> nn.Module:
    net, optimizer = stage.trainable("teacher", Decoder(len(tokenizer), cfg.teacher_width, cfg.teacher_layers, 2), cfg.teacher_optimizer)
    if not cfg.procedural:
        sft(stage, net, optimizer, replace(cfg, limit=0).rows(tokenizer, 0)[0], cfg.teacher_steps, cfg.batch_size)
        return stage.unwrap(net)
    for _ in stage.steps(cfg.teacher_steps):
        batch = Rows.plain(BackCopy().draw(cfg.batch_size, cfg.length))
        stage.update(optimizer, ce=chunked_loss(*predicting(stage, net, batch), ce_weight=1.0).loss)
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
        own = tokenizer.with_pairs(cfg.rows(tokenizer, seed)[0].lists(), int(rest))
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


# -- what the teacher says ---------------------------------------------------------------------------------------------------------
def corpus_signal(
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
        found = cache.signal(index.tolist(), width=batch.ids.shape[1], device=run.device)
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
    found = run.cached("teacher-text", write, teacher, Known(tokenizer), prompts, longest(cfg, train), cfg.sampling_temperature, run.seed)
    return Rows(found["ids"].cpu(), found["labels"].cpu(), found["lengths"].cpu())


def write(teacher: nn.Module, known: Known, prompts: list[list[int]], budget: int, temperature: float, seed: int) -> dict[str, Tensor]:
    draws = torch.Generator(next(teacher.parameters()).device).manual_seed(seed)
    rows = continued(teacher, known.tokenizer, prompts, max_new_tokens=budget, temperature=temperature, generator=draws)
    return {"ids": rows.ids, "labels": rows.labels, "lengths": rows.lengths}


def longest(cfg: Config, rows: Rows) -> int:
    return cfg.max_new_tokens or max(1, cfg.length - max(map(len, rows.prompts())))


# -- metrics -----------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def own_divergence(cfg: Config, run: Run, net: nn.Module, teacher: nn.Module, tokenizer: Any, test: Rows) -> float:
    """Reverse KL per token on text that the student writes after test prompts: how far it strays where it is used."""
    prompts = test.take(slice(0, 128 if cfg.procedural else 4)).prompts()
    draws = torch.Generator(run.device).manual_seed(run.seed)
    batch = continued(net, tokenizer, prompts, max_new_tokens=min(longest(cfg, test), 64), generator=draws)
    with eval_mode(net):
        hidden, labels = align(states(net, batch), batch.labels.to(run.device))
        return float(chunked_loss(hidden, head(net), labels, online(teacher, batch), kind="reverse_kl").kd)


@torch.no_grad()
def draw_position(axes: Any, teacher: nn.Module, student: nn.Module, test: Rows, place: int, tokenizer: Any) -> None:
    """The twelve likeliest next words of the teacher at one test position, beside the student's."""
    row = test.take(slice(0, 1))
    p, q = (head(net).logits(states(net, row)[0, place : place + 1]).softmax(-1)[0].cpu() for net in (teacher, student))
    words = p[: len(tokenizer)].topk(12).indices
    spots = range(len(words))
    axes.bar([x - 0.2 for x in spots], p[words].tolist(), 0.4, label="teacher")
    axes.bar([x + 0.2 for x in spots], q[words].tolist(), 0.4, label="student")
    names = [str(w) if isinstance(tokenizer, Characters) else repr(tokenizer.decode([w]))[1:-1] for w in words.tolist()]
    axes.set_xticks(list(spots), names, rotation=60, fontsize=8)
    axes.set(ylabel="probability", title=f"next word after {place + 1} tokens of the first test row")
    axes.legend()
