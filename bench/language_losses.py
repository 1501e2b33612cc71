"""Ratios of the language floor: `python bench/language_losses.py [memory|peers|cache|kinds]`, all four by default.

memory  chunked loss against the naive computation at 4,096 tokens x 49,152 words: peak memory and CPU time, each in its own process
peers   the same divergence and gradient from TRL's chunked loss and Liger's torch losses, where they are installed
cache   training steps from a teacher cache against an online teacher and against plain training
kinds   bytes per token and error of the loss of every kind of cache on a peaked teacher
Seconds are CPU seconds of one thread, so that a busy machine distorts ratios little.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from stillroom.data.sequences import Rows
from stillroom.lm.cache import Capture, capture
from stillroom.lm.chunked import chunked_loss
from stillroom.lm.signals import Head
from stillroom.lm.text import head, states
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


def timed(call: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> tuple[float, float, float]:
    """(loss, norm of the first leaf's gradient, best CPU seconds of three) of forward and backward."""
    best = float("inf")
    for _ in range(3):
        for leaf in leaves:
            leaf.grad = None
        start = time.process_time()
        loss = call()
        loss.backward()
        best = min(best, time.process_time() - start)
    grad = leaves[0].grad
    return loss.item(), 0.0 if grad is None else grad.norm().item(), best


def peers(tokens: int = 256, words: int = 32000, width: int = 256) -> None:
    hidden, weight, teacher, teacher_weight, labels = inputs(tokens, words, width)
    say = lambda name, found: print(f"{name:34s} loss {found[0]:9.5f}  gradient {found[1]:.6f}  {found[2]:.2f} CPU s")
    signal, leaves = Head(teacher, teacher_weight), (hidden, weight)
    for kind in ("forward_kl", "jsd"):
        say(f"stillroom {kind}", timed(lambda kind=kind: chunked_loss(hidden, weight, labels, signal, kind=kind).loss, leaves))  # type: ignore[misc]
        dense = lambda kind=kind: divergence(linear(teacher, teacher_weight), linear(hidden, weight), kind).mean()
        say(f"by hand {kind}", timed(dense, leaves))
    try:
        from trl.experimental.gkd import GKDTrainer

        for beta in (0.0, 0.5):
            call = lambda beta=beta: GKDTrainer.generalized_jsd_loss(
                linear(hidden, weight)[None], linear(teacher, teacher_weight)[None], labels[None], beta=beta
            )
            say(f"TRL generalized_jsd_loss {beta}", timed(call, leaves))
    except ImportError as missing:
        print(f"TRL left out: {missing}")
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        for beta in (0.0, 0.5):
            loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)
            call = lambda loss=loss: loss(hidden, weight, teacher, teacher_weight, labels)
            say(f"Liger chunked JSD {beta}", timed(lambda call=call: _first(call()), leaves))  # type: ignore[misc]
    except ImportError as missing:
        print(f"Liger left out: {missing}")


def _first(value: Tensor | tuple[Tensor, ...]) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


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
    student = linear(hidden, head(teacher) * 0.8 + 0.1 * torch.randn(words, width)).detach()
    truth = divergence(linear(hidden, head(teacher)), student).detach()
    with tempfile.TemporaryDirectory() as folder:
        for kind, size in (("full", 1), ("states", 1), ("topk", 8), ("topk", 32), ("topk", 128), ("sampled", 12), ("sampled", 50)):
            kept = capture(folder, teacher, tokenizer, rows, Capture(kind, size), progress=False)  # type: ignore[arg-type]
            found = kept.signal(range(16)).divergence(student, "forward_kl", 1.0)
            if kind == "sampled":
                log_p = linear(hidden, head(teacher)).log_softmax(-1)
                found = found + (log_p.exp() * log_p).sum(-1)
            gap = found - truth
            print(
                f"{kind:8s}{size:4d}  {kept.bytes_per_token:8.0f} bytes/token  KL {truth.mean():.3f}, mean error {gap.mean():+.4f}, "
                f"per token {gap.abs().mean():.4f}"
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["one"]:
        one(sys.argv[2], *map(int, sys.argv[3:6]))
    else:
        for name in sys.argv[1:] or ["memory", "peers", "cache", "kinds"]:
            print(f"-- {name}")
            {"memory": memory, "peers": peers, "cache": cache, "kinds": kinds}[name]()
