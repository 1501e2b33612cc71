"""JEI-DNN: exits and gates of a frozen classifier learn together for accuracy and compute (Regol et al. 2024, arXiv 2310.09163).

Exit l reads h_l, the block's output through the net's own final norm, with one linear layer, u_l; its gate is one linear layer on four
numbers of softmax(u_l), detached: p_max, entropy, p_(1) - p_(2), entropy of p^2 / sum p^2. With g_l = sigmoid(gate) and the cost c_l of
leaving at l (multiply-adds, 1 for the whole net with all exits):

    P_l = max(0, min(g_l, 1 - sum_{j<l} g_j)),   P_G = 1 - sum P_l
    leave at the first l with  clip(P_l / prod_{j<l} (1 - c~_j), 0, 1) = c~_l >= 0.5
    gates:  o = argmin_l CE(u_l, y) + lambda c_l;  mean of BCE(gate_l, 1[l >= o]), positives weighted by the rarity of their exit
    exits:  mean of r P_l CE(u_l, y),  r = sum CE / sum P CE

After a warm-up of the exits (deep ones weigh less; each stops by its own validation accuracy), phases of gate and exit steps alternate,
gates first. A gate that is a threshold on one of the four numbers, over exits trained by the plain sum, is the baseline.

Exact: the above, two optimizers (nothing of the resting phase moves), final head and net frozen in eval mode. `detach_ratio`: as released,
r is not detached, so that sum P CE r is the unweighted sum in value and gradient; the method as described needs it detached (default).
Not ours: the reference keeps the best epoch, we the last; its batch counter of phases may restart every epoch (unconfirmed); published
figures were not re-read. Shrunk: net and data (a spiral whose later turns need depth).
Curves join operating points linearly, which is what mixing two of them at random attains.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillroom.adapt.early_exit import (
    SCORES,
    EarlyExit,
    Gates,
    Heads,
    Score,
    Threshold,
    WarmUp,
    confidence,
    exit_probabilities,
    exits_taken,
)  # fmt: skip
from stillroom.adapt.exits import Exits, Table, find_exits
from stillroom.catalogue.claims import Claim
from stillroom.core.config import Count, Share
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.data.augment import augmenter
from stillroom.data.batches import Batches
from stillroom.data.images import ImageData, Split, balanced_rows
from stillroom.losses.divergences import cross_entropy
from stillroom.metrics.cost import cost
from stillroom.metrics.exits import accuracy_of, draw_calibration, draw_shares, draw_times, exit_quantiles, measured
from stillroom.vision import present, saving, trained
from stillroom.vision.exits import table


@dataclass(frozen=True)
class Config(trained.TeacherConfig):
    """Laptop defaults: six residual blocks on the arms of a spiral."""

    data: str = "spiral"
    validation: Count = 2000
    """Training images kept aside for warm-up, gate weights, operating point and conformal thresholds."""
    teacher: str = "small:residual-mlp-w128-d6"
    teacher_steps: Count = 1300
    teacher_optimizer: Optimizer = Optimizer("adamw", 2e-3, schedule="cosine")
    exits: tuple[str, ...] = ()
    """Module paths to leave after; one with * (model.vit.layers.*) is a stack of blocks. Default: all blocks but the last."""
    gate: Literal["learned", "p_max", "entropy", "margin", "squares"] = "learned"
    """Learned jointly, or a threshold on one of the four numbers."""
    tradeoffs: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    """lambda: price of the whole net's compute in nats. One training each."""
    detach_ratio: bool = True
    """Detach r in the exits' loss; off as released."""
    epochs: Count = 12
    """Of exits and gates, warm-up included."""
    warmup_epochs: Count = 4
    """Most epochs of warm-up."""
    patience: Count = 2
    """Epochs without a better validation accuracy after which an exit rests until the warm-up's end."""
    phase: Count = 20
    """Batches of a gate phase, and of an exit phase."""
    optimizer: Optimizer = Optimizer("sgd", 0.02, weight_decay=5e-4, schedule="cosine", end=2e-4)
    """Of the exits."""
    gate_optimizer: Optimizer = Optimizer("sgd", 0.05, weight_decay=5e-4, schedule="cosine", end=2e-4)
    allowed_drop: Share = 0.01
    """The delivered student is the cheapest one whose validation accuracy is at most this far below the whole net's."""
    conformal_alpha: Share = 0.05
    """Share of images whose conformal set may miss the true class."""


