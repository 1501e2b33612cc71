"""SSLD: a student learns a teacher's answers alone, on labelled images and on a selected pool without labels (Cui et al. 2021, 2103.05959).

    L = mean over the batch of  1/2 [ KL(p_T || p_S) + KL(p_S || p_T) ],    p = softmax(z), the same view for both, no ground truth

The images are those of the labelled set, whose labels are not read, and for every class the k images of the pool that the teacher
predicts as this class with the largest probability. Pool images that equal a test image are dropped before.

Exact: the loss, which the paper calls JS and its code computes as above; the selection within predicted classes. Shrunk: networks and
data; the pool is what is left of the digits, and as many polluted images again (half of them noise, half digits turned by 90, 180 or
270 degrees). Ours: k, which is unconfirmed; duplicates by content hash, for the paper's SIFT (`near` takes a better test); the teacher
in eval mode (the released code trains with batch statistics, `teacher_bn`, for 0.16 points). Stage 2, the same loss at a hundredth of
the rate on the labelled images, is off: it gained nothing in our pilot. Left out as claims: the symmetric loss above cross-entropy,
stage 2, longer schedules, test resolution: none shows at this size. Left out: pools larger than memory beside data of other files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom.catalogue.claims import Claim
from stillroom.core.config import Count, Natural, NonNegative
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.data.augment import augmenter
from stillroom.data.batches import Batches
from stillroom.data.images import ImageData, MemorySplit, Split, join, keep_labels
from stillroom.data.select import duplicates, load_pool, top_per_class
from stillroom.losses.divergences import cross_entropy, jeffreys, jsd, kl, soft_cross_entropy
from stillroom.metrics.classification import evaluate
from stillroom.vision import hub, present, saving, signals, trained

BASELINE = True
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "jeffreys": jeffreys,
    "js": lambda teacher, student: jsd(teacher.float(), student.float(), 0.5),
    "kl": lambda teacher, student: kl(teacher.float(), student.float()),
    "ce": lambda teacher, student: soft_cross_entropy(student.float(), teacher.float().softmax(-1)),
}
"""From teacher and student logits (B, C) to a value per image (B,)."""


@dataclass(frozen=True)
class Config(trained.TeacherConfig):
    """Laptop defaults: 100 labelled digits, 600 selected from a polluted pool."""

    labelled: Natural = 100
    """Labelled training images. 0: all."""
    teacher: str = "small:mlp-256x256"
    """small:NAME is trained first; hf:ID-or-folder, timm:NAME or run:FOLDER is taken as it is."""
    teacher_labelled: Natural = 700
    """Labelled images that a small: teacher is trained on; they may overlap the pool, as the paper's do. 0: all."""
    teacher_bn: Literal["eval", "train"] = "eval"
    """train: the teacher's batch norm uses batch statistics while it answers, and its running ones move (code)."""
    pool: str = ""
    """A folder of images without labels. Empty: the training images that are not labelled."""
    pollution: NonNegative = 1.0
    """Polluted images added to the pool, as a multiple of its size: half noise, half turned."""
    select: Literal["top", "random", "none"] = "top"
    """From the pool: top k per predicted class; as many drawn at random; none."""
    k: Count = 60
    """Most images per class that are selected."""
    targets: Literal["teacher", "labels"] = "teacher"
    """labels: cross-entropy with the ground truth, without a pool (a baseline)."""
    loss: Literal["jeffreys", "js", "kl", "ce"] = "jeffreys"
    """Between teacher and student (code: jeffreys, there called JS)."""
    student: str = "small:mlp-24"
    """small:NAME, or hf:ID-or-folder, whose config is built with fresh weights."""
    steps: Count = 1600
    """Training steps of the student."""
    optimizer: Optimizer = Optimizer("sgd", 0.1, schedule="cosine")
    finetune_steps: Natural = 0
    """Stage 2: further steps on the labelled images alone at a hundredth of the rate."""


