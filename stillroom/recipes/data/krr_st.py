"""KRR-ST: a few learned images and target features pre-train like the whole unlabelled set (Lee et al. 2023, arXiv 2310.06511).

    inner:  theta*(X, Y) = argmin 1/2 |Y - f_theta(X)|^2        no augmentation, no randomness
    outer:  min over X, Y of 1/2 |g(x) - f_theta*(x)|^2         over real images x; g is a self-supervised teacher

A random inner loss would make the outer gradient biased: it holds the inverse of an expected Hessian. The inner problem is solved for
the linear head alone, by kernel ridge regression on the features of a network drawn from a pool of partly trained ones, which stand
for the inner run at different ages. Gradients reach X (through both kernels) and Y only. With X and Y detached the drawn network
then takes one step on them, or starts anew at the end of its lifetime.

Exact: the kernels with their bias column, the ridge relative to the trace and constant to the gradient, eval mode in the outer
and train mode in the pool's steps, means over batch and feature dimensions, pre-training and fine-tuning as published.
Shrunk: networks, data, steps; the unlabelled source is part of the classes of a labelled set and the target task the others, with
few labels. The probe is the optimum that the paper's SGD steers to.
Ours: ages restart at 0 (the published code forgets to reset them, so that its pool drifts towards untrained networks); X lives in the
space of normalised pixels like the real images (the published code starts it from pixels that are not normalised); the teacher's
features are standardised, so that 1 is the error of predicting their mean; the random inner problem is one with pixel noise on X.
Unconfirmed in our sheet: the settings of the Barlow Twins teacher, and the paper's accuracies.
Left out: labels in place of features (FRePo; another method), and the set as transfer set for data-free distillation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F

from stillroom.adapt.pool import Pool
from stillroom.adapt.ridge import ridge_head
from stillroom.catalogue.claims import Claim
from stillroom.catalogue.idle import refuse_idle
from stillroom.core.config import Count, Natural, NonNegative, Positive, override
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.data.augment import Augmentation, augmenter
from stillroom.data.batches import Batches
from stillroom.data.clusters import k_means, nearest
from stillroom.data.images import ImageData, MemorySplit, Split, balanced_rows, of_classes
from stillroom.data.load import ImageConfig
from stillroom.metrics.classification import ClassificationMetrics, evaluate
from stillroom.metrics.probe import linear_probe
from stillroom.nets import wrapped
from stillroom.nets.build import build, with_head
from stillroom.vision import hub, saving, trained, twins


@dataclass(frozen=True)
class Config(ImageConfig):
    """Laptop defaults: 20 images distilled from the digits 0 to 5; the target task is 6 to 9 with one label each."""

    data: str = "digits"
    """Source: digits, shapes, a folder of image folders or parquet files, or hub:ID. Its labels are not used."""
    held_out: Count = 4
    """The last classes of `data`, kept out of the source: they are the target task, unless `target` names one."""
    target: str = ""
    """A labelled set of its own as target task; the source then has all classes of `data`."""
    shots: Natural = 1
    """Labelled images per class of the target task. 0: all its training images."""
    augment: Augmentation = "none"
    """Augmentation of the outer steps' real images, which the teacher and the network see alike."""
    teacher: str = "small:convnet-avg-32x64x32"
    """small:NAME is trained by Barlow Twins on the source; hf:ID-or-folder or run:FOLDER is taken as it is."""
    barlow_twins: twins.BarlowTwins = twins.BarlowTwins()
    """Training of a small: teacher."""
    images: Count = 20
    """Size m of the distilled set."""
    init: Literal["random", "k-means"] = "random"
    """Real images to start from: random ones, or those nearest to the k-means centres of the teacher's features."""
    learn: Literal["both", "images", "targets"] = "both"
    """What the outer steps change."""
    steps: Natural = 600
    """Outer steps; 0 keeps the real images with the teacher's features."""
    batch_size: Count = 256
    """Real images per outer step."""
    optimizer: Optimizer = Optimizer("adamw", 3e-2, schedule="linear")
    """Of the distilled set."""
    ridge: Positive = 1e-6
    """The ridge's share of the trace of the distilled set's kernel."""
    net: str = "small:convnet-avg-16x32x64"
    """Network of the pool, and the one that is pre-trained on the set."""
    pool: Count = 5
    """Networks in the pool, L."""
    lifetime: Annotated[int, Ge(2)] = 100
    """Age at which a network of the pool starts anew, T."""
    inner: Optimizer = Optimizer("sgd", 0.1, weight_decay=1e-3)
    """Of the pool's networks and of pre-training."""
    inner_noise: NonNegative = 0.0
    """Ablation: a random inner problem, with pixel noise of this deviation on X in the pool's steps and the outer step's kernels."""
    pretrain_steps: Natural = 300
    pretrain_batch: Count = 256
    repeats: Count = 3
    """Networks that are pre-trained on the set; metrics are their mean."""
    others: tuple[str, ...] = ("small:mlp-64x64", "small:convnet-w16")
    """Other architectures to pre-train on the set."""
    finetune_steps: Natural = 100
    finetune_batch: Count = 256
    finetune_optimizer: Optimizer = Optimizer("sgd", 0.01, weight_decay=5e-4, schedule="cosine")
    finetune_augment: Augmentation = "shift"


