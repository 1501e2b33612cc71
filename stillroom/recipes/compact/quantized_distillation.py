"""Quantized distillation: students whose weights lie on a few levels (Polino, Pascanu & Alistarh 2018, arXiv 1802.05668).

    loss = kd_weight T^2 KL(softmax(z_t / T) || softmax(z_s / T)) + (1 - kd_weight) CE(z_s, y)

"during" (QD): every forward and backward pass uses Q(w), the update goes to the full-precision w; alpha and beta of each bucket are those
of the current w. "points" (DQ): weights are frozen, and the points p that all buckets of a tensor share learn by the same loss,
dL/dp_j = sum of alpha g over the weights nearest to p_j, sorted again after each step; batch norm's running statistics adapt, and are
delivered. "after" (PM): a trained student is quantized once. kd_weight 0 is training without a teacher.

Exact: quantizer, buckets, straight-through, truncated and exact gradients, points' initialisation and the dealing of points, loss and its
weights. Shrunk: net and data; 30 % of the training labels are random, since on clean digits nothing is left to distil. Ours: the KL as a
mean over samples (`kl_reduction` "mean" divides it by the number of classes too, as the reference's old KLDivLoss did); the delivered,
quantized net is what is judged, where the reference validates on full-precision weights (here `shadow_accuracy`); points are trained after
the student has had its steps, and are held against the same steps in which batch norm alone adapts (`--no-point-learning`, which with
`--point-init uniform` is PM with its batch norm adapted); bits are also dealt in whole ones in no more room (`--deal bits`), since equally
many points in all (`--deal points`) take more bits of code; `full()` drops the rate three times where the reference halves it when
validation stalls. Left out: scaling by the largest or norm, clipping, "ask the teacher" masks, quantizing only every m-th batch, QD and DQ
in turns; the published tables, which were not re-read.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Interval
from torch import Tensor, nn
from torch.func import functional_call

from stillroom.adapt import quantizers
from stillroom.adapt.quantizers import Backward
from stillroom.catalogue.claims import Claim
from stillroom.catalogue.idle import refuse_idle
from stillroom.core.config import Count, Natural, Positive, Share, override
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.data.augment import augmenter
from stillroom.data.batches import Batches
from stillroom.data.images import ImageData
from stillroom.losses.divergences import cross_entropy, kl
from stillroom.metrics.classification import accuracy as accuracy_of
from stillroom.metrics.classification import evaluate
from stillroom.nets import packed
from stillroom.nets.packed import Coded
from stillroom.vision import hub, present, saving, signals, trained


@dataclass(frozen=True)
class Config(trained.TeacherConfig):
    """Laptop defaults: digits with noisy labels, a student of two bits."""

    labelled: Natural = 1197
    """Training images. 0: all."""
    noise: Share = 0.3
    """Share of the training labels that is replaced at random."""
    teacher_steps: Count = 300
    teacher_optimizer: Optimizer = Optimizer("adamw", 1e-3, weight_decay=0.1, schedule="cosine")
    student: str = "small:convnet-w8"
    """small:NAME, or hf:ID-or-folder, whose config is built with fresh weights."""
    steps: Count = 1000
    """Training steps of the student."""
    optimizer: Optimizer = Optimizer("sgd", 0.05, nesterov=True, weight_decay=2.2e-4, schedule="cosine")
    quantize: Literal["during", "after", "points", "none"] = "during"
    """QD, quantization of a trained student, learned points (DQ), or the trained student as it is."""
    bits: Annotated[int, Interval(ge=1, le=8)] = 2
    """Bits of a weight's code: 2^bits levels."""
    bucket: Natural = 256
    """Weights that share a range. 0: each tensor is one bucket."""
    backward: Backward = "straight-through"
    """Gradient through the quantizer while training."""
    stochastic: bool = False
    """Round at random while training, in proportion to the distance."""
    ends: bool = True
    """Quantize the first and the last parameter tensor too."""
    vectors: bool = True
    """Quantize biases and batch norm's parameters too, as the reference does."""
    temperature: Positive = 2.0
    """T of both softmaxes."""
    kd_weight: Share = 0.7
    """lambda_T, weight of the distillation term; cross-entropy has the rest."""
    kl_reduction: Literal["batchmean", "mean"] = "batchmean"
    """Mean over samples, or over samples and classes as in the reference."""
    point_steps: Count = 600
    """Training steps of the points (DQ)."""
    point_optimizer: Optimizer = Optimizer("sgd", 1e-3, nesterov=True, schedule="cosine")
    point_init: Literal["quantiles", "uniform"] = "quantiles"
    """Where the points start."""
    point_teacher: Literal["itself", "teacher"] = "itself"
    """Whose outputs the points learn from: the full-precision student's or the teacher's."""
    point_learning: bool = True
    """Let the points learn; without, the points' steps adapt batch norm alone (the control)."""
    deal: Literal["evenly", "points", "bits"] = "evenly"
    """2^bits points for every tensor, or more for those with large gradients: at equal points in all (the paper's way, which costs bits:
    five points take three), or in whole bits in no more room."""