def full() -> Config:
    """MobileNetV3-large on ImageNet-1k as in the documents: 360 epochs of 5M images in batches of 5,760, l2 1e-5; stage 2 of 30 epochs."""
    return Config(
        data="hub:ILSVRC/imagenet-1k", image_size=224, labelled=0, augment="crop-flip", teacher="timm:resnet50d", teacher_bn="train",
        pool="imagenet-22k", pollution=0.0, k=4000, student="timm:mobilenetv3_large_100", batch_size=5760, steps=312_500,
        optimizer=Optimizer("sgd", 3.65625, weight_decay=1e-5, schedule="cosine", warmup=4340), finetune_steps=6670,
    )  # fmt: skip


TINY = {"steps": 4, "teacher_steps": 4, "limit": 300, "labelled": 60, "teacher_labelled": 100, "k": 10, "batch_size": 16}
FSDP2 = "nll"
ARMS: dict[str, dict[str, Any]] = {
    "labels": {"targets": "labels", "select": "none"},
    "labelled only": {"select": "none"},
    "random pick": {"select": "random"},
    "ssld": {},
}
CLAIMS = [
    Claim(
        "images without labels make the student more accurate", metric="accuracy", arm="ssld", versus="labelled only", margin=0.03,
        paper="MobileNetV3-large: 4M selected images take 77.1 % to 78.5 %",
    ),
    Claim(
        "on the labelled images the teacher's answers are no worse than the ground truth by more than a point", metric="accuracy",
        arm="labelled only", versus="labels", margin=-0.01, paper="no ground truth needed",
    ),
    Claim("the best k per class beat as many drawn at random", metric="accuracy", arm="ssld", versus="random pick"),
]  # fmt: skip


def main(
    cfg: Config, run: Run, *, data: ImageData | None = None, teacher: nn.Module | None = None, student: nn.Module | None = None,
    near: Callable[[Split, Split], Tensor] = duplicates,
) -> dict[str, float]:  # fmt: skip
    """Train the teacher if need be, select, distil, evaluate. `data` (its transfer split is the pool), `teacher` (trained) and `student`
    replace what the config names; `near(pool, test)` tells (N,) which pool images are too near to a test image."""
    if cfg.targets == "labels" and cfg.select != "none":
        raise UserError("--targets labels cannot learn from a pool, which has none: give --select none.", code=2)
    taught, data = (data, data.to(run.device)) if data else split_labels(cfg, run)
    clean = run.frozen(teacher if teacher is not None else cfg.classifier(run, taught))
    present.classifier(run, "teacher", clean, data.test)
    images, metrics = data.train, {}
    if cfg.select != "none":
        pool, polluted = gather(cfg, run, data, near)
        rows = chosen(cfg.select, evaluate(clean, pool)[0], cfg.k, run.seed)
        images = merged(data.train, pool.subset(rows))
        metrics = {"selected": float(len(rows)), "polluted": float((rows.cpu() >= len(pool) - polluted).double().mean())}

    answering = with_batch_statistics(run, clean) if cfg.teacher_bn == "train" else clean
    student = student or hub.load_classifier(cfg.student, data=data, fresh=True)
    student = distil(run, cfg, data, answering, student, images, cfg.steps, cfg.optimizer)
    if cfg.finetune_steps:
        slow = replace(cfg.optimizer, lr=cfg.optimizer.lr / 100)
        student = distil(run.stage("finetune"), cfg, data, answering, student, data.train, cfg.finetune_steps, slow)
    metrics |= present.classifier(run, "student", student, data.test)
    run.save_student(student, saving.save_classifier)
    return metrics


def distil(
    stage: Run, cfg: Config, data: ImageData, teacher: nn.Module, student: nn.Module, images: Split, steps: int, optimizer: Optimizer
) -> nn.Module:
    """`steps` of the student on these images. The network, whole."""
    student, learner = stage.trainable("student", student, optimizer)
    augment, batches = augmenter(cfg.augment, data.size), Batches(images, cfg.batch_size, stage.seed)
    moves = cfg.augment != "none" or cfg.teacher_bn == "train"
    answer = signals.logits(stage, teacher, images, augmented=moves) if cfg.targets == "teacher" else None
    for step in stage.steps(steps):
        index, image, label = stage.shard(batches(step))
        image = augment(image)
        logits = student(image)
        stage.update(learner, LOSSES[cfg.loss](answer(index, image), logits) if answer else cross_entropy(logits, label))
    return stage.unwrap(student)


