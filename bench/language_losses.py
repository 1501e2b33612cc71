"""Ratios of the language floor: `python bench/language_losses.py [memory|peers|distillkit|cache|kinds]`, all five by default.

memory      chunked loss against the naive computation at 4,096 tokens x 49,152 words: peak memory and CPU time, each in its own process
peers       the same divergence and gradient from TRL's chunked loss and Liger's torch losses, where they are installed
distillkit  bytes, error and time of our caches and of DistillKit's compression, and both sparse losses, where it is installed
cache       training steps from a teacher cache against an online teacher and against plain training
kinds       bytes per token and error of the loss of every kind of cache on a peaked teacher
Seconds are CPU seconds of one thread and contenders take turns, so that a busy machine distorts ratios little.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from install_peers import python_of
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from stillroom.data.sequences import Rows
from stillroom.lm.cache import Capture, _columns, _columns_of, capture
from stillroom.lm.chunked import chunked_loss
from stillroom.lm.output import head
from stillroom.lm.signals import Head, Sampled, TopK, log_leftover
from stillroom.lm.text import states
from stillroom.lm.tokenizer import Characters
from stillroom.losses.tokens import align, divergence, token_mean
from stillroom.nets.decoder import Decoder


def inputs(tokens: int, words: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, width, requires_grad=True), (torch.randn(words, width) / width**0.5).requires_grad_()
    return hidden, weight, torch.randn(tokens, width), torch.randn(words, width) / width**0.5, torch.randint(words, (tokens,))


def naive(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
    logits = linear(hidden, weight)
    with torch.no_grad():
        wanted = linear(teacher, teacher_weight)
    return 0.5 * cross_entropy(logits, labels) + 0.5 * token_mean(divergence(wanted, logits), labels)


def chunked(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
    return chunked_loss(hidden, weight, labels, Head(teacher, teacher_weight), ce_weight=0.5, kd_weight=0.5).loss


def one(way: str, tokens: int, words: int, width: int) -> None:
    """Print loss, CPU seconds and the growth of peak memory in MB of forward and backward."""
    given = inputs(tokens, words, width)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    loss = {"naive": naive, "chunked": chunked}[way](*given)
    loss.backward()
    seconds, peak = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(loss.item(), seconds, peak / 1024)


def memory(tokens: int = 4096, words: int = 49152, width: int = 576) -> None:
    found = {}
    for way in ("naive", "chunked"):
        command = [sys.executable, __file__, "one", way, str(tokens), str(words), str(width)]
        loss, seconds, peak = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        found[way] = (seconds, peak)
        print(f"{way:8s} loss {loss:.5f}  {seconds:6.1f} CPU s  peak memory +{peak:7.0f} MB")
    print(
        f"ratio chunked / naive: time {found['chunked'][0] / found['naive'][0]:.2f}, memory {found['chunked'][1] / found['naive'][1]:.3f}"
    )


def in_turn(calls: dict[str, Callable[[], Tensor]], leaves: tuple[Tensor, ...], rounds: int = 9) -> None:
    """Print loss, norm of the first leaf's gradient and median CPU seconds of forward and backward of every contender."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    found = {}
    for _ in range(rounds):
        for name, call in calls.items():
            for leaf in leaves:
                leaf.grad = None
            start = time.process_time()
            loss = call()
            loss.backward()
            seconds[name].append(time.process_time() - start)
            grad = leaves[0].grad
            found[name] = (loss.item(), 0.0 if grad is None else grad.norm().item())
    for name, (value, slope) in found.items():
        print(f"{name:40s} loss {value:9.5f}  gradient {slope:.6f}  {median(seconds[name]):.3f} CPU s")


def peers(tokens: int = 256, words: int = 32000, width: int = 256) -> None:
    hidden, weight, teacher, teacher_weight, labels = inputs(tokens, words, width)
    signal = Head(teacher, teacher_weight)
    for kind, beta in (("forward_kl", 0.0), ("jsd", 0.5)):
        dense = lambda kind=kind: divergence(linear(teacher, teacher_weight), linear(hidden, weight), kind).mean()
        ours = lambda kind=kind: chunked_loss(hidden, weight, labels, signal, kind=kind).loss
        calls = {f"stillroom {kind}": ours, f"by hand {kind}": dense}
        try:
            from trl.experimental.gkd import GKDTrainer

            calls[f"TRL generalized_jsd_loss {beta}"] = lambda beta=beta: GKDTrainer.generalized_jsd_loss(
                linear(hidden, weight)[None], linear(teacher, teacher_weight)[None], labels[None], beta=beta
            )
        except ImportError as missing:
            print(f"TRL left out: {missing}")
        try:
            from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

            jsd = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)
            calls[f"Liger chunked JSD {beta}"] = lambda jsd=jsd: _first(jsd(hidden, weight, teacher, teacher_weight, labels))
        except ImportError as missing:
            print(f"Liger left out: {missing}")
        in_turn(calls, (hidden, weight))


