"""SSLD: a classifier learns a teacher's softmax on a selected pool of unlabelled images (Cui et al. 2021, arXiv 2103.05959).

    L = mean over the batch of  1/2 sum_c (p_T - p_S)_c (log p_T - log p_S)_c,      p = softmax(z), temperature 1

half the symmetrised KL (Jeffreys), which the released code calls JS. Both networks see one view of an image; the teacher is frozen.
The pool is the images that nobody labelled, less those that are test images; of the images that the teacher predicts as class c, the
`per_class` with the largest p_T,c are kept, fewer where there are fewer, and learned beside the labelled ones.

Exact: loss, selection, its balance, one view for both, no label, no temperature; the optional second stage, on the labelled images with
the same loss at a hundredth of the rate. Shrunk: networks and data; the pool is 900 further digits, polluted by 900 images of no class
(half of them uniform noise, half digits turned by quarters). Ours: k of the selection (the paper's is not confirmed; `full()` has 4,000
a class, 4 million images over 1,000); the teacher in eval mode, where the reference trains its batch norm's statistics along for 0.16
points (`--teacher-bn train`); copies of test images are found by their pixels, where the paper matches SIFT features (`near` replaces it).
Left out: claims on the loss (symmetric against cross-entropy) and on stage 2, which show nothing at this size; changes of resolution.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Literal

import torch
from torch import Tensor, nn

from stillroom.catalogue.claims import Claim
from stillroom.catalogue.idle import refuse_idle
from stillroom.core.config import Count, Natural
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.data.augment import augmenter
from stillroom.data.batches import Batches
from stillroom.data.images import ImageData, MemorySplit, Split, keep_labels
from stillroom.data.select import copies, pooled, top_per_class
from stillroom.data.unlabelled import load_unlabelled
from stillroom.losses.divergences import cross_entropy, jeffreys, jsd, kl, soft_cross_entropy
from stillroom.vision import hub, present, saving, signals, trained

Near = Callable[[Split, Split], Tensor]
"""(pool, test) -> (N,) bool: which images of the pool are too near to a test image."""


@dataclass(frozen=True)
class Config(trained.TeacherConfig):
    """Laptop defaults: 100 digits, a pool of 1,800 images of which half are none."""

    images: Natural = 1000
    """Training images used in all; 0: all. Those beyond `labelled` join the pool without their labels."""
    labelled: Natural = 100
    """Training images of the student, and of the arm that learns labels; 0: all of `images`."""
    teacher_labelled: Natural = 700
    """Of `images`, those whose labels a small: teacher is trained on; 0: all."""
    pool: str = ""
    """A folder of further images, searched with the folders in it; no labels are read."""
    polluted: Natural = 900
    """Images of no class put into the pool: half uniform noise, half pool images turned by quarters. 0 for a pool of one's own."""
    select: Literal["top", "random", "none"] = "top"
    """The surest of each predicted class, as many at random, or no pool at all."""
    per_class: Count = 60
    """Images kept of each predicted class."""
    target: Literal["teacher", "labels"] = "teacher"
    """What is learned: the teacher's softmax, or the labels of the labelled images (the arm without distillation)."""
    loss: Literal["jeffreys", "js", "kl", "ce"] = "jeffreys"
    """Half the symmetrised KL; the Jensen-Shannon divergence; KL(teacher || student); cross-entropy with the teacher."""
    teacher_bn: Literal["eval", "train"] = "eval"
    """The teacher's batch norm: fixed statistics, or those of the batch (reference)."""
    teacher: str = "small:mlp-256x256"
    """small:NAME is trained first; hf:ID-or-folder, timm:NAME or run:FOLDER is taken as it is."""
    student: str = "small:mlp-24"
    """small:NAME, or hf:ID-or-folder, whose config is built with fresh weights."""
    steps: Count = 1600
    finetune_steps: Natural = 0
    """Stage 2: steps on the labelled images at a hundredth of the rate."""
    optimizer: Optimizer = Optimizer("sgd", 0.1, schedule="cosine")