# -- teacher and images ------------------------------------------------------------------------------------------------------------
def split_labels(cfg: Config, run: Run) -> tuple[ImageData, ImageData]:
    """The teacher's task and the student's: the same images, the labelled ones of the smaller task among those of the larger."""
    data = cfg.load(run)

    def keep(count: int) -> ImageData:
        if count > len(data.train):
            raise UserError(f"{data.name}: {count} labelled images were asked for, but there are {len(data.train)} training images.")
        train, rest = keep_labels(data.train, count or len(data.train), torch.Generator().manual_seed(run.seed))
        return replace(data, train=train, transfer=rest)

    return replace(keep(cfg.teacher_labelled), transfer=None), keep(cfg.labelled)


def with_batch_statistics(run: Run, clean: nn.Module) -> nn.Module:
    """A copy of the teacher in train mode, whose running statistics move and are saved with the run. UserError without batch norm."""
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in clean.modules()):
        raise UserError("--teacher-bn train changes nothing: the teacher has no batch norm. Leave it out.", code=2)
    teacher = run.frozen(copy.deepcopy(clean)).train()
    run.track(**{f"teacher {name}": buffer for name, buffer in teacher.named_buffers()})
    return teacher


def gather(cfg: Config, run: Run, data: ImageData, near: Callable[[Split, Split], Tensor]) -> tuple[Split, int]:
    """The pool without images near a test image, its polluted images last, and their number. UserError if it is empty."""
    pool: Split | None = load_pool(Path(cfg.pool), data.channels, data.size, run.cached).to(run.device) if cfg.pool else data.transfer
    if pool is None:
        raise UserError(f"{data.name} leaves no images without labels: give --pool FOLDER, fewer --labelled, or --select none.", code=2)
    pool = pool.subset((~near(pool, data.test)).nonzero().squeeze(1).to(pool.device))
    if not len(pool):
        raise UserError("No image of the pool is left: all of them are test images.")
    count = round(cfg.pollution * len(pool))
    if not count:
        return pool, 0
    spoilt = polluted(pool.images().cpu(), count, torch.Generator().manual_seed(run.seed)).to(run.device)
    clean = MemorySplit(pool.images(), pool.labels)
    return join(clean, MemorySplit(spoilt, torch.full((count,), -1, device=run.device))), count


def polluted(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, C, H, W): uniform noise, then (the larger half) images drawn from these, turned by 90, 180 or 270 degrees."""
    noise = torch.rand((count // 2, *images.shape[1:]), generator=generator)
    turned = images[torch.randint(len(images), (count - count // 2,), generator=generator)]
    turns = torch.randint(1, 4, (len(turned),), generator=generator)
    return torch.cat([noise, *(image.rot90(int(turn), (-2, -1))[None] for image, turn in zip(turned, turns, strict=True))])


def chosen(how: str, logits: Tensor, k: int, seed: int) -> Tensor:
    """Rows of the pool, ascending: the top k per predicted class, or as many at random."""
    top = top_per_class(logits, k)
    if how == "top":
        return top
    return torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))[: len(top)].sort().values.to(top.device)


def merged(labelled: Split, pool: Split) -> Split:
    """Both as one; in memory as floats where one is bytes and the other is not. UserError for pools and data of different files."""
    if isinstance(labelled, MemorySplit) and isinstance(pool, MemorySplit) and labelled.pixels.dtype != pool.pixels.dtype:
        labelled, pool = (MemorySplit(split.images(), split.labels) for split in (labelled, pool))
    try:
        return join(labelled, pool)
    except TypeError:
        raise UserError("Data too large for memory can be joined with a pool of the same files only: leave --pool out.") from None