def _first(value: Tensor | tuple[Tensor, ...]) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def distillkit(tokens: int = 256, words: int = 32000, width: int = 256) -> None:
    """In DistillKit's own environment; the teacher's next words are Zipf-like, the error is that of the forward KL of a student."""
    try:
        from distillkit.compression import DistributionQuantizationConfig, LogprobCompressor
        from distillkit.lossfuncs.kl import MissingProbabilityHandling, sparse_kl_div
    except ImportError:
        python = python_of("distillkit")
        if sys.executable == python or not Path(python).exists():
            print("DistillKit not installed: python bench/install_peers.py distillkit")
            return
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        subprocess.run([python, __file__, "inside"], env=environment, check=True)
        return
    for power in (1.1, 2.0):
        log_probs = codecs(
            power, tokens, words, LogprobCompressor, DistributionQuantizationConfig, sparse_kl_div, MissingProbabilityHandling
        )
    hidden, weight, _, _, labels = inputs(tokens, words, width)
    values, ids = log_probs.topk(128)
    signal, calls = TopK(ids, values, log_leftover(values)), {}
    calls["stillroom 128 words and leftover"] = lambda: chunked_loss(hidden, weight, labels, signal).loss
    for missing in MissingProbabilityHandling:
        calls[f"DistillKit sparse KL 128, rest {missing.value}"] = lambda missing=missing: (
            sparse_kl_div(linear(hidden, weight)[None], ids[None], values[None], missing=missing) / tokens
        )
    in_turn(calls, (hidden, weight))


