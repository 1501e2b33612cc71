"""Gated attention: a sigmoid gate on each head's output removes the attention sink (Qiu et al. 2025, arXiv 2505.06708).

    Y'_h = softmax(Q_h K^T / sqrt(d)) V * sigmoid(X W_h),    X the pre-normed input that feeds Q, K and V

A query-dependent gate near zero lets a head say nothing; without one it has to park its attention on the first token. Two tasks show it:

  sink       one attention layer and nothing else must answer at few trigger positions and stay silent at all others
  language   a small decoder learns a bigram language with a copying rule, or the text that `data` names, at equal parameters

In the sink task the gates learn ten times as fast as the rest. Under Adam, whose steps have one size, the product of queries and keys
grows with the square of the steps and the gate's logit with the steps themselves: at one rate the heads of so short a run have parked on
the first token before their gates can close, and then nothing asks them to leave.

Exact: positions, granularities, activations and the gate's input (sections 2 and 3); first-token share, gate mean and massive activation;
plain next-token loss, nothing else changed in the language task.
Shrunk: one layer of width 64 in place of 28 of 2048, 600 steps, a procedural language.
Ours: the sink task and its rate ratio; the score of `shared` gates averages after the sigmoid; feed-forward width in whole units.
Left out: mixtures of experts, context extension (C4), sandwich norms and per-head norms of the output. No claim on a gate after the output
projection (G5): with nothing else in the layer it can silence it as well, so this task cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from stillroom.catalogue.claims import Claim
from stillroom.catalogue.idle import refuse_unread
from stillroom.core.config import Count, Natural, Positive
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.data.sequences import BackCopy, Rows
from stillroom.lm.diagnostics import attention_maps, first_token_share, gate_scores, massive_activation, spikes
from stillroom.lm.settings import Corpus
from stillroom.lm.teachers import save_causal
from stillroom.lm.train import taken
from stillroom.losses.divergences import cross_entropy
from stillroom.losses.tokens import IGNORE
from stillroom.metrics.cost import parameters
from stillroom.nets.decoder import Attention, Decoder, Gate, GateOptions, gated_hidden, rotary


@dataclass(frozen=True)
class Config(Corpus):
    """Laptop defaults: the sheet's sink task and a one-layer decoder."""

    gate: Literal["none", "output", "value", "key", "query", "projected"] = "output"
    """Where the gate sits: G1 output, G2 value, G3 key, G4 query, G5 after the output projection."""
    granularity: Literal["elementwise", "headwise"] = "elementwise"
    shared: bool = False
    """One score for all heads."""
    activation: Literal["sigmoid", "ns_sigmoid", "silu", "identity"] = "sigmoid"
    combine: Literal["mul", "add"] = "mul"
    input_dependent: bool = True
    sink_steps: Natural = 1200
    """Steps of the sink task; 0 leaves it out."""
    sink_optimizer: Optimizer = Optimizer("adamw", 3e-3, weight_decay=0.01, schedule="cosine", warmup=50)
    sink_gate_rate: Positive = 10.0
    """Learning rate of the gates in the sink task, over that of everything else there."""
    width: Count = 64
    layers: Count = 1
    heads: Count = 1
    kv_heads: Natural = 0
    """Key-value heads; 0: as many as heads."""
    hidden: Count = 256
    """Feed-forward width without a gate; a gated net gives up as much of it as its gate costs."""
    rope_base: Positive = 10_000.0
    steps: Count = 600
    batch_size: Count = 32
    optimizer: Optimizer = Optimizer("adamw", 5e-3, weight_decay=0.1, beta2=0.95, schedule="cosine", warmup=100, clip=1.0)
    sweep: tuple[float, ...] = ()
    """Further peak learning rates at which the language task is trained, for the loss-against-rate figure."""


def full() -> Config:
    """The paper's 1.7 B dense model (28 layers; its widths and tokenizer, those of Qwen3-1.7B, are unconfirmed). Give `--data` a text
    file."""
    return Config(
        sink_steps=0, data="corpus.txt", tokenizer="hf:Qwen/Qwen3-1.7B", length=4096, width=2048, layers=28, heads=16, kv_heads=8,
        hidden=6144, steps=100_000, batch_size=1024,
        optimizer=Optimizer("adamw", 4e-3, weight_decay=0.1, beta2=0.95, schedule="cosine", warmup=1000, clip=1.0),
    )  # fmt: skip


