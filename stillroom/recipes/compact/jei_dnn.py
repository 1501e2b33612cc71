"""JEI-DNN: exits and gates of a frozen classifier learn together for accuracy and compute (Regol et al. 2024, arXiv 2310.09163).

Exit l reads h_l, the block's output through the net's own final norm, with one linear layer, u_l; its gate is one linear layer on four
numbers of softmax(u_l), detached: p_max, entropy, p_(1) - p_(2), entropy of p^2 / sum p^2. With g_l = sigmoid(gate) and the cost c_l of
leaving at l (multiply-adds, 1 for the whole net with all exits):

    P_l = max(0, min(g_l, 1 - sum_{j<l} g_j)),   P_G = 1 - sum P_l
    leave at the first l with  clip(P_l / prod_{j<l} (1 - c~_j), 0, 1) = c~_l >= 0.5
    gates:  o = argmin_l CE(u_l, y) + lambda c_l;  mean of BCE(gate_l, 1[l >= o]), positives weighted by the rarity of their exit
    exits:  mean of r P_l CE(u_l, y),  r = sum CE / sum P CE

After a warm-up of the exits, sum_l (G + 1 - l) CE(u_l, y) with l from 0, in which each stops by its own validation accuracy, phases of gate
and exit steps alternate, gates first. The baseline is a threshold on p_max over exits that the plain sum trained for as many steps; curves
join operating points linearly, which is what mixing two of them at random attains.

Exact: the above, the weights' refresh after each epoch, two optimizers (nothing of the resting phase moves), net and final head frozen in
eval mode, conformal thresholds of each exit. `detach_ratio`: as released, r is not detached, so that sum P CE r is the unweighted sum in
value and gradient; the method as described needs it detached (default).
Shrunk: net and data (a spiral whose later turns need depth), epochs and phases.
Ours: the last epoch, where the reference keeps the best one by validation; phases counted from the end of the warm-up through all epochs,
where its batch counter may start again with each (unconfirmed); the delivered student is chosen by validation accuracy and cost.
Left out: other targets of the gates (only the best exit; later gates ignored), other losses of the exits ("single", "boosted"), p_max or
0/1 in place of CE in the levels, heads with hidden layers, a conformal threshold over all exits: its ablations, for which no claim stands;
published results, which are figures and were not read off.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

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
from stillroom.catalogue.idle import refuse_idle
from stillroom.core.config import Count, Share
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.data.augment import augmenter
from stillroom.data.batches import Batches
from stillroom.data.images import ImageData, hold_out
from stillroom.losses.divergences import cross_entropy
from stillroom.metrics.classification import accuracy
from stillroom.metrics.exits import Curve, exit_quantiles, gain_at_equal_cost, mean_of_upper_half, measured
from stillroom.vision import saving, trained
from stillroom.vision.exits import show, table


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
    """Most epochs of warm-up; fewer than `epochs`."""
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
ARMS = {"p_max": {"gate": "p_max"}, "jei-dnn": {}, "ratio as released": {"detach_ratio": False}}
CLAIMS = [
    Claim(
        "learned gates are more accurate than a threshold on p_max at equal cost", metric="accuracy_gain", arm="jei-dnn", versus="p_max",
        paper="better curves on CIFAR-10/100, SVHN (figures only)",
    ),
    Claim("over the upper half of costs they are no worse than by half a point", "accuracy_curve", "jei-dnn", "p_max", margin=-0.005),
    Claim(
        "their outputs are better calibrated at equal cost", metric="ece_gain", arm="jei-dnn", versus="p_max", better="lower",
        paper="lower calibration error (figures only)",
    ),
    Claim(
        "their conformal sets are smaller at equal cost", metric="set_size_gain", arm="jei-dnn", versus="p_max", better="lower",
        paper="smaller sets (figures only)",
    ),
    Claim("exits trained for the images that leave there are more accurate", "accuracy_gain", "jei-dnn", "ratio as released"),
    Claim("they are better calibrated", "ece_gain", "jei-dnn", "ratio as released", better="lower"),
    Claim("their conformal sets are smaller", "set_size_gain", "jei-dnn", "ratio as released", better="lower"),
]  # fmt: skip


def check(cfg: Config) -> None:
    """UserError for flags that leave nothing to train, or that this run would ignore."""
    if not cfg.tradeoffs:
        raise UserError("--tradeoffs needs at least one price.", code=2)
    if cfg.warmup_epochs >= cfg.epochs:
        raise UserError(f"--warmup-epochs {cfg.warmup_epochs} leaves no epoch of {cfg.epochs} for the gates; raise --epochs.", code=2)
    if cfg.gate != "learned":
        presets = Config(), full(), replace(Config(), **TINY)  # type: ignore[arg-type]  # a plain dict
        refuse_idle(cfg, presets, f"with --gate {cfg.gate}", "tradeoffs", "detach_ratio", "phase", "gate_optimizer")


def main(cfg: Config, run: Run, *, data: ImageData | None = None, teacher: nn.Module | None = None) -> dict[str, float]:
    """Train the teacher if need be, then exits and gates at every trade-off; evaluate, choose, save. Keywords replace what is named.
    UserError as for `check`."""
    check(cfg)
    data, validation = hold_out(data.to(run.device) if data else cfg.load(run), cfg.validation, run.seed)
    teacher = run.frozen(teacher if teacher is not None else cfg.classifier(run, data))
    exits = Exits(teacher, find_exits(teacher, cfg.exits))
    task = Task(exits, data, table(run, exits, validation), table(run, exits, data.test))

    rival = thresholds(cfg, run, task, "p_max")
    options = thresholds(cfg, run, task, cfg.gate) if cfg.gate != "learned" else [learned(cfg, run, task, x) for x in cfg.tradeoffs]
    chosen = choose(options, accuracy(task.validation.final, task.validation.labels) - cfg.allowed_drop)
    metrics = dict(chosen.test)
    for key in ("accuracy", "ece", "set_size"):
        metrics[f"{key}_gain"] = gain_at_equal_cost([(o.test["cost"], o.test[key]) for o in options], curve(rival, key))
        metrics[f"{key}_curve"] = mean_of_upper_half(curve(options, key))
    if run.plots and not run.rank:
        curves = {"threshold on p_max": curve(rival, "accuracy"), cfg.gate: curve(options, "accuracy")}
        show(run, chosen.student, data.test, task.test, chosen.taken, chosen.test, task.costs, curves)

    def save(student: EarlyExit, folder: Path) -> None:
        saving.save_classifier(teacher, folder)
        student.save(folder, conformal_alpha=cfg.conformal_alpha, conformal_thresholds=chosen.quantiles)

    run.save_student(chosen.student, save)
    return metrics


@dataclass(frozen=True)
class Task:
    """A frozen net with exits, and what these see of the validation and the test images."""

    exits: Exits
    data: ImageData
    validation: Table
    test: Table

    def heads(self) -> Heads:
        return Heads([feature.shape[1] for feature in self.test.features], len(self.data.classes)).to(self.test.final.device)

    @functools.cached_property
    def costs(self) -> Tensor:
        """(G + 1,) float64 in (0, 1]: multiply-adds up to each exit as a share of those of the whole net with all exits."""
        image = self.data.test.take(torch.zeros(1).long()).images
        counts = EarlyExit(self.exits, self.heads(), Threshold("p_max", 2.0)).multiply_adds(image)
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
            stage.update(optimizer, warmup=warmup_loss(heads(features), label, warm.resting.tolist()))
        elif joint and (step - int(warm.ended)) // cfg.phase % 2 == 0:
            with torch.no_grad():
                logits = torch.stack(heads(features), 1)
            best = level_losses(torch.cat([logits, final[:, None]], 1), label, task.costs, price).argmin(1)
            stage.update(gate_optimizer, gate=gate_loss(gates(logits), best, rarity))
        else:
            logits = torch.stack(heads(features), 1)
            ce = cross_entropy(logits, label[:, None].expand(-1, G))
            stage.update(optimizer, exits=matched(ce, exit_probabilities(torch.sigmoid(gates(logits))), cfg.detach_ratio) if joint else ce)
        if (step + 1) % epoch == 0 and stage.last_chunk:
            logits, labels = task.validation.logits(stage.unwrap(heads)), task.validation.labels
            if warm.active:
                warm.end_epoch(logits, labels, step + 1, (step + 1) // epoch >= cfg.warmup_epochs, cfg.patience)
            rarity.copy_(positive_weights(level_losses(logits, labels, task.costs, price).argmin(1), G))
    return stage.unwrap(heads), stage.unwrap(gates)


def warmup_loss(logits: Sequence[Tensor], label: Tensor, resting: Sequence[bool]) -> Tensor:
    """(B,): sum of (G + 1 - l) CE(u_l, y) over the exits l = 0..G-1 that do not rest, of logits [(B, C)]."""
    terms = [(len(logits) + 1 - exit) * cross_entropy(u, label) for exit, u in enumerate(logits) if not resting[exit]]
    return torch.stack(terms).sum(0)


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
    """r P_l CE (B, G): cross-entropies (B, G) weighted by the probability of leaving there (B, G + 1), which is a constant, at an unchanged
    total for each image. detach: whether r is a constant too."""
    weighted = p[:, :-1].detach() * ce
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


def choose(options: Sequence[Option], allowed: float) -> Option:
    """By the validation images: the cheapest option that is at least as accurate as `allowed`, or the most accurate one where none is."""
    good = [option for option in options if option.validation["accuracy"] >= allowed]
    return min(good, key=lambda o: o.validation["cost"]) if good else max(options, key=lambda o: o.validation["accuracy"])


def curve(options: Sequence[Option], key: str) -> Curve:
    """A metric on the test images against cost: of the options and of the two policies that ask nobody."""
    return sorted([(o.test["cost"], o.test[key]) for o in options] + [(end["cost"], end[key]) for end in options[-1].ends])