def codecs(power: float, tokens: int, words: int, compressor: Any, config: Any, sparse_kl: Any, rests: Any) -> Tensor:
    """Print size, error and times of both on a teacher whose next words' probabilities fall with rank^-power; return its log-probs."""
    torch.manual_seed(0)
    ranks = torch.stack([torch.randperm(words) for _ in range(tokens)]) + 1
    teacher = -power * ranks.log() + 0.5 * torch.randn(tokens, words)
    student = 0.8 * teacher + 0.5 * torch.randn(tokens, words)
    log_probs, truth = teacher.log_softmax(-1), divergence(teacher, student)
    entropy = -(log_probs.exp() * log_probs).sum(-1)

    def line(name: str, size: float, seconds: tuple[float, float], values: Tensor) -> None:
        gap = values - truth
        times = "/".join(f"{1e6 * s / tokens:.0f}" for s in seconds)
        print(f"{name:40s} {size:4.0f} bytes  mean error {gap.mean():+.4f}, per token {gap.abs().mean():.4f}  {times} us a token in/out")

    print(f"probability ~ rank^-{power}: forward KL {truth.mean():.4f}")
    shape = {"d": words, "exact_dtype": "bfloat16", "residual_bins": [], "delta_encoding": False}
    large = shape | {"k": 128, "exact_k": 16, "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"]}
    small = shape | {"k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]}
    for name, settings in {"recommended": large, "its t in [0, 1]": large | {"normalize_t": True}, "budget": small}.items():
        codec = compressor(config(**settings))
        packed, into = clocked(lambda codec=codec: codec.compress(log_probs[None]))
        (ids, values), out = clocked(lambda codec=codec, packed=packed: codec.decompress_to_sparse(packed))
        for missing in rests:
            loss = partial(sparse_kl, missing=missing)
            each = [loss(student[None, i : i + 1], ids[:, i : i + 1], values[:, i : i + 1].float()) for i in range(tokens)]
            size = sum(part.shape[-1] for part in packed.values())
            line(f"DistillKit {name}, rest {missing.value}", size, (into, out), torch.stack(each))
    for what in (Capture("topk", 73), Capture("topk", 26), Capture("sampled", 148), Capture("sampled", 54)):
        kind, size, draws = what.kind, what.size, torch.Generator().manual_seed(0)
        columns = _columns(what, words, 0)
        pack = lambda what=what, columns=columns, draws=draws: {
            key: values.numpy().astype(columns[key][0]).tobytes() for key, values in _columns_of(log_probs, what, draws).items()
        }
        stored, into = clocked(pack)
        read = lambda stored=stored, columns=columns: {
            key: torch.from_numpy(np.frombuffer(stored[key], dtype).reshape(tokens, n).astype(np.int64 if key == "ids" else np.float32))
            for key, (dtype, n) in columns.items()
        }
        got, out = clocked(read)
        if kind == "topk":
            found = TopK(got["ids"], got["log_probs"], got["log_tail"].squeeze(-1)).divergence(student, "forward_kl", 1.0)
        else:
            found = Sampled(got["ids"], torch.full(got["ids"].shape, 1 / size)).divergence(student, "forward_kl", 1.0) - entropy
        line(f"stillroom {kind} {size}", sum(map(len, stored.values())) / tokens, (into, out), found)

    return log_probs


def clocked(call: Callable[[], Any]) -> tuple[Any, float]:
    """A result, and the median CPU seconds of five calls."""
    seconds = []
    for _ in range(5):
        start = time.process_time()
        result = call()
        seconds.append(time.process_time() - start)
    return result, median(seconds)


def cache(steps: int = 30) -> None:
    torch.manual_seed(0)
    tokenizer = Characters("".join(chr(0x4E00 + i) for i in range(2000)), symbols=())
    teacher, rows = Decoder(len(tokenizer), 256, 6, 4), torch.randint(2, 2000, (64, 64))
    with tempfile.TemporaryDirectory() as folder:
        kept = capture(folder, teacher, tokenizer, rows, Capture("topk", 32), progress=False)

        def step(index: list[int], way: str) -> Tensor:
            batch = Rows.plain(rows[index])
            hidden, labels = align(states(student, batch), batch.labels)
            if way == "plain":
                return chunked_loss(hidden, head(student), labels, ce_weight=1.0).loss
            if way == "cache":
                return chunked_loss(hidden, head(student), labels, kept.signal(index)).loss
            with torch.no_grad():
                said = states(teacher, batch)[:, :-1]
            return chunked_loss(hidden, head(student), labels, Head(said.reshape(-1, said.shape[-1]), head(teacher))).loss

        speed = {}
        for way in ("plain", "cache", "online"):
            student = Decoder(len(tokenizer), 128, 2, 4)
            optimizer = torch.optim.AdamW(student.parameters(), 1e-3, fused=True)
            start = time.process_time()
            for i in range(steps):
                optimizer.zero_grad()
                step([(8 * i + j) % 64 for j in range(8)], way).backward()
                optimizer.step()
            speed[way] = steps * 8 * 63 / (time.process_time() - start)
        print("tokens per CPU second: " + ", ".join(f"{way} {value:.0f}" for way, value in speed.items()))
        print(f"cache / plain {speed['cache'] / speed['plain']:.2f}, cache / online {speed['cache'] / speed['online']:.2f}")


def kinds(words: int = 8000, width: int = 128) -> None:
    """On a teacher of Zipf-like next-word distributions; the error is that of the mean forward KL against the full distribution's."""
    torch.manual_seed(0)
    tokenizer = Characters("".join(chr(0x4E00 + i) for i in range(words - 2)), symbols=())
    teacher = Decoder(words, width, 2, 2, tied=False)
    with torch.no_grad():
        teacher.head.weight.mul_(40.0)
    rows = torch.randint(2, words, (16, 33))
    hidden = states(teacher, Rows.plain(rows))[:, :-1].reshape(-1, width).detach()
    student = linear(hidden, head(teacher).weight * 0.8 + 0.1 * torch.randn(words, width)).detach()
    truth = divergence(linear(hidden, head(teacher).weight), student).detach()
    with tempfile.TemporaryDirectory() as folder:
        sized = [*(Capture("topk", size) for size in (8, 32, 128)), *(Capture("sampled", size) for size in (12, 50))]
        for what in (Capture("full", 1), Capture("states", 1), *sized):
            kept = capture(folder, teacher, tokenizer, rows, what, progress=False)
            found = kept.signal(range(16)).divergence(student, "forward_kl", 1.0)
            if what.kind == "sampled":
                log_p = linear(hidden, head(teacher).weight).log_softmax(-1)
                found = found + (log_p.exp() * log_p).sum(-1)
            gap = found - truth
            print(
                f"{what.kind:8s}{what.size:4d}  {kept.bytes_per_token:8.0f} bytes/token  KL {truth.mean():.3f}, "
                f"mean error {gap.mean():+.4f}, per token {gap.abs().mean():.4f}"
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["one"]:
        one(sys.argv[2], *map(int, sys.argv[3:6]))
    elif sys.argv[1:2] == ["inside"]:
        distillkit()
    else:
        for name in sys.argv[1:] or ["memory", "peers", "distillkit", "cache", "kinds"]:
            print(f"-- {name}")
            {"memory": memory, "peers": peers, "distillkit": distillkit, "cache": cache, "kinds": kinds}[name]()