EARLY = {"steps": 300, "sink_steps": 0}
SWEEP = {"sweep": (0.01, 0.03, 0.1), "sink_steps": 0}
TINY = {"sink_steps": 4, "steps": 4}
FSDP2 = "ce"
ARMS = {
    "none": {"gate": "none"},
    "elementwise": {},
    "headwise": {"granularity": "headwise"},
    "ns-sigmoid": {"activation": "ns_sigmoid"},
    "value": {"gate": "value"},
    "input-independent": {"input_dependent": False},
    "none, early": {"gate": "none", **EARLY},
    "elementwise, early": EARLY,
    "headwise, early": {"granularity": "headwise", **EARLY},
    "none, sweep": {"gate": "none", **SWEEP},
    "elementwise, sweep": SWEEP,
}
CLAIMS = [
    Claim(
        "a gated language model looks less at its first token",
        "first_token_share", "elementwise", "none", "lower", 0.1, paper="4.8 % against 46.7 %",
    ),
    Claim("so does one with a score per head", "first_token_share", "headwise", "none", "lower", 0.1),
    Claim("an elementwise gate removes the sink", "sink_share", "elementwise", "none", "lower", 0.4, paper="0.048 against 0.467"),
    Claim("a headwise gate removes the sink", "sink_share", "headwise", "none", "lower", 0.4, paper="0.073 against 0.467"),
    Claim(
        "it is the sparsity that does: a gate that never closes keeps more of the sink",
        "sink_share", "elementwise", "ns-sigmoid", "lower", paper="0.048 against 0.451",
    ),
    Claim("a gate that does not see its input keeps the sink", "sink_share", "elementwise", "input-independent", "lower", 0.2, "0.364"),
    Claim("a gate on the values keeps more of the sink", "sink_share", "elementwise", "value", "lower", paper="0.297"),
    Claim(
        "at equal parameters and steps, before both are done, the gated decoder has the lower loss",
        "ce", "elementwise, early", "none, early", "lower", paper="perplexity 5.761 against 6.026",
    ),
    Claim("so has the one with a score per head", "ce", "headwise, early", "none, early", "lower", paper="5.792 against 6.026"),
    Claim("it learns to look back earlier", "trigger_ce", "elementwise, early", "none, early", "lower"),
    Claim(
        "at twenty times the learning rate it degrades less",
        "ce_at_0.1", "elementwise, sweep", "none, sweep", "lower", paper="7.325 against 9.195 at twice the rate",
    ),
    Claim(
        "its best learning rate is no lower, but by half a step of the sweep",
        "log_best_rate", "elementwise, sweep", "none, sweep", margin=-0.25, paper="8e-3 against 4e-3",
    ),
]  # fmt: skip

BOS, TRIGGERS, SINK_LENGTH, ANSWER = 0, 6, 24, 16


def main(cfg: Config, run: Run) -> dict[str, float]:
    """Both tasks, their diagnostics and figures; the language model is the student that is saved."""
    check_flags(cfg)
    gate = options(cfg)
    metrics = sink_task(cfg, run.stage("sink"), gate) if cfg.sink_steps else {}
    words = cfg.words()
    train, test = cfg.rows(words, run.seed)
    net, losses = pretrain(cfg, run, cfg.optimizer, gate, len(words), train)
    metrics |= measure(cfg, net, test)
    ids = test.ids.to(run.device)
    maps = attention_maps(net, ids)
    metrics["first_token_share"] = sum(first_token_share(m).item() for m in maps) / len(maps)
    metrics |= {"spikes": float(spikes(losses)), "massive_activation": massive_activation(net, ids)}
    run.row("student", **{k: v for k, v in metrics.items() if k != "spikes"}, parameters=parameters(net))
    if cfg.sweep:
        found = {cfg.optimizer.lr: metrics["ce"]}
        for rate in cfg.sweep:
            tuned, _ = pretrain(cfg, run.stage(f"rate {rate:g}"), replace(cfg.optimizer, lr=rate), gate, len(words), train)
            found[rate] = measure(cfg, tuned, test)["ce"]
        rates = sorted(found)
        run.figure("loss against learning rate", lambda axes: draw_sweep(axes, rates, [found[r] for r in rates]))
        metrics |= {f"ce_at_{rate:g}": found[rate] for rate in rates} | {"log_best_rate": math.log10(min(rates, key=found.__getitem__))}
    run.save_student(net, lambda whole, folder: save_causal(whole, words, folder))
    return metrics


