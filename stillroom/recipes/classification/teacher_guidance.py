"""Guided self-distillation: how much ground truth to keep when a model is refitted on its own outputs (Borup & Andersen 2021, 2102.13088).

Kernel ridge regression, S = K (K + lambda I)^-1, label_weight a (the weight of the GROUND TRUTH), yhat_0 = Y:

    target_t = a_t Y + (1 - a_t) yhat_{t-1},   yhat_t = S target_t,   f_t(x) = k(x, X) (K + lambda I)^-1 target_t

With K = V diag(d) V^T every step is a diagonal B_t on the labels' coordinates, b^(1) = s, b^(t) = s ((1 - a) b^(t-1) + a),
s = d/(d + lambda): one eigendecomposition gives all steps. For fixed a > 0 the limit is one ridge fit with lambda/a; for a = 0 it is
zero. f_t is affine in a_t, so the best weight on held-out targets has a closed form, a* = <Yv - h, g - h> / |g - h|^2, clipped to
[0, 1], with g the fit on labels alone and h the fit on previous predictions alone.

"kernel" trains nothing: it is the closed form. "deep" refits a classifier over generations with a MSE between probabilities and
estimates a* on validation predictions, with one further fit a generation.

Exact: targets, steps, limit, a* of the kernel part; the deep part's loss with means over classes and its norm term (code). Shrunk: ten
noisy sines of 25 points; an MLP on 248 noisy digits. Ours: the deep estimate of a*, elementary least squares (the paper's variant is
unconfirmed, as are its CIFAR-10 figures); the teacher in eval mode (the released code trains it along); the last net of a generation
is the next teacher; the validation split is class-balanced and never the test split. Left out: the paper's other kernels and its ResNets
on CIFAR-10 (`full()` is the reference code's example of them).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from stillroom.catalogue.claims import Claim
from stillroom.catalogue.idle import refuse_idle
from stillroom.core.config import Count, Natural, NonNegative, Positive, Share
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.data.augment import Augmentation, augmenter
from stillroom.data.batches import Batches
from stillroom.data.images import ImageData, Split, hold_out
from stillroom.data.load import ImageConfig
from stillroom.losses.divergences import mse_probs
from stillroom.metrics.classification import ClassificationMetrics, evaluate
from stillroom.vision import hub, present, saving


@dataclass(frozen=True)
class Config(ImageConfig):
    """The kernel case on ten draws of a noisy sine: the paper's toy with more data sets."""

    part: Literal["kernel", "deep"] = "kernel"
    """kernel: closed forms, nothing is trained; deep: generations of classifiers."""
    label_weight: Share = 0.35
    """a, the weight of the ground truth. 0 is pure self-distillation, 1 is refitting."""
    rule: Literal["fixed", "optimal"] = "optimal"
    """fixed: label_weight at every step; optimal: the closed form on held-out targets."""
    steps: Count = 20
    """Distillation steps; step 1 is the plain fit."""
    points: Count = 25
    """kernel: training points in [0, 1]."""
    held_out: Count = 40
    """kernel: validation points that a* is computed on."""
    draws: Count = 10
    """kernel: data sets per seed that the metrics are averaged over."""
    noise: Share = 0.5
    """kernel: standard deviation of the targets' noise."""
    gamma: Positive = 80.0
    """kernel: k(x, x') = exp(-gamma (x - x')^2) (code)."""
    ridge: Positive = 0.2
    """kernel: lambda, added once to K, without a factor n (code)."""
    labelled: Natural = 450
    """deep: training and validation images together. 0: all."""
    validation: Share = 0.45
    """deep: share of them kept for a*."""
    label_noise: Share = 0.3
    """deep: share of their labels that are replaced at random."""
    augment: Augmentation = "none"
    """deep: augmentation, the same for teacher and student."""
    student: str = "small:mlp-128"
    """deep: the network of every generation, each with fresh weights."""
    generations: Count = 4
    """deep: distillation steps."""
    fit_steps: Count = 500
    """deep: training steps per fit."""
    batch_size: Count = 32
    optimizer: Optimizer = Optimizer("adam", 1e-3)
    norm_weight: NonNegative = 1e-4
    """deep: weight of the sum over tensors of their L2 norms, not squared (code)."""


def full() -> Config:
    """Deep part as in the reference code's example: ResNet on CIFAR-10, Adam 1e-4, batch 16, 75 epochs, five steps, weight 0.6."""
    return Config(
        part="deep", rule="fixed", label_weight=0.6, data="hub:uoft-cs/cifar10", labelled=0, validation=0.1, label_noise=0.0,
        augment="crop-flip", student="small:preact-resnet18", generations=5, fit_steps=210_000, batch_size=16,
        optimizer=Optimizer("adam", 1e-4),
    )  # fmt: skip