def full() -> Config:
    """CIFAR-10 as in the reference's scripts, with a transformers ViT trained on it (theirs, T2T-ViT, is in no library)."""
    sgd = Optimizer("sgd", 0.01, weight_decay=5e-4, schedule="cosine", end=2e-4)
    return Config(
        data="hub:uoft-cs/cifar10", validation=5000, augment="crop-flip", teacher="hf:nateraw/vit-base-patch16-224-cifar10",
        tradeoffs=(0.01, 0.1, 0.3, 0.7, 1.0, 3.0, 7.0), epochs=15, warmup_epochs=6, phase=200, optimizer=sgd, gate_optimizer=sgd,
    )  # fmt: skip


TINY = {"teacher_steps": 6, "epochs": 2, "warmup_epochs": 1, "tradeoffs": (1.0,)}
ARMS = {
    "p_max": {"gate": "p_max"},
    "entropy": {"gate": "entropy"},
    "margin": {"gate": "margin"},
    "jei-dnn": {},
    "ratio as released": {"detach_ratio": False},
}
CLAIMS = [
    Claim(
        "learned gates are more accurate than a threshold on p_max at equal cost", metric="accuracy_gain", arm="jei-dnn", versus="p_max",
        paper="better curves on CIFAR-10/100, SVHN (figures only)",
    ),
    Claim("over the upper half of costs they lose at most half a point", "accuracy_curve", "jei-dnn", "p_max", margin=-0.005),
    Claim(
        "their outputs are better calibrated at equal cost", metric="ece_gain", arm="jei-dnn", versus="p_max", better="lower",
        paper="lower calibration error (figures only)",
    ),
    Claim(
        "their conformal sets are smaller at equal cost", metric="set_size_gain", arm="jei-dnn", versus="p_max", better="lower",
        paper="smaller sets (figures only)",
    ),
    Claim(
        "exits trained for the images that leave there do better than exits that ignore the gates",
        metric="accuracy_gain", arm="jei-dnn", versus="ratio as released",
    ),
    Claim("they are better calibrated than those", "ece_gain", "jei-dnn", "ratio as released", better="lower"),
]  # fmt: skip


def main(cfg: Config, run: Run, *, data: ImageData | None = None, teacher: nn.Module | None = None) -> dict[str, float]:
    """Train the backbone if need be, then exits and gates at every trade-off; evaluate, choose, save. Keywords replace what is named."""
    if not cfg.tradeoffs:
        raise UserError("--tradeoffs needs at least one price.", code=2)
    data, validation = hold_out(data.to(run.device) if data else cfg.load(run), cfg.validation, run.seed)
    teacher = run.frozen(teacher if teacher is not None else cfg.classifier(run, data))
    exits = Exits(teacher, find_exits(teacher, cfg.exits))
    tables = {name: table(run, exits, split) for name, split in (("validation", validation), ("test", data.test))}
    task = Task(exits, data, tables["validation"], tables["test"])

    rival = thresholds(cfg, run, task, "p_max")
    options = thresholds(cfg, run, task, cfg.gate) if cfg.gate != "learned" else [learned(cfg, run, task, x) for x in cfg.tradeoffs]
    allowed = accuracy_of(task.validation.final, task.validation.labels) - cfg.allowed_drop
    good = [option for option in options if option.validation["accuracy"] >= allowed]
    chosen = min(good, key=lambda o: o.validation["cost"]) if good else max(options, key=lambda o: o.validation["accuracy"])
    metrics = dict(chosen.test)
    for key in ("accuracy", "ece", "set_size"):
        metrics |= {f"{key}_gain": gain(options, rival, key), f"{key}_curve": curve(options, key)}
    if run.plots and not run.rank:
        show(run, task, {"threshold on p_max": rival, cfg.gate: options}, chosen)

    def save(student: EarlyExit, folder: Path) -> None:
        saving.save_classifier(teacher, folder)
        student.save(folder, conformal_alpha=cfg.conformal_alpha, conformal_thresholds=chosen.quantiles)

    run.save_student(chosen.student, save)
    return metrics