def full() -> Config:
    """CIFAR-10 as in the reference: 200 epochs in batches of 25, SGD 1e-3 (Nesterov, L2 2.2e-4); points for 20 epochs at 1e-5. Its nets
    with large fully connected layers are replaced by residual ones, its rule of halving the rate when validation stalls by three drops."""
    drops = {"schedule": "step", "drops": (0.5, 0.7, 0.9), "drop_factor": 0.5}
    sgd: Any = Optimizer("sgd", 1e-3, nesterov=True, weight_decay=2.2e-4, **drops)  # type: ignore[arg-type]
    return Config(
        data="hub:uoft-cs/cifar10", labelled=0, noise=0.0, augment="crop-flip", teacher="small:preact-resnet18", teacher_steps=80_000,
        teacher_optimizer=Optimizer("sgd", 0.1, nesterov=True, weight_decay=5e-4, schedule="cosine"), student="small:resnet20",
        steps=400_000, batch_size=25, optimizer=sgd, point_steps=40_000, point_optimizer=Optimizer("sgd", 1e-5, nesterov=True),
    )  # fmt: skip


TINY = {"steps": 6, "teacher_steps": 6, "point_steps": 6}
ARMS: dict[str, dict[str, Any]] = {
    "after, 2 bits": {"quantize": "after"},
    "after, 2 bits, batch norm adapted": {"quantize": "points", "point_init": "uniform", "point_learning": False},
    "no teacher, 2 bits": {"kd_weight": 0.0},
    "quantized distillation, 2 bits": {},
    "points, 2 bits": {"quantize": "points"},
    "points at rest, 2 bits": {"quantize": "points", "point_learning": False},
    "points, 3 bits": {"quantize": "points", "bits": 3},
    "points, 3 bits dealt": {"quantize": "points", "bits": 3, "deal": "bits"},
    "full precision": {"quantize": "none"},
    "after, 4 bits": {"quantize": "after", "bits": 4},
    "no teacher, 4 bits": {"kd_weight": 0.0, "bits": 4},
    "quantized distillation, 4 bits": {"bits": 4},
}
CLAIMS = [
    Claim(
        "at 2 bits, training on quantized weights beats quantizing the distilled student by over 5 points",
        metric="accuracy", arm="quantized distillation, 2 bits", versus="after, 2 bits", margin=0.05,
    ),
    Claim(
        "and over 5 points where batch norm adapts to the quantized weights", metric="accuracy", arm="quantized distillation, 2 bits",
        versus="after, 2 bits, batch norm adapted", margin=0.05,
    ),
    Claim(
        "at 4 bits it is no worse than its full-precision teacher by 2 points", metric="over_teacher",
        arm="quantized distillation, 4 bits", versus=0.0, margin=-0.02, paper="similar accuracy, ten times smaller",
    ),
    Claim(
        "at 4 bits it is no worse than the distilled full-precision student by 2 points", metric="accuracy",
        arm="quantized distillation, 4 bits", versus="full precision", margin=-0.02,
    ),
    Claim("at 2 bits, the teacher helps", "accuracy", "quantized distillation, 2 bits", "no teacher, 2 bits"),
    Claim("at 4 bits, the teacher helps", "accuracy", "quantized distillation, 4 bits", "no teacher, 4 bits"),
    Claim("at 4 bits, it beats quantizing the distilled student", "accuracy", "quantized distillation, 4 bits", "after, 4 bits"),
    Claim("learning the points gains over 5 points on where they start", "gain", "points, 2 bits", 0.0, margin=0.05),
    Claim("learned points beat adapting batch norm alone for as many steps", "accuracy", "points, 2 bits", "points at rest, 2 bits"),
    # At 2 bits there is nothing to deal: one tensor holds three quarters of the weights and would have to pay with its second bit.
    Claim("at 3 bits, dealing whole bits by gradient, in no more room, helps", "accuracy", "points, 3 bits dealt", "points, 3 bits"),
]  # fmt: skip