def full() -> Config:
    """ResNet50-D taught by ResNeXt-101 32x16d (WSL) as documented: 360 epochs of ImageNet-1k and 4 million selected images, batch 1024, SGD
    0.4, L2 7e-5, then 60 epochs at a hundredth. The pool is a folder of your own (ImageNet-22k there)."""
    return Config(
        data="hub:ILSVRC/imagenet-1k", image_size=224, images=0, labelled=0, teacher_labelled=0, polluted=0, per_class=4000,
        augment="crop-flip", teacher="timm:resnext101_32x16d.fb_wsl_ig1b_ft_in1k", student="timm:resnet50d", batch_size=1024,
        steps=360 * 5_281_167 // 1024, finetune_steps=60 * 1_281_167 // 1024,
        optimizer=Optimizer("sgd", 0.4, weight_decay=7e-5, schedule="cosine", warmup=5 * 5_281_167 // 1024),
    )  # fmt: skip


TINY = {"teacher_steps": 4, "steps": 4, "images": 200, "labelled": 40, "teacher_labelled": 80, "polluted": 40, "per_class": 8}
FSDP2 = "nll"
ARMS = {
    "ssld": {},
    "random pick": {"select": "random"},
    "labelled only": {"select": "none"},
    "labels": {"select": "none", "target": "labels"},
}
CLAIMS = [
    Claim(
        "unlabelled images lift the student by more than three points", metric="accuracy", arm="ssld", versus="labelled only", margin=0.03,
        paper="MobileNetV3-large, 4M selected images: 77.1 % to 78.5 %",
    ),
    Claim(
        "the teacher's softmax alone is no worse than the labels by a point", metric="accuracy", arm="labelled only", versus="labels",
        margin=-0.01, paper="75.6 % without labels, 75.3 % with labels alone",
    ),
    Claim(
        "the surest of each class teach more than as many drawn at random from the same pool", metric="accuracy", arm="ssld",
        versus="random pick", paper="not compared",
    ),
]  # fmt: skip

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "jeffreys": jeffreys,
    "js": partial(jsd, beta=0.5),
    "kl": kl,
    "ce": lambda teacher, student: soft_cross_entropy(student, teacher.softmax(-1)),
}