def check_flags(cfg: Config) -> None:
    """UserError for a flag that the others leave without effect."""
    idle: dict[str, str] = {}
    if cfg.gate == "none":
        idle = dict.fromkeys(("granularity", "shared", "activation", "combine", "input_dependent", "sink_gate_rate"), "--gate is none")
    if not cfg.sink_steps:
        idle |= dict.fromkeys(("sink_optimizer", "sink_gate_rate"), "--sink-steps is 0")
    if cfg.gate == "projected":
        idle |= {"shared": "a gate after the output projection knows no heads"}
    refuse_unread(cfg, idle)


def options(cfg: Config) -> GateOptions | None:
    if cfg.gate == "none":
        return None
    return GateOptions(cfg.gate, cfg.granularity, cfg.shared, cfg.activation, cfg.combine, cfg.input_dependent)


# -- the sink task -----------------------------------------------------------------------------------------------------------------
class Sink(nn.Module):
    """Embedding, norm, attention: no residual stream and no bias, so silence has to come from the attention itself."""

    def __init__(self, gate: GateOptions | None):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(32, 48), nn.RMSNorm(48, eps=1e-6)
        self.attention = Attention(48, 2, out=ANSWER, gate=gate)
        for module in self.attention.modules():
            if isinstance(module, nn.Linear):  # as in transformers' models; with torch's larger start even a gated head parks first
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        turn = rotary(torch.arange(ids.shape[1], device=ids.device).expand_as(ids), self.attention.channels, 100.0)
        return self.attention(self.norm(self.embedding(ids)), turn)