def main(
    cfg: Config, run: Run, *, data: ImageData | None = None, teacher: nn.Module | None = None, student: nn.Module | None = None
) -> dict[str, float]:
    """Train the teacher if need be, distil, quantize, evaluate. `data`, `teacher` (trained) and `student` replace what the config names.

    UserError for flags that the way of quantizing would ignore.
    """
    check(cfg)
    data = data.to(run.device) if data else cfg.load(run, labelled=cfg.labelled, transfer=False, noise=cfg.noise)
    theirs: dict[str, float] = {}
    if cfg.kd_weight:
        teacher = run.frozen(teacher if teacher is not None else cfg.classifier(run, data))
        theirs = present.classifier(run, "teacher", teacher, data.test)
    net = hub.load_classifier(cfg.student, data=data, fresh=True) if student is None else student
    extra: dict[str, float] = {}
    coded: dict[str, Coded] | None = None
    if cfg.quantize != "during" or run.plots:
        whole = full_precision(cfg, run, data, teacher, copy.deepcopy(net))
        present.classifier(run, "full precision", whole, data.test)
    if cfg.quantize == "during":
        net = train(run, cfg, data, teacher, net, cfg.bits)
        before = copy.deepcopy(net)
        coded = encode(net, cfg)
    else:
        net, before = copy.deepcopy(whole), whole
        if cfg.quantize == "after":
            coded = encode(net, cfg)
        elif cfg.quantize == "points":
            coded, extra = learn_points(run, cfg, data, teacher, net)
    if coded is not None:
        deliver(net, coded)
    extra["shadow_accuracy"] = accuracy(before, data)
    run.save_student(net, functools.partial(saving.save_classifier, coded=coded))
    metrics = present.classifier(run, "student", net, data.test)
    if theirs:
        extra["over_teacher"] = metrics["accuracy"] - theirs["accuracy"]
    size = (run.folder / "student" / (saving.WEIGHTS if coded is None else packed.FILE)).stat().st_size
    run.rows[-1]["bytes"] = size
    if coded is not None and run.plots:
        largest = max(coded, key=lambda name: len(coded[name].codes))
        run.figure("weights before and after", lambda axes: draw_weights(axes, largest, before.get_parameter(largest), coded[largest]))
    return metrics | extra | {"file_bytes": size} | sizes(coded)


def sizes(coded: dict[str, Coded] | None) -> dict[str, float]:
    """Bits of a weight with its share of the buckets' ranges (two float32 each), and of an entropy-coded index pooled over tensors."""
    if coded is None:
        return {"bits_per_weight": 32.0}
    items = list(coded.values())
    counts = torch.bincount(torch.cat([item.codes.cpu() for item in items])).tolist()
    bits = sum(len(i.codes) * i.bits + 64 * len(i.alpha) for i in items) / sum(len(i.codes) for i in items)
    return {"bits_per_weight": bits, "entropy_coded_bits": quantizers.entropy_coded_bits(counts)}