def full() -> Config:
    """CIFAR-100 in the released code. Its target tasks are other sets (CIFAR-10, Aircraft, Cars, CUB, Dogs, Flowers): name one as
    `target`. Teacher: a ResNet-18 there, its pre-activation form here; 1000 epochs of pre-training are 4000 steps. The other
    architectures there are VGG11, AlexNet, MobileNet and ResNet10."""
    return Config(
        data="hub:uoft-cs/cifar100", target="hub:uoft-cs/cifar10", shots=0, augment="crop-flip", teacher="small:preact-resnet18",
        barlow_twins=twins.BarlowTwins(steps=200_000, batch_size=256, augment="crop-flip"), images=1000, steps=160_000, batch_size=1024,
        optimizer=Optimizer("adamw", 1e-4, schedule="linear"), net="small:convnet-avg-128x256x512", pool=10, lifetime=1000,
        pretrain_steps=4000, others=("small:resnet20", "small:mlp-512x512"), finetune_steps=10_000, finetune_augment="crop-flip",
    )  # fmt: skip


TINY = {"barlow_twins.steps": 4, "pool": 2, "lifetime": 4, "steps": 4, "pretrain_steps": 4, "finetune_steps": 4, "repeats": 1}
FSDP2 = "mse"
ARMS: dict[str, dict[str, Any]] = {
    "no pre-training": {"steps": 0, "pretrain_steps": 0},
    "random images": {"steps": 0},
    "k-means images": {"steps": 0, "init": "k-means"},
    "krr-st": {},
    "images learned": {"learn": "images"},
    "targets learned": {"learn": "targets"},
    "random inner problem": {"inner_noise": 0.5},
}
_PAPER = "CIFAR-100 to CUB 18.5 -> 25.3 %, to Flowers 58.8 -> 67.9 % against no pre-training (unconfirmed)"
_NETWORKS = {"mse": "", "mse small:mlp-64x64": ", also by an MLP", "mse small:convnet-w16": ", also by another convolutional network"}
_VERSUS = {
    "random images": "pre-training on the set brings a network nearer to the teacher on unseen images than random images do",
    "k-means images": "nearer than real images at the k-means centres do",
    "targets learned": "images and targets learned together beat targets alone",
    "images learned": "and images alone",
    "random inner problem": "an inner problem without randomness beats a random one",
}
CLAIMS = [
    *(Claim(f"{text}{by}", metric, "krr-st", versus, "lower") for versus, text in _VERSUS.items() for metric, by in _NETWORKS.items()),
    Claim("frozen features transfer better than those of real images", "probe", "krr-st", "random images"),
    Claim("and than those of an untrained network", "probe", "krr-st", "no pre-training", paper=_PAPER),
    Claim("fine-tuned on the target task, the network gains over no pre-training", "finetune", "krr-st", "no pre-training", paper=_PAPER),
]