TINY = {"part": "deep", "fit_steps": 6, "generations": 2}
FSDP2 = "nll"
ARMS: dict[str, dict[str, Any]] = {
    "one fit": {"rule": "fixed", "label_weight": 1.0},
    "no labels": {"rule": "fixed", "label_weight": 0.0},
    "labels 0.35": {"rule": "fixed"},
    "optimal": {},
    "deep, one long fit": {"part": "deep", "generations": 1, "fit_steps": 3500},
    "deep, no labels": {"part": "deep", "rule": "fixed", "label_weight": 0.0},
    "deep, labels 0.3": {"part": "deep", "rule": "fixed", "label_weight": 0.3},
    "deep, labels alone": {"part": "deep", "rule": "fixed", "label_weight": 1.0, "fit_steps": 875},
    "deep, optimal": {"part": "deep"},
}
CLAIMS = [
    Claim(
        "the best weight beats a single fit", metric="mse", arm="optimal", versus="one fit", better="lower",
        paper="one data set: 0.165, with a fixed weight 0.149",
    ),
    Claim("and a fixed one", metric="mse", arm="optimal", versus="labels 0.35", better="lower", paper="0.149 at best with a fixed weight"),
    Claim("with some ground truth 20 steps beat a single fit", metric="mse", arm="labels 0.35", versus="one fit", better="lower"),
    Claim("without ground truth 20 steps collapse, below a single fit", metric="mse", arm="one fit", versus="no labels", better="lower"),
    Claim("the limit is one ridge fit with lambda / a", metric="limit_gap", arm="labels 0.35", versus=1e-8, better="lower"),
    Claim("the closed form finds the best weight of a grid of 1001", metric="grid_regret", arm="optimal", versus=1e-8, better="lower"),
    Claim("deep: generations beat retraining for as many steps", metric="accuracy", arm="deep, optimal", versus="deep, labels alone"),
    Claim(
        "deep: the estimated weight, with one more fit a generation, is no worse than a fixed one by a point", metric="accuracy",
        arm="deep, optimal", versus="deep, labels 0.3", margin=-0.01,
    ),
    Claim(
        "deep: with some ground truth they are no worse than without by more than a point", metric="accuracy", arm="deep, labels 0.3",
        versus="deep, no labels", margin=-0.01,
    ),
    Claim("deep: generations beat a single fit of as many steps", metric="accuracy", arm="deep, optimal", versus="deep, one long fit"),
]  # fmt: skip


KERNEL = ("steps", "points", "held_out", "draws", "noise", "gamma", "ridge")
DEEP = ("data", "limit", "image_size", "skip_bad", "labelled", "validation", "label_noise", "augment", "student", "generations",
        "fit_steps", "batch_size", "optimizer", "norm_weight")  # fmt: skip


def main(cfg: Config, run: Run, *, data: ImageData | None = None) -> dict[str, float]:
    """The metrics of the chosen part: mean squared error to the noiseless sine, or a classifier's. `data` replaces the config's.

    UserError for flags of the other part, and for a weight that the rule computes.
    """
    presets = (Config(), full())
    refuse_idle(cfg, presets, f"in the {cfg.part} part", *(DEEP if cfg.part == "kernel" else KERNEL))
    if cfg.rule == "optimal":
        refuse_idle(cfg, presets, "with --rule optimal, which computes it", "label_weight")
    return kernel(cfg, run) if cfg.part == "kernel" else deep(cfg, run, data)


# -- the kernel part ---------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Smoother:
    """Every self-distillation step of kernel ridge regression from one eigendecomposition. All float64.

    K (n, n) kernel matrix, Y (n, outputs) targets, ridge lambda > 0. B_t is kept as the vector b (n,), with B_0 = I.
    """

    values: Tensor
    vectors: Tensor
    coordinates: Tensor
    ridge: float

    @classmethod
    def of(cls, kernel: Tensor, targets: Tensor, ridge: float) -> Smoother:
        values, vectors = torch.linalg.eigh(kernel)
        return cls(values.clamp_min(0), vectors, vectors.T @ targets, ridge)

    def start(self) -> Tensor:
        return torch.ones_like(self.values)

    def next(self, b: Tensor, label_weight: float) -> Tensor:
        """b^(t) from b^(t-1): the prediction on the training points is V (b * V^T Y)."""
        return self.values / (self.values + self.ridge) * ((1 - label_weight) * b + label_weight)

    def predict(self, cross: Tensor, b: Tensor, label_weight: float) -> Tensor:
        """f_t at m points with cross kernel (m, n), from b^(t-1): the fit is to target_t, which mixes labels and past predictions."""
        weights = ((1 - label_weight) * b + label_weight) / (self.values + self.ridge)
        return cross @ (self.vectors @ (weights[:, None] * self.coordinates))

    def limit(self, cross: Tensor, label_weight: float) -> Tensor:
        """f_infinity for label_weight > 0: the ridge fit with lambda / label_weight."""
        return cross @ (self.vectors @ (self.coordinates / (self.values + self.ridge / label_weight)[:, None]))


