"""Gated attention: a sigmoid gate on each head's output removes the attention sink (Qiu et al. 2025, arXiv 2505.06708).

    Y'_h = softmax(Q_h K^T / sqrt(d)) V * sigmoid(X W_h),    X the pre-normed input that feeds Q, K and V

A query-dependent gate near zero lets a head say nothing; without one it has to park its attention on the first token. Two tasks show it:

  sink       one attention layer and nothing else must answer at few trigger positions and stay silent at all others
  language   a small decoder learns a bigram language with a copying rule, or the text file that `data` names, at equal parameters

Exact: positions, granularities, activations and the gate's input (sections 2 and 3); first-token share, gate mean and massive activation.
Shrunk: everything else; the paper's 15 B model and length extrapolation are not attempted. Plain next-token loss, fresh data.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from stillroom.catalogue.claims import Claim
from stillroom.core.config import Count, Natural, Positive
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.data.sequences import BackCopy, windows
from stillroom.lm.diagnostics import attention_maps, first_token_share, gate_scores, massive_activation, spikes
from stillroom.lm.teachers import save_causal
from stillroom.lm.tokenizer import Characters
from stillroom.losses.divergences import cross_entropy
from stillroom.nets.decoder import Attention, Decoder, GateOptions, gated_hidden, rotary


@dataclass(frozen=True)
class Config:
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
    data: str = "back-copy"
    """back-copy, or a text file, read by characters."""
    length: Count = 32
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
    """The paper's 1.7 B dense model (28 layers; its widths, those of Qwen3-1.7B, are unconfirmed). Give `--data` a text file."""
    return Config(
        sink_steps=0, data="corpus.txt", length=4096, width=2048, layers=28, heads=16, kv_heads=8, hidden=6144, steps=100_000,
        batch_size=1024, optimizer=Optimizer("adamw", 4e-3, weight_decay=0.1, beta2=0.95, schedule="cosine", warmup=1000, clip=1.0),
    )  # fmt: skip


EARLY = {"steps": 300, "sink_steps": 0}
HOT = {"optimizer.lr": 0.1, "sink_steps": 0}
TINY = {"sink_steps": 4, "steps": 4}
FSDP2 = "ce"
ARMS = {
    "none": {"gate": "none"},
    "elementwise": {},
    "headwise": {"granularity": "headwise"},
    "ns-sigmoid": {"activation": "ns_sigmoid"},
    "value": {"gate": "value"},
    "projected": {"gate": "projected"},
    "input-independent": {"input_dependent": False},
    "none, early": {"gate": "none", **EARLY},
    "elementwise, early": EARLY,
    "none, hot": {"gate": "none", **HOT},
    "elementwise, hot": HOT,
}
CLAIMS = [
    Claim(
        "a gated language model looks less at its first token",
        "first_token_share", "elementwise", "none", "lower", 0.1, paper="4.8 % against 46.7 %",
    ),
    Claim("an elementwise gate removes the sink", "sink_share", "elementwise", "none", "lower", 0.4, paper="0.048 against 0.467"),
    Claim("a headwise gate removes the sink", "sink_share", "headwise", "none", "lower", 0.4, paper="0.073 against 0.467"),
    Claim(
        "it is the sparsity that does: a gate that never closes keeps more of the sink",
        "sink_share", "elementwise", "ns-sigmoid", "lower", paper="0.048 against 0.451",
    ),
    Claim("a gate that does not see its input keeps the sink", "sink_share", "elementwise", "input-independent", "lower", 0.2, "0.364"),
    Claim("a gate on the values keeps more of the sink", "sink_share", "elementwise", "value", "lower", paper="0.297"),
    Claim("a gate after the output projection keeps the sink", "sink_share", "elementwise", "projected", "lower", 0.2),
    Claim(
        "at equal parameters and steps, before both are done, the gated decoder has the lower loss",
        "ce", "elementwise, early", "none, early", "lower", paper="perplexity 5.761 against 6.026",
    ),
    Claim("it learns to look back earlier", "trigger_ce", "elementwise, early", "none, early", "lower"),
    Claim(
        "at twenty times the learning rate it degrades less",
        "ce", "elementwise, hot", "none, hot", "lower", paper="7.325 against 9.195 at twice the rate",
    ),
]  # fmt: skip

BOS, TRIGGERS, SINK_LENGTH, ANSWER = 0, 6, 24, 16