def main(
    cfg: Config, run: Run, *, data: ImageData | None = None, target: ImageData | None = None, teacher: nn.Module | None = None
) -> dict[str, float]:
    """Train the teacher if need be, distil, pre-train networks on the set, and try them on the target task.

    `data` (its source classes are used), `target` and `teacher` (images to features) replace what the config names.
    """
    source, task = splits(cfg, run, data, target)
    g = run.frozen(Teacher(find_teacher(cfg, run, source, teacher).to(run.device), source.train))
    known = evaluate(g, source.test)[0]
    fresh = partial(fresh_net, source, outputs=known.shape[1])

    start = source.train.take(first_rows(cfg, run, g, source.train)).images
    distilled = Distilled(start, g(start).detach(), source)
    if cfg.steps:
        distil(cfg, run, source, g, distilled, partial(fresh, cfg.net))

    images, targets = distilled.pixels.detach(), distilled.targets.detach()
    metrics: dict[str, list[float]] = {}
    student: Any = None
    for name, repeats in ((cfg.net, cfg.repeats), *((other, 1) for other in cfg.others)):
        for i in range(repeats):
            with run.stage(f"pretrain-{name.partition(':')[2]}-{i}") as stage:
                net = pretrain(cfg, stage, fresh(name), images, targets)
            error = float(F.mse_loss(evaluate(net, source.test)[0].float(), known.float()))
            metrics.setdefault("mse" if name == cfg.net else f"mse {name}", []).append(error)
            if name == cfg.net:
                student = net
                metrics.setdefault("probe", []).append(probe(task, wrapped.Encoder(net)))
                with run.stage(f"finetune-{i}") as stage:
                    metrics.setdefault("finetune", []).append(finetune(cfg, stage, net, task))
    means = {name: sum(values) / len(values) for name, values in metrics.items()}

    run.row("teacher", mse=0.0, probe=probe(task, g))
    run.row("student", **means)
    run.image("distilled images", images[:64])
    run.image("the real images that they start from", start[:64])
    run.save_student(student, partial(save, images=images, targets=targets))
    return means


# -- equations ---------------------------------------------------------------------------------------------------------------------
def outer_loss(synthetic: Tensor, targets: Tensor, real: Tensor, known: Tensor, ridge: float) -> Tensor:
    """(b,) mean over dimensions of | K_ts (K_ss + lambda I)^-1 Y - g(x) |^2, the ridge head fitted to features `synthetic` (m, h) of X and
    `targets` Y (m, d), at features `real` (b, h) whose teacher says `known` (b, d). lambda is `ridge` of the trace of K_ss."""
    return (ridge_head(synthetic, real, targets, ridge) - known).square().mean(1)


def inner_loss(predicted: Tensor, targets: Tensor) -> Tensor:
    """(m,) mean over dimensions of | f_theta(X) - Y |^2, on which networks are pre-trained."""
    return (predicted - targets).square().mean(1)