def distance(kind: str, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """[B] sum over classes between the two softmaxes at temperature 1, in float32 at least."""
    precise = torch.promote_types(student_logits.dtype, torch.float32)
    return LOSSES[kind](teacher_logits.to(precise), student_logits.to(precise))


def pollution(images: Tensor, noise: Tensor, turns: Tensor) -> Tensor:
    """[2 n, C, S, S] images of no class: noise [n, C, S, S] in [0, 1] as it is, then images [n, C, S, S] turned by turns [n] quarters."""
    turned = torch.stack([image.rot90(int(turn), (1, 2)) for image, turn in zip(images, turns)])
    return torch.cat([noise, turned])


def build_pool(cfg: Config, run: Run, data: ImageData, own: Split | None, near: Near) -> Split:
    """What nobody labelled: training images without their labels, a folder, pollution; without what is near to the test images."""
    sources = [own] if own is not None else [data.transfer] if data.transfer is not None else []
    if cfg.pool:
        sources.append(load_unlabelled(cfg.pool, data, skip_bad=cfg.skip_bad, cache=run.cached))
    if not sources:
        raise UserError("there is no pool to select from: give --pool FOLDER, or fewer --labelled than --images; or --select none.", code=2)
    pool = reduce(pooled, sources)
    if half := cfg.polluted // 2:
        draw = torch.Generator().manual_seed(run.seed)
        base = pool.take(torch.randint(len(pool), (half,), generator=draw)).images.cpu()
        none = pollution(base, torch.rand(base.shape, generator=draw), torch.randint(1, 4, (half,), generator=draw))
        pool = pooled(pool, MemorySplit(none, torch.full((len(none),), -1)).to(run.device))
    return pool.subset((~near(pool, data.test)).nonzero().squeeze(1))


def choose(cfg: Config, run: Run, teacher: nn.Module, pool: Split) -> Tensor:
    """Rows of the pool: the surest `per_class` of each class that the teacher predicts, or as many at random."""
    every = signals.logits(run, teacher, pool, augmented=False)(torch.arange(len(pool), device=run.device), pool.labels)
    top = top_per_class(every, cfg.per_class)
    if cfg.select == "top":
        return top
    return torch.randperm(len(pool), generator=torch.Generator().manual_seed(run.seed))[: len(top)].sort().values


def check(cfg: Config) -> None:
    """UserError for flags that this run would ignore."""
    presets = [Config(), full(), replace(Config(), **TINY)]  # type: ignore[arg-type]  # a plain dict
    if cfg.select == "none":
        refuse_idle(cfg, presets, "with --select none", "pool", "polluted", "per_class")
    if cfg.target == "labels":
        refuse_idle(cfg, presets, "with --target labels", "loss", "teacher_bn", "finetune_steps")
        if cfg.select != "none":
            raise UserError("--target labels knows the labelled images alone: give --select none with it.", code=2)


def main(
    cfg: Config,
    run: Run,
    *,
    data: ImageData | None = None,
    teacher: nn.Module | None = None,
    student: nn.Module | None = None,
    pool: Split | None = None,
    near: Near = copies,
) -> dict[str, float]:
    """Train the teacher if need be, select, distil, evaluate.

    data, teacher (trained), student: in place of what the config names. pool: unlabelled images, in place of those beyond `labelled`.
    near: tells which of its images are too near to a test image, in place of equality. UserError for flags that would be ignored, an empty
    pool, and --teacher-bn train with a teacher that has no batch norm.
    """
    check(cfg)
    whole = data.to(run.device) if data else cfg.load(run, labelled=cfg.images, transfer=False)
    train, unlabelled = keep_labels(whole.train, cfg.labelled or len(whole.train), torch.Generator().manual_seed(run.seed))
    data = replace(whole, train=train, transfer=unlabelled)
    augment = augmenter(cfg.augment, data.size)

    images: Split = data.train
    if cfg.target == "teacher":
        known, _ = keep_labels(whole.train, cfg.teacher_labelled or len(whole.train), torch.Generator().manual_seed(run.seed + 1))
        taught = replace(whole, train=known)
        teacher = run.frozen(teacher if teacher is not None else cfg.classifier(run, taught))
        present.classifier(run, "teacher", teacher, data.test)
        if cfg.select != "none":
            found = build_pool(cfg, run, data, pool.to(run.device) if pool is not None else None, near)
            chosen = choose(cfg, run, teacher, found)
            images = pooled(data.train, found.subset(chosen))
        if cfg.teacher_bn == "train":
            teacher = moving(run, teacher)

    net = student if student is not None else hub.load_classifier(cfg.student, data=data, fresh=True)
    net = distil(cfg, run, images, teacher, net, cfg.steps, cfg.optimizer, augment)
    if cfg.finetune_steps:
        with run.stage("finetune") as stage:
            slow = replace(cfg.optimizer, lr=cfg.optimizer.lr / 100)
            net = distil(cfg, stage, data.train, teacher, copy.deepcopy(net).requires_grad_(True), cfg.finetune_steps, slow, augment)
    metrics = present.classifier(run, "student", net, data.test)
    run.save_student(net, saving.save_classifier)
    return metrics | {"learned_images": float(len(images))}


def distil(
    cfg: Config, run: Run, images: Split, teacher: nn.Module | None, net: nn.Module, steps: int, optimizer: Optimizer,
    augment: Callable[[Tensor], Tensor],
) -> nn.Module:  # fmt: skip
    """The student, trained on the teacher's softmax of `images`, or on their labels if that is the target."""
    student, sgd = run.trainable("student", net, optimizer)
    batches, answers = Batches(images, cfg.batch_size, run.seed), None
    if teacher is not None and cfg.target == "teacher":
        answers = signals.logits(run, teacher, images, augmented=cfg.augment != "none" or cfg.teacher_bn == "train")
    for step in run.steps(steps):
        index, image, label = run.shard(batches(step))
        image = augment(image)
        if answers is None:
            run.update(sgd, ce=cross_entropy(student(image), label))
        else:
            run.update(sgd, distance=distance(cfg.loss, answers(index, image), student(image)))
    return run.unwrap(student)


def moving(run: Run, teacher: nn.Module) -> nn.Module:
    """A copy of the teacher whose batch norm uses, and follows, the batch; its statistics are tracked, for no frozen network is saved."""
    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    if not any(isinstance(module, norms) for module in teacher.modules()):
        raise UserError("--teacher-bn train: this teacher has no batch norm; use eval.", code=2)
    teacher = copy.deepcopy(teacher)
    for name, module in teacher.named_modules():
        if isinstance(module, norms):
            module.train()
            run.track(**{f"teacher {name} {key}": buffer for key, buffer in module.named_buffers()})
    return teacher