# -- data --------------------------------------------------------------------------------------------------------------------------
def hold_out(data: ImageData, count: int, seed: int) -> tuple[ImageData, Split]:
    """The task with `count` class-balanced training images fewer, and those images."""
    if count >= len(data.train):
        raise UserError(f"--validation {count} leaves nothing of the {len(data.train)} training images; lower it.", code=2)
    rows = balanced_rows(data.train.labels, count, torch.Generator().manual_seed(seed))
    rest = torch.ones(len(data.train), dtype=torch.bool)
    rest[rows] = False
    return replace(data, train=data.train.subset(rest.nonzero().squeeze(1))), data.train.subset(rows)


@dataclass(frozen=True)
class Task:
    exits: Exits
    data: ImageData
    validation: Table
    test: Table

    def heads(self) -> Heads:
        return Heads([feature.shape[1] for feature in self.test.features], len(self.data.classes)).to(self.test.final.device)

    @functools.cached_property
    def costs(self) -> Tensor:
        """(G + 1,) float64 in (0, 1]: multiply-adds up to each exit as a share of those of the whole net with all exits."""
        counts = EarlyExit(self.exits, self.heads(), Threshold("p_max", 2.0)).multiply_adds(
            self.data.test.take(torch.zeros(1).long()).images
        )
        return counts.to(self.test.final.device) / counts[-1]