# -- data and teacher --------------------------------------------------------------------------------------------------------------
def splits(cfg: Config, run: Run, data: ImageData | None, target: ImageData | None) -> tuple[ImageData, ImageData]:
    """The source without training labels, and the target task with its classes counted from 0. UserError when they do not fit."""
    data = data.to(run.device) if data else cfg.load(run)
    target = target or (cfg.load(run, cfg.target) if cfg.target else None)
    if target:
        refuse_idle(cfg, _presets(), "beside a target task of its own, where the source has all classes", "held_out")
    first = len(data.classes) - (0 if target else cfg.held_out)
    if first < 1:
        raise UserError(f"--held-out {cfg.held_out} leaves no source class: {data.name} has {len(data.classes)} classes.", code=2)
    if target and (target.channels, target.size) != (data.channels, data.size):
        raise UserError(
            f"{target.name} has {target.channels} channels of {target.size} pixels a side, but {data.name} has {data.channels} of "
            f"{data.size}: give --image-size to scale both alike."
        )
    train, test = (of_classes(split, 0, first) for split in (data.train, data.test))
    if cfg.images > len(train):
        raise UserError(f"--images {cfg.images} is more than the {len(train)} images of the source.", code=2)
    if len({cfg.net, *cfg.others}) <= len(cfg.others):
        raise UserError(f"--others {' '.join(cfg.others)}: a network is named twice, or is --net itself.", code=2)
    unlabelled = train.subset(torch.arange(len(train)), torch.full_like(train.labels, -1))
    source = ImageData.of(data.name, unlabelled, test, data.classes[:first])
    low, target = (0, target.to(run.device)) if target else (first, data)
    few, test = (of_classes(split, low, len(target.classes)) for split in (target.train, target.test))
    classes = target.classes[low:]
    if cfg.shots:
        few = few.subset(balanced_rows(few.labels, cfg.shots * len(classes), torch.Generator().manual_seed(run.seed)).to(few.device))
    return source, ImageData.of("target", few, test, classes)


class Teacher(nn.Module):
    """g: images (B, C, H, W) in [0, 1] to features (B, d) of `encoder`, standardised over `source`."""

    def __init__(self, encoder: nn.Module, source: Split):
        super().__init__()
        self.encoder, every = encoder, evaluate(encoder, source)[0]
        self.register_buffer("mean", every.mean(0))
        self.register_buffer("std", every.std(0).clamp_min(1e-6))

    def forward(self, images: Tensor) -> Tensor:
        return (self.encoder(images) - self.mean) / self.std


def find_teacher(cfg: Config, run: Run, source: ImageData, given: nn.Module | None = None) -> nn.Module:
    """A pretrained encoder as it is, or a small one trained on the source, once for all runs that want the same."""
    if given is not None or not cfg.teacher.startswith("small:"):
        refuse_idle(cfg, _presets(), "on a teacher that is taken as it is", "barlow_twins")
        return given if given is not None else hub.load_encoder(cfg.teacher, data=source)
    return cfg.barlow_twins.encoder(run, cfg.teacher.removeprefix("small:"), source)


def _presets() -> tuple[Config, ...]:
    return Config(), full(), override(Config(), TINY)


# -- the distilled set -------------------------------------------------------------------------------------------------------------
def fresh_net(source: ImageData, name: str, outputs: int) -> Any:
    kind, _, net = name.partition(":")
    if kind != "small":
        raise UserError(f"{name!r}: the networks of krr-st are trained from the start, so they are small:NAME.", code=2)
    return build(net, classes=outputs, channels=source.channels, size=source.size, mean=source.mean, std=source.std)


def first_rows(cfg: Config, run: Run, teacher: nn.Module, source: Split) -> Tensor:
    """(m,) positions of the real images that the set starts from."""
    if cfg.init == "random":
        return torch.randperm(len(source))[: cfg.images]
    features = evaluate(teacher, source)[0]
    return nearest(features, k_means(features, cfg.images, run.seed)[0])


class Distilled:
    """X as normalised pixels (m, C, H, W) and Y (m, d), both learnable."""

    def __init__(self, pixels: Tensor, targets: Tensor, source: ImageData):
        self.mean, self.std = (torch.tensor(x, device=pixels.device).view(-1, 1, 1) for x in (source.mean, source.std))
        self.images, self.targets = nn.Parameter((pixels - self.mean) / self.std), nn.Parameter(targets.clone())

    @property
    def pixels(self) -> Tensor:
        """X in the scale of real images, which every network takes (and normalises itself); not confined to [0, 1]."""
        return self.images * self.std + self.mean