def main(cfg: Config, run: Run) -> dict[str, float]:
    """Both tasks, their diagnostics and figures; the language model is the student that is saved."""
    gate = options(cfg)
    metrics = sink_task(cfg, run.stage("sink"), gate) if cfg.sink_steps else {}
    text = language(cfg, run.seed)
    net, losses = train(cfg, run, cfg.optimizer, gate, text)
    metrics |= text.measure(net) | {"spikes": float(spikes(losses)), "massive_activation": massive_activation(net, text.test)}
    maps = attention_maps(net, text.test)
    metrics["first_token_share"] = sum(first_token_share(m).item() for m in maps) / len(maps)
    run.row("student", **{k: v for k, v in metrics.items() if k != "spikes"}, parameters=sum(p.numel() for p in net.parameters()))
    if cfg.sweep:
        rates = sorted({*cfg.sweep, cfg.optimizer.lr})
        found = {cfg.optimizer.lr: metrics["ce"]}
        for rate in cfg.sweep:
            tuned, _ = train(cfg, run.stage(f"rate {rate:g}"), replaced(cfg.optimizer, rate), gate, text)
            found[rate] = text.measure(tuned)["ce"]
        run.figure("loss against learning rate", lambda axes: draw_sweep(axes, rates, [found[r] for r in rates]))
        metrics |= {f"ce_at_{rate:g}": found[rate] for rate in rates}
    run.save_student(net, lambda whole, folder: save_causal(whole, text.tokenizer, folder))
    return metrics


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


def sink_batch(count: int, answers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (B, n), targets (B, n, 16) and where the triggers are; a trigger from position 2 on asks for its predecessor's vector."""
    ids = torch.randint(1, 32, (count, SINK_LENGTH))
    ids[:, 0] = BOS
    asked = (ids <= TRIGGERS) & (torch.arange(SINK_LENGTH) >= 2)
    return ids, answers[ids.roll(1, 1)] * asked[..., None], asked


def sink_task(cfg: Config, stage: Run, gate: GateOptions | None) -> dict[str, float]:
    answers = torch.randn(32, ANSWER, generator=torch.Generator().manual_seed(stage.seed))
    net, optimizer = stage.trainable("net", Sink(gate), cfg.sink_optimizer)
    for _ in stage.steps(cfg.sink_steps):
        ids, target, _ = (x.to(stage.device) for x in sink_batch(64, answers))
        stage.update(optimizer, mse=(net(ids) - target).square().mean(-1).flatten())
    net = stage.unwrap(net)
    ids, target, asked = (x.to(stage.device) for x in sink_batch(256, answers))
    late = torch.arange(SINK_LENGTH, device=ids.device) >= 4
    (weights,) = attention_maps(net, ids)
    with torch.no_grad():
        metrics = {"sink_mse": (net(ids) - target).square().mean().item()}
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
@dataclass(frozen=True)
class Text:
    """Training windows by step, test windows, and which test predictions follow a trigger."""

    tokenizer: Characters
    train: Tensor | BackCopy
    test: Tensor
    after_trigger: Tensor | None

    def batch(self, count: int) -> Tensor:
        if isinstance(self.train, BackCopy):
            return self.train.draw(count, self.test.shape[1])
        return self.train[torch.randint(len(self.train), (count,))]

    @torch.no_grad()
    def measure(self, net: nn.Module) -> dict[str, float]:
        values = torch.cat([cross_entropy(net(ids).logits[:, :-1], ids[:, 1:]) for ids in self.test.split(64)])
        found = {"ce": values.mean().item()}
        if self.after_trigger is not None:
            found["trigger_ce"] = values[:, 1:][self.after_trigger].mean().item()
        return found


def language(cfg: Config, seed: int) -> Text:
    if cfg.data == "back-copy":
        source = BackCopy()
        test = source.draw(512, cfg.length, torch.Generator().manual_seed(10_000 + seed))
        letters = Characters("".join(chr(0x4E00 + i) for i in range(source.words - 2)), symbols=())
        return Text(letters, source, test, source.is_trigger(test[:, 1:-1]))
    if not Path(cfg.data).is_file():
        raise UserError(f"--data {cfg.data}: there is no such file; give back-copy or a text file.")
    text = Path(cfg.data).read_text(encoding="utf-8")
    tokenizer = Characters(text, symbols=())
    rows = windows(tokenizer.encode(text), cfg.length)
    held = max(1, len(rows) // 20)
    return Text(tokenizer, rows[:-held], rows[-held:][:512], None)


def train(cfg: Config, run: Run, optimizer: Optimizer, gate: GateOptions | None, text: Text) -> tuple[Decoder, list[float]]:
    hidden = cfg.hidden
    if gate is not None:
        hidden = gated_hidden(cfg.width, cfg.hidden, cfg.heads, gate, cfg.kv_heads or None)
    net = Decoder(
        len(text.tokenizer), cfg.width, cfg.layers, cfg.heads, kv_heads=cfg.kv_heads or None, hidden=hidden, rope_base=cfg.rope_base,
        tied=False, gate=gate,
    )  # fmt: skip
    net, held = run.trainable("student", net, optimizer)
    losses = torch.zeros(cfg.steps)
    run.track(losses=losses)
    for step in run.steps(cfg.steps):
        ids = run.shard(text.batch(cfg.batch_size))
        losses[step] = run.update(held, ce=cross_entropy(net(ids).logits[:, :-1], ids[:, 1:]).flatten())
    return run.unwrap(net), losses.tolist()


def replaced(optimizer: Optimizer, rate: float) -> Optimizer:
    return Optimizer(**{**optimizer.__dict__, "lr": rate})


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