# -- training ----------------------------------------------------------------------------------------------------------------------
def train(stage: Run, cfg: Config, task: Task, price: float) -> tuple[Heads, Gates]:
    """Heads and gates at lambda = price. Unless the gate is learned, the heads go on with the plain sum and the gates stay as they are."""
    joint, G = cfg.gate == "learned", len(task.exits.paths)
    heads, optimizer = stage.trainable("heads", task.heads(), cfg.optimizer)
    gates, gate_optimizer = stage.trainable("gates", Gates(G).to(stage.device), cfg.gate_optimizer)
    warm, rarity = WarmUp(stage.unwrap(heads)), torch.ones(G, device=stage.device)
    stage.track(warm=warm, rarity=rarity)
    batches, augment = Batches(task.data.train, cfg.batch_size, stage.seed), augmenter(cfg.augment, task.data.size)
    known = table(stage, task.exits, task.data.train) if cfg.augment == "none" else None
    epoch = batches.steps_per_epoch
    for step in stage.steps(cfg.epochs * epoch):
        if known is not None:
            index = stage.shard(batches.index(step))
            features, final, label = [f[index] for f in known.features], known.final[index], known.labels[index]
        else:
            _, image, label = stage.shard(batches(step))
            features, final = task.exits(augment(image))
        if warm.active:
            awake = [(G + 1 - exit, logits) for exit, logits in enumerate(heads(features)) if not warm.resting[exit]]
            stage.update(optimizer, warmup=torch.stack([weight * cross_entropy(logits, label) for weight, logits in awake]).sum(0))
        elif joint and (step - int(warm.ended)) // cfg.phase % 2 == 0:
            with torch.no_grad():
                logits = torch.stack(heads(features), 1)
                levels = level_losses(torch.cat([logits, final[:, None]], 1), label, task.costs, price)
            stage.update(gate_optimizer, gate=gate_loss(gates(logits), levels.argmin(1), rarity))
        else:
            logits = torch.stack(heads(features), 1)
            ce = cross_entropy(logits, label[:, None].expand(-1, G))
            if joint:
                with torch.no_grad():
                    p = exit_probabilities(torch.sigmoid(gates(logits)))[:, :-1]
                ce = matched(ce, p, cfg.detach_ratio)
            stage.update(optimizer, exits=ce)
        if (step + 1) % epoch == 0 and stage.last_chunk:
            logits, labels = task.validation.logits(stage.unwrap(heads)), task.validation.labels
            if warm.active:
                warm.end_epoch(logits, labels, step + 1, (step + 1) // epoch >= cfg.warmup_epochs, cfg.patience)
            rarity.copy_(positive_weights(level_losses(logits, labels, task.costs, price).argmin(1), G))
    return stage.unwrap(heads), stage.unwrap(gates)


def level_losses(logits: Tensor, label: Tensor, costs: Tensor, price: float) -> Tensor:
    """CE + lambda c of every exit and the final head: logits (B, G + 1, C) -> (B, G + 1)."""
    return cross_entropy(logits, label[:, None].expand(-1, logits.shape[1])) + price * costs.to(logits.dtype)


def gate_loss(gate_logits: Tensor, best: Tensor, rarity: Tensor) -> Tensor:
    """(B, G): binary cross-entropy with "leave at the best exit and at all later ones"; best = G has no positive."""
    target = (torch.arange(gate_logits.shape[1], device=best.device) >= best[:, None]).to(gate_logits.dtype)
    loss = F.binary_cross_entropy_with_logits(gate_logits, target, reduction="none")
    return loss * torch.where(target > 0, rarity, torch.ones_like(rarity))


def positive_weights(best: Tensor, exits: int) -> Tensor:
    """(G,): how many images are not best served by exit l for one that is, at most 5."""
    count = torch.bincount(best, minlength=exits + 1)[:exits].float()
    return ((len(best) - count) / count.clamp_min(0.1)).clamp_max(5.0)


def matched(ce: Tensor, p: Tensor, detach: bool) -> Tensor:
    """Cross-entropies (B, G) weighted by the probability of leaving there, at an unchanged total for each image."""
    weighted = p * ce
    ratio = ce.sum(1, keepdim=True) / weighted.sum(1, keepdim=True).clamp_min(1e-6)  # all mass may lie on the final exit
    return weighted * (ratio.detach() if detach else ratio)


# -- operating points --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Option:
    """One student and how it does."""

    student: EarlyExit
    taken: Tensor
    quantiles: list[float]
    validation: dict[str, float]
    test: dict[str, float]
    ends: list[dict[str, float]]
    """On the test images, of leaving always at the first exit and of never leaving."""


def learned(cfg: Config, run: Run, task: Task, price: float) -> Option:
    return option(cfg, task, *train(run.stage(f"lambda {price:g}"), cfg, task, price))


def thresholds(cfg: Config, run: Run, task: Task, score: Score) -> list[Option]:
    """Over heads trained by the plain sum: thresholds at 41 quantiles of the validation scores of all exits."""
    plain = replace(cfg, gate="p_max", tradeoffs=())
    with run.stage("plain heads", shared=(train, plain, task.exits.net, task.data.train, task.validation.labels)) as stage:
        heads, _ = train(stage, plain, task, 0.0)
    place, sign = SCORES[score]
    scores = sign * confidence(task.validation.logits(heads)[:, :-1])[..., place]
    values = torch.quantile(scores.flatten().double().cpu()[:: max(1, scores.numel() // 10**6)], torch.linspace(0, 1, 41).double())
    return [option(cfg, task, heads, Threshold(score, value)) for value in values.tolist()]


def option(cfg: Config, task: Task, heads: Heads, gates: Gates | Threshold) -> Option:
    logits = [t.logits(heads) for t in (task.validation, task.test)]
    takens = [exits_taken(gates, x[:, :-1]) for x in logits]
    quantiles = exit_quantiles(logits[0].softmax(-1), task.validation.labels, takens[0], cfg.conformal_alpha)
    measure = functools.partial(measured, costs=task.costs)
    first, never = (torch.full_like(takens[1], exit) for exit in (0, len(task.exits.paths)))
    ends = []
    for fixed in (first, never):
        alone = exit_quantiles(logits[0].softmax(-1), task.validation.labels, fixed[:1].expand(len(takens[0])), cfg.conformal_alpha)
        ends.append(measure(logits[1], task.test.labels, fixed, alone))
    results = [measure(x, t.labels, taken, quantiles) for x, t, taken in zip(logits, (task.validation, task.test), takens, strict=True)]
    return Option(EarlyExit(task.exits, heads, gates).eval(), takens[1], quantiles, results[0], results[1], ends)


def line(options: Sequence[Option], key: str) -> tuple[list[float], list[float]]:
    """Costs, ascending, and a metric on the test images: of the options and of the two policies that ask nobody."""
    points = sorted([(o.test["cost"], o.test[key]) for o in options] + [(end["cost"], end[key]) for end in options[-1].ends])
    return [x for x, _ in points], [y for _, y in points]


def gain(options: Sequence[Option], rival: Sequence[Option], key: str) -> float:
    """The metric minus that of the rival's curve at equal cost, mean over the options."""
    costs = [o.test["cost"] for o in options]
    return float(np.mean([o.test[key] for o in options] - np.interp(costs, *line(rival, key))))


def curve(options: Sequence[Option], key: str) -> float:
    """The metric's mean over the upper half of costs."""
    return float(np.interp(np.linspace(0.5, 1, 101), *line(options, key)).mean())


# -- what the report shows ---------------------------------------------------------------------------------------------------------
def show(run: Run, task: Task, curves: dict[str, list[Option]], chosen: Option) -> None:
    """Rows of the table; figures of the curve, of where images leave, of the time that each exit takes and of its calibration."""
    test, student, exits = task.data.test, chosen.student, range(len(task.exits.paths) + 1)
    example = test.take(torch.arange(min(256, len(test)))).images
    present.classifier(run, "whole net", task.exits.net, test)
    run.rows[-1] |= {"compute": 1.0, "throughput": rate(task.exits.net, test)}
    times = [cost(student.at(exit), example) for exit in exits]
    one, batch = [t["latency_ms"] for t in times], [1e3 * len(example) / t["throughput"] for t in times]
    shares = torch.bincount(chosen.taken, minlength=len(exits)).double() / len(chosen.taken)
    run.row(
        "student", **{k: chosen.test[k] for k in ("accuracy", "ece", "nll")}, parameters=times[0]["parameters"], bytes=times[0]["bytes"],
        latency_ms=float(shares @ torch.tensor(one, dtype=torch.float64)), compute=chosen.test["cost"], throughput=rate(student, test),
    )  # fmt: skip
    names = [*(f"exit {exit + 1}" for exit in exits[:-1]), "own head"]
    logits, labels = task.test.logits(student.heads), task.test.labels
    alone = [accuracy_of(logits[:, exit], labels) for exit in exits]

    def draw_curve(axes: Any) -> None:
        for label, options in curves.items():
            axes.plot(*line(options, "accuracy"), marker="o", markersize=3, label=label)
        axes.scatter(task.costs.tolist(), alone, marker="x", color="#888888", label="all leave at one exit")
        axes.scatter([chosen.test["cost"]], [chosen.test["accuracy"]], marker="*", s=120, label="delivered", zorder=5)
        axes.set(xlabel="share of the whole net's multiply-adds", ylabel="accuracy")
        axes.legend(fontsize=8)

    run.figure("accuracy against compute", draw_curve)
    run.figure("where the test images leave", lambda axes: draw_shares(axes, names, shares.tolist()))
    whole = cost(task.exits.net, example)
    series = {"one image": (one, whole["latency_ms"]), f"{len(example)} images": (batch, 1e3 * len(example) / whole["throughput"])}
    run.figure("time until each exit", lambda axes: draw_times(axes, names, series))
    run.figure("calibration of the exits", lambda axes: draw_calibration(axes, names, logits, labels, chosen.taken))


def rate(net: nn.Module, test: Split) -> float:
    """Test images a second in batches of 256, with whatever each image skips."""
    batches = [test.take(rows).images for rows in torch.arange(len(test)).split(256)]
    with torch.inference_mode():
        net(batches[0])
        start = time.perf_counter()
        for images in batches:
            net(images)
    return len(test) / (time.perf_counter() - start)