@dataclass(frozen=True)
class Faster(Optimizer):
    """An optimizer that gives the parameters of some modules `ratio` times its learning rate, schedule included."""

    modules: tuple[nn.Module, ...] = ()
    ratio: float = 1.0

    def __call__(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        built, own = super().__call__(parameters), {id(p) for module in self.modules for p in module.parameters()}
        for group in list(built.param_groups):
            faster = [p for p in group["params"] if id(p) in own]
            group["params"] = [p for p in group["params"] if id(p) not in own]
            if faster:
                built.add_param_group({**group, "params": faster, "ratio": self.ratio})
        return built


def sink_ids(count: int) -> Tensor:
    """(count, n) random words after a first one that is always the same."""
    ids = torch.randint(1, 32, (count, SINK_LENGTH))
    ids[:, 0] = BOS
    return ids


def sink_targets(ids: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Of ids (B, n): targets (B, n, 16), and where the triggers are (B, n), from position 2 on. A trigger asks for its predecessor's
    vector, everything else for silence."""
    asked = (ids <= TRIGGERS) & (torch.arange(ids.shape[1], device=ids.device) >= 2)
    return answers[ids.roll(1, 1)] * asked[..., None], asked


def sink_loss(answered: Tensor, target: Tensor) -> Tensor:
    """Squared error (B n,) of every position, a mean over the vector."""
    return (answered - target).square().mean(-1).flatten()


def sink_task(cfg: Config, stage: Run, gate: GateOptions | None) -> dict[str, float]:
    answers = torch.randn(32, ANSWER, generator=torch.Generator().manual_seed(stage.seed)).to(stage.device)
    net = Sink(gate)
    gates = tuple(module for module in net.modules() if isinstance(module, Gate))
    net, optimizer = stage.trainable("net", net, Faster(**vars(cfg.sink_optimizer), modules=gates, ratio=cfg.sink_gate_rate))
    for _ in stage.steps(cfg.sink_steps):
        ids = sink_ids(64).to(stage.device)
        stage.update(optimizer, mse=sink_loss(net(ids), sink_targets(ids, answers)[0]))
    net = stage.unwrap(net)
    ids = sink_ids(256).to(stage.device)
    target, asked = sink_targets(ids, answers)
    late = torch.arange(SINK_LENGTH, device=ids.device) >= 4
    (weights,) = attention_maps(net, ids)
    with torch.no_grad():
        metrics = {"sink_mse": sink_loss(net(ids), target).mean().item()}
    metrics["sink_share"] = first_token_share(weights, ~asked & late).item()
    metrics["sink_share_trigger"] = first_token_share(weights, asked & late).item()
    for scores in gate_scores(net, ids):
        level = scores.mean((-1, -2))
        metrics |= {"gate_silent": level[~asked & late].mean().item(), "gate_trigger": level[asked & late].mean().item()}
        metrics["gate_closed"] = (scores < 0.1).float().mean().item()
        stage.figure("gate scores", partial(draw_scores, values=scores[:, 4:].flatten().tolist()))
    stage.figure("attention of one sequence", lambda axes: draw_attention(axes, weights[0].mean(0), asked[0]))
    return metrics


# -- the language task -------------------------------------------------------------------------------------------------------------
def language_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (B, L - 1) of each next token from logits (B, L, V) and unshifted labels (B, L), zero where nothing is trained, and how
    many are trained."""
    return cross_entropy(logits[:, :-1], labels[:, 1:]), (labels[:, 1:] != IGNORE).sum()


def pretrain(cfg: Config, run: Run, optimizer: Optimizer, gate: GateOptions | None, words: int, rows: Rows) -> tuple[Decoder, list[float]]:
    """A decoder trained from scratch, and its loss at every step."""
    kv_heads = cfg.kv_heads or None
    hidden = gated_hidden(cfg.width, cfg.hidden, cfg.heads, gate, kv_heads) if gate else cfg.hidden
    net = Decoder(words, cfg.width, cfg.layers, cfg.heads, kv_heads=kv_heads, hidden=hidden, rope_base=cfg.rope_base, tied=False, gate=gate)
    net, held = run.trainable("student", net, optimizer)
    losses = torch.zeros(cfg.steps)
    run.track(losses=losses)
    for step in run.steps(cfg.steps):
        if cfg.procedural and not cfg.limit:
            batch = Rows.plain(run.shard(BackCopy().draw(cfg.batch_size, cfg.length)))
        else:
            _, batch = taken(run, rows, cfg.batch_size, step)
        ids, labels = batch.ids.to(run.device), batch.labels.to(run.device)
        values, count = language_loss(net(ids).logits, labels)
        losses[step] = run.update(held, ce=values.flatten(), count=count)
    return run.unwrap(net), losses.tolist()


@torch.no_grad()
def measure(cfg: Config, net: nn.Module, test: Rows) -> dict[str, float]:
    """Mean cross-entropy of the test text, and of the words after a trigger where the language has them."""
    device = next(net.parameters()).device
    parts = [test.take(slice(first, first + 64)) for first in range(0, len(test), 64)]
    found = [language_loss(net(part.ids.to(device)).logits, part.labels.to(device)) for part in parts]
    values = torch.cat([value for value, _ in found])
    metrics = {"ce": (values.sum() / sum(count for _, count in found)).item()}
    if cfg.procedural:
        metrics["trigger_ce"] = values[:, 1:][BackCopy().is_trigger(test.ids[:, 1:-1]).to(device)].mean().item()
    return metrics


# -- pictures ----------------------------------------------------------------------------------------------------------------------
def draw_attention(axes, weights: Tensor, asked: Tensor) -> None:
    axes.imshow(weights.tolist(), cmap="magma", vmin=0, vmax=1)
    axes.grid(False)
    axes.set(xlabel="looks at", ylabel="query (marked: triggers)", title="attention, mean of heads")
    axes.scatter([-1] * int(asked.sum()), asked.nonzero().squeeze(-1).tolist(), marker=">", s=14, clip_on=False)


def draw_scores(axes, values: list[float]) -> None:
    axes.hist(values, bins=50, range=(0, 1))
    axes.set(xlabel="gate score", ylabel="count", title="gate scores")


def draw_sweep(axes, rates: list[float], losses: list[float]) -> None:
    axes.plot(rates, losses, marker="o")
    axes.set_xscale("log")
    axes.set(xlabel="peak learning rate", ylabel="test cross-entropy", title="loss against learning rate")