def best_weight(held_out: Tensor, on_labels: Tensor, on_past: Tensor) -> float:
    """a* minimising |a g + (1 - a) h - Y|^2 over all entries, g `on_labels`, h `on_past`; clipped to [0, 1]. 1 when g = h."""
    gap = on_labels - on_past
    square = float(gap.square().sum())
    return min(1.0, max(0.0, float(((held_out - on_past) * gap).sum()) / square)) if square else 1.0


def rbf(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    return (-gamma * (x[:, None] - y[None, :]) ** 2).exp()


def kernel(cfg: Config, run: Run) -> dict[str, float]:
    results = [kernel_draw(cfg, run.seed * 1000 + draw) for draw in range(cfg.draws)]
    curves = torch.tensor([curve for curve, _ in results]).mean(0)
    metrics = {key: sum(extra[key] for _, extra in results) / cfg.draws for key in results[0][1]}
    metrics = {"mse": float(curves[-1]), "mse_first": float(curves[0]), "mse_best": float(curves.min()), **metrics}
    run.row("student", **{k: metrics[k] for k in ("mse", "mse_first", "mse_best")})
    run.figure("error over steps", lambda axes: draw_steps(axes, cfg, run.seed * 1000))
    run.figure("fits", lambda axes: draw_fits(axes, cfg, run.seed * 1000))
    return metrics


def sine(cfg: Config, seed: int) -> dict[str, Tensor]:
    """x, y training; xv, yv held out; grid x with the noiseless sine. float64, columns (n, 1)."""
    draw = torch.Generator().manual_seed(seed)
    x, xv = (torch.rand(n, generator=draw, dtype=torch.float64) for n in (cfg.points, cfg.held_out))
    y, yv = ((2 * math.pi * p).sin() + cfg.noise * torch.randn(p.shape, generator=draw, dtype=torch.float64) for p in (x, xv))
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    return {"x": x, "y": y[:, None], "xv": xv, "yv": yv[:, None], "grid": grid, "truth": (2 * math.pi * grid).sin()[:, None]}


def kernel_draw(cfg: Config, seed: int) -> tuple[list[float], dict[str, float]]:
    """Error to the noiseless sine after every step of one data set, and checks of the closed forms."""
    d = sine(cfg, seed)
    fit = Smoother.of(rbf(d["x"], d["x"], cfg.gamma), d["y"], cfg.ridge)
    cross, held = rbf(d["grid"], d["x"], cfg.gamma), rbf(d["xv"], d["x"], cfg.gamma)
    b, errors, regret, used = fit.start(), [], 0.0, 0.0
    for _ in range(cfg.steps):
        g, h = fit.predict(held, b, 1.0), fit.predict(held, b, 0.0)
        weight = best_weight(d["yv"], g, h) if cfg.rule == "optimal" else cfg.label_weight
        if cfg.rule == "optimal":
            grid = torch.linspace(0, 1, 1001, dtype=torch.float64)
            losses = [(a * g + (1 - a) * h - d["yv"]).square().mean() for a in (weight, *grid)]
            regret = max(regret, float(losses[0] - torch.stack(losses[1:]).min()))
        errors.append(float((fit.predict(cross, b, weight) - d["truth"]).square().mean()))
        b, used = fit.next(b, weight), weight
    extra = {"label_weight": used}
    if cfg.rule == "optimal":
        extra["grid_regret"] = regret
    elif cfg.label_weight:
        for _ in range(200):
            b = fit.next(b, cfg.label_weight)
        extra["limit_gap"] = float((fit.predict(cross, b, cfg.label_weight) - fit.limit(cross, cfg.label_weight)).abs().max())
    return errors, extra


def draw_steps(axes: Any, cfg: Config, seed: int) -> None:
    for name, changes in {"a = 0": (0.0, "fixed"), "a = 0.35": (0.35, "fixed"), "optimal a": (0.0, "optimal")}.items():
        arm = Config(**{**cfg.__dict__, "label_weight": changes[0], "rule": changes[1], "steps": 20})
        axes.plot(range(1, 21), kernel_draw(arm, seed)[0], label=name)
    axes.set(xlabel="distillation step", ylabel="error to the noiseless sine")
    axes.legend()


def draw_fits(axes: Any, cfg: Config, seed: int) -> None:
    d = sine(cfg, seed)
    fit = Smoother.of(rbf(d["x"], d["x"], cfg.gamma), d["y"], cfg.ridge)
    cross, b = rbf(d["grid"], d["x"], cfg.gamma), fit.start()
    for _ in range(19):
        b = fit.next(b, 0.0)
    lines = {"first fit": fit.predict(cross, fit.start(), 1.0), "20 steps, a = 0": fit.predict(cross, b, 0.0)}
    axes.scatter(d["x"].tolist(), d["y"].flatten().tolist(), s=14, alpha=0.6)
    for name, line in {**lines, "limit, a = 0.35": fit.limit(cross, 0.35)}.items():
        axes.plot(d["grid"].tolist(), line.flatten().tolist(), label=name)
    axes.plot(d["grid"].tolist(), d["truth"].flatten().tolist(), linestyle="--", linewidth=1, color="#888888", label="truth")
    axes.legend(fontsize=8)


# -- the deep part -----------------------------------------------------------------------------------------------------------------
def deep(cfg: Config, run: Run, data: ImageData | None) -> dict[str, float]:
    data = data.to(run.device) if data else cfg.load(run, labelled=cfg.labelled, transfer=False, noise=cfg.label_noise)
    data, held_out = hold_out(data, round(cfg.validation * len(data.train)), run.seed)
    train = data.train
    truth = one_hot(held_out.labels, len(data.classes)).double()
    probs = lambda net: evaluate(net, held_out)[0].double().softmax(-1)

    teacher = fit_net(cfg, run.stage("generation 1"), data, train, None, 1.0)
    first, weights = probs(teacher), [1.0]
    for generation in range(2, cfg.generations + 1):
        weight, student = cfg.label_weight, None
        if cfg.rule == "optimal":  # two fits a step: the one without labels gives h, and is itself the answer when a* = 0
            student = fit_net(cfg, run.stage(f"generation {generation} without labels"), data, train, teacher, 0.0)
            weight = best_weight(truth, first, probs(student))
        if student is None or weight > 0.01:
            student = fit_net(cfg, run.stage(f"generation {generation}"), data, train, teacher, weight)
        teacher = student
        weights.append(weight)
    metrics = present.classifier(run, "student", teacher, data.test)
    run.figure("ground truth's weight per generation", lambda axes: draw_weights(axes, weights))
    run.save_student(teacher, saving.save_classifier)
    return {**metrics, "label_weight": weights[-1], "validation": ClassificationMetrics.of(probs(teacher).log(), held_out.labels).accuracy}


def fit_net(cfg: Config, stage: Run, data: ImageData, train: Split, teacher: Any, label_weight: float) -> Any:
    """One generation: a fresh network on label_weight MSE(p, onehot) + (1 - label_weight) MSE(p, p_teacher), both in probability space
    with a mean over classes, which the weights of other terms must be read against. The teacher sees the same augmented batch."""
    net, optimizer = stage.trainable("student", hub.load_classifier(cfg.student, data=data, fresh=True), cfg.optimizer)
    teacher = stage.frozen(stage.unwrap(teacher)) if teacher is not None else None
    augment, batches, classes = augmenter(cfg.augment, data.size), Batches(train, cfg.batch_size, stage.seed), len(data.classes)
    for step in stage.steps(cfg.fit_steps):
        _, image, label = stage.shard(batches(step))
        image = augment(image)
        answer = None
        if teacher is not None:
            with torch.no_grad():
                answer = teacher(image).softmax(-1)
        parts = guided(net(image), one_hot(label, classes).float(), answer, label_weight)
        if cfg.norm_weight:
            parts["norm"] = cfg.norm_weight * sum(torch._foreach_norm(list(net.parameters())), torch.zeros((), device=stage.device))
        stage.update(optimizer, **parts)
    return net


def guided(logits: Tensor, labels: Tensor, teacher: Tensor | None, label_weight: float) -> dict[str, Tensor]:
    """label_weight MSE(p, labels) and (1 - label_weight) MSE(p, teacher), means over classes, per image: all (B, C) -> (B,)."""
    classes = labels.shape[-1]
    parts = {"labels": label_weight / classes * mse_probs(logits, labels)}
    if teacher is not None:
        parts["teacher"] = (1 - label_weight) / classes * mse_probs(logits, teacher)
    return parts


def draw_weights(axes: Any, weights: Sequence[float]) -> None:
    axes.plot(range(1, len(weights) + 1), list(weights), marker="o")
    axes.set(xlabel="generation", ylabel="weight of the ground truth", ylim=(-0.05, 1.05))