def check(cfg: Config) -> None:
    """UserError for flags that would do nothing."""
    presets = (Config(), full(), override(Config(), TINY))
    if cfg.quantize != "points":
        points = ("point_steps", "point_optimizer", "point_init", "point_teacher", "deal", "point_learning")
        refuse_idle(cfg, presets, f"with --quantize {cfg.quantize}", *points)
    if cfg.quantize != "during":
        refuse_idle(cfg, presets, f"with --quantize {cfg.quantize}", "stochastic", "backward")
    if cfg.quantize == "none":
        refuse_idle(cfg, presets, "with --quantize none", "bits", "bucket", "ends", "vectors")
    if not cfg.point_learning:
        refuse_idle(cfg, presets, "with --no-point-learning", "point_optimizer", "point_teacher")
    if not cfg.kd_weight:
        teacher = ("teacher", "teacher_steps", "teacher_optimizer", "temperature", "kl_reduction", "point_teacher")
        refuse_idle(cfg, presets, "with --kd-weight 0", *teacher)


# -- training ----------------------------------------------------------------------------------------------------------------------
def full_precision(cfg: Config, run: Run, data: ImageData, teacher: nn.Module | None, net: nn.Module) -> nn.Module:
    """The student that learns as the quantized one does, on its full-precision weights."""
    inputs = (train, cfg.steps, cfg.batch_size, cfg.optimizer, cfg.temperature, cfg.kd_weight, cfg.kl_reduction, cfg.augment)
    with run.stage("full precision", shared=(*inputs, data, teacher if cfg.kd_weight else None, net)) as stage:
        return train(stage, cfg, data, teacher, net, bits=0)


def train(run: Run, cfg: Config, data: ImageData, teacher: nn.Module | None, net: nn.Module, bits: int) -> nn.Module:
    """Train on Q(w), or with bits = 0 on w itself. The optimizer, its weight decay and momentum only ever see w."""
    student, optimizer = run.trainable("student", net, cfg.optimizer)
    signal = signals.logits(run, teacher, data.train, augmented=cfg.augment != "none") if cfg.kd_weight and teacher is not None else None
    augment, batches = augmenter(cfg.augment, data.size), Batches(data.train, cfg.batch_size, run.seed)
    chosen = quantized(student, cfg) if bits else []
    for step in run.steps(cfg.steps):
        index, image, label = run.shard(batches(step))
        image, named = augment(image), dict(student.named_parameters())
        weights = {
            name: quantizers.uniform(named[name], bits, cfg.bucket, backward=cfg.backward, stochastic=cfg.stochastic) for name in chosen
        }
        logits = functional_call(student, weights, (image,))
        run.update(optimizer, **losses(cfg, logits, None if signal is None else signal(index, image), label))
    return run.unwrap(student)


def learn_points(
    run: Run, cfg: Config, data: ImageData, teacher: nn.Module | None, net: nn.Module
) -> tuple[dict[str, Coded], dict[str, float]]:
    """Points of every tensor, learned over the frozen weights of `net`, whose batch norms go on adapting."""
    whole = run.frozen(copy.deepcopy(net)) if cfg.point_teacher == "itself" else teacher
    signal = signals.logits(run, whole, data.train, augmented=cfg.augment != "none") if cfg.kd_weight and whole is not None else None
    augment, batches = augmenter(cfg.augment, data.size), Batches(data.train, cfg.batch_size, run.seed)
    named = {name: p for name, p in net.named_parameters() if name in quantized(net, cfg)}
    counts = dict(zip(named, deal(cfg, net, named, batches)))
    net.requires_grad_(False)
    scaled = {name: quantizers.scale(p, cfg.bucket) for name, p in named.items()}
    start = [quantizers.initial_points(scaled[name], counts[name], cfg.point_init, p) for name, p in named.items()]
    points, optimizer = run.trainable("points", [nn.Parameter(p) for p in start], cfg.point_optimizer)

    def codes() -> dict[str, Coded]:
        found = {}
        for (name, p), levels in zip(named.items(), points):
            near = quantizers.nearest(scaled[name].v, levels.detach()).reshape(-1)[: p.numel()]
            found[name] = Coded(near, levels.detach(), scaled[name].alpha, scaled[name].beta, cfg.bucket)
        return found

    probe = copy.deepcopy(net)
    deliver(probe, codes())
    first = accuracy(probe, data)
    run.track(net=net)  # its batch norms
    net.train()
    for step in run.steps(cfg.point_steps):
        index, image, label = run.shard(batches(step))
        image = augment(image)
        weights = {name: quantizers.learned(scaled[name], p, named[name]) for name, p in zip(named, points)}
        with torch.set_grad_enabled(cfg.point_learning):
            logits = functional_call(net, weights, (image,))
        if cfg.point_learning:
            run.update(optimizer, **losses(cfg, logits, None if signal is None else signal(index, image), label))
            with torch.no_grad():
                for p in points:
                    p.copy_(p.sort().values)
    coded = codes()
    deliver(net, coded)
    return coded, {"gain": accuracy(net, data) - first}