def distil(cfg: Config, run: Run, source: ImageData, teacher: nn.Module, distilled: Distilled, fresh: Callable[[], nn.Module]) -> None:
    """The outer loop: learns `distilled` in place."""
    learned = {"both": [distilled.images, distilled.targets], "images": [distilled.images], "targets": [distilled.targets]}[cfg.learn]
    _, optimizer = run.trainable("distilled", learned, cfg.optimizer)
    pool = Pool(fresh, cfg.inner, cfg.pool, cfg.lifetime, run.seed, run.device)
    run.track(pool=pool)

    def seen() -> Tensor:
        """X as the inner problem sees it: in the ablation with noise, one draw for all processes and chunks, which hold the same pool."""
        if not cfg.inner_noise:
            return distilled.pixels
        eps = torch.randn(distilled.images.shape, generator=run.common).to(run.device)
        return distilled.pixels + cfg.inner_noise * distilled.std * eps

    goals = torch.randint(1, cfg.lifetime, (cfg.pool,), generator=run.common).tolist()
    for age in run.steps(max(goals), "pool"):
        for slot in range(cfg.pool):
            if run.last_chunk and age < goals[slot]:
                pool.advance(slot, seen().detach(), distilled.targets.detach())

    augment, batches = augmenter(cfg.augment, source.size), Batches(source.train, cfg.batch_size, run.seed)
    for step in run.steps(cfg.steps):
        slot = int(torch.randint(cfg.pool, (), generator=run.common))
        net = pool.frozen(slot)
        with torch.no_grad():
            real = augment(run.shard(batches(step)).images)
            known, features = teacher(real), net.features(real)
        run.update(optimizer, outer=outer_loss(net.features(seen()), distilled.targets, features, known, cfg.ridge))
        if run.last_chunk:
            pool.advance(slot, seen().detach(), distilled.targets.detach())
        run.log(age=pool.ages[slot])


# -- its use -----------------------------------------------------------------------------------------------------------------------
def as_split(images: Tensor) -> MemorySplit:
    """Distilled images (m, C, H, W) as a split, without labels, on their device."""
    return MemorySplit(images, torch.full((len(images),), -1, device=images.device))


def pretrain(cfg: Config, stage: Run, net: Any, images: Tensor, targets: Tensor) -> Any:
    """A fresh network trained on the set alone: no augmentation, constant rate."""
    net, optimizer = stage.trainable("net", net, cfg.inner)
    batches = Batches(as_split(images), cfg.pretrain_batch, stage.seed)
    for step in stage.steps(cfg.pretrain_steps):
        index, pixels, _ = stage.shard(batches(step))
        stage.update(optimizer, mse=inner_loss(net(pixels), targets[index]))
    return stage.unwrap(net)


def finetune(cfg: Config, stage: Run, net: Any, task: ImageData) -> float:
    """Test accuracy after training all weights, under a new head, on the target task."""
    body, look = with_head(net, len(task.classes)), augmenter(cfg.finetune_augment, task.size)
    tuned = trained.fit(stage, "net", body, task.train, cfg.finetune_steps, cfg.finetune_optimizer, cfg.finetune_batch, look)
    return ClassificationMetrics.of(*evaluate(tuned, task.test)).accuracy


def probe(task: ImageData, encoder: nn.Module) -> float:
    """Test accuracy of a linear probe on frozen features."""
    return linear_probe(*evaluate(encoder, task.train), *evaluate(encoder, task.test))


def save(student: nn.Module, folder: Path, images: Tensor, targets: Tensor) -> None:
    """The set as distilled.safetensors (images in the scale of real ones, targets) beside the last network pre-trained on it."""
    from safetensors.torch import save_file

    saving.save_classifier(student, folder)
    save_file({"images": images.cpu().contiguous(), "targets": targets.cpu().contiguous()}, folder / "distilled.safetensors")