def losses(cfg: Config, logits: Tensor, answer: Tensor | None, label: Tensor) -> dict[str, Tensor]:
    """The two terms, one value per sample each."""
    if answer is None:
        return {"ce": cross_entropy(logits, label)}
    distance = kl(answer, logits, cfg.temperature, times_t2=True)
    if cfg.kl_reduction == "mean":
        distance = distance / logits.shape[1]
    return {"ce": (1 - cfg.kd_weight) * cross_entropy(logits, label), "kd": cfg.kd_weight * distance}


def deal(cfg: Config, net: nn.Module, named: dict[str, nn.Parameter], batches: Batches) -> list[int]:
    """Points per tensor; gradients are those of the first five batches."""
    if cfg.deal == "evenly":
        return [2**cfg.bits] * len(named)
    sizes, norms = [p.numel() for p in named.values()], gradient_norms(net, named, [batches(step) for step in range(5)])
    if cfg.deal == "points":
        return quantizers.allocate([2**cfg.bits] * len(named), sizes, norms)
    return [2**bits for bits in quantizers.allocate_bits(cfg.bits, sizes, norms)]


def gradient_norms(net: nn.Module, named: dict[str, nn.Parameter], batches: list[Any]) -> list[float]:
    """Norm of the mean gradient of the cross-entropy over these batches, per tensor; the net's buffers stay as they are."""
    twin = copy.deepcopy(net).train().requires_grad_(True)
    loss = torch.stack([cross_entropy(twin(image), label).mean() for _, image, label in batches]).mean()
    wanted = dict(twin.named_parameters())
    return [float(g.norm()) for g in torch.autograd.grad(loss, [wanted[name] for name in named])]


# -- the quantized net -------------------------------------------------------------------------------------------------------------
def quantized(net: nn.Module, cfg: Config) -> list[str]:
    """Names of the parameters that get codes."""
    names = [name for name, p in net.named_parameters() if cfg.vectors or p.ndim > 1]
    ends = [name for name, _ in net.named_parameters()]
    return [name for name in names if cfg.ends or name not in (ends[0], ends[-1])]


def encode(net: nn.Module, cfg: Config) -> dict[str, Coded]:
    """Codes of the net's weights on uniform levels."""
    levels = torch.linspace(0, 1, 2**cfg.bits)
    named, coded = dict(net.named_parameters()), {}
    for name in quantized(net, cfg):
        scaled = quantizers.scale(named[name].detach(), cfg.bucket)
        codes = quantizers.codes(named[name], cfg.bits, cfg.bucket)
        coded[name] = Coded(codes, levels.to(codes.device), scaled.alpha, scaled.beta, cfg.bucket)
    return coded


@torch.no_grad()
def deliver(net: nn.Module, coded: dict[str, Coded]) -> None:
    """Write the values of the codes into the net."""
    for name, parameter in net.named_parameters():
        if name in coded:
            parameter.copy_(coded[name].values().view_as(parameter))


def accuracy(net: nn.Module, data: ImageData) -> float:
    return accuracy_of(*evaluate(net, data.test))


def draw_weights(axes: Any, name: str, before: Tensor, coded: Coded) -> None:
    """One tensor scaled to its buckets: its full-precision weights, and how many of them each level holds."""
    v = quantizers.scale(before.detach(), coded.bucket).v.reshape(-1)[: before.numel()]
    axes.hist(v.tolist(), bins=60, alpha=0.5, label="before")
    share = torch.bincount(coded.codes.cpu(), minlength=len(coded.levels))
    axes.bar(coded.levels.tolist(), share.tolist(), width=0.015, color="C1", label="after")
    axes.set(xlabel=f"{name}, scaled to each bucket", ylabel="weights", yscale="log")
    axes.legend(fontsize=8)
