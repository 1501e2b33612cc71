"""KD: a small classifier learns a larger one's softened outputs beside the labels (Hinton, Vinyals & Dean 2015, arXiv 1503.02531).

    loss = ce_weight CE(z_s, y) + kd_weight T^2 KL( softmax(z_t / T) || softmax(z_s / T) )

The first term is the mean over the labelled images of a batch, the second over all its images: the teacher also answers for
images without labels (the transfer set), and that is where distillation pays when labels are few. Teacher, baseline and student
see the same labels; the baseline cannot use the unlabelled images, and takes as many steps on batches of the same size.

Exact: both terms, their weights and the T^2 (section 2); teacher and student see the same view. Shrunk: networks and data.
Ours: teacher outputs are computed once and kept when the images are not augmented. Left out: the paper's speech and JFT experiments
(its data are closed), and specialists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn import functional as F

from stillroom.catalogue.claims import Claim
from stillroom.core.config import Count, Natural, NonNegative, Positive
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.data.augment import augmenter
from stillroom.data.batches import Batches
from stillroom.data.images import ImageData, Split, join
from stillroom.vision import hub, present, saving, signals, trained

BASELINE = True


@dataclass(frozen=True)
class Config(trained.TeacherConfig):
    """Laptop defaults: 8x8 digits of which 100 are labelled."""

    labelled: Natural = 100
    """Training images that keep their labels; the others are the transfer set. 0: all."""
    student: str = "small:convnet-w4"
    """small:NAME, or hf:ID-or-folder, whose config is built with fresh weights."""
    steps: Count = 1500
    """Training steps of the student."""
    optimizer: Optimizer = Optimizer("adamw", 4e-3, weight_decay=1e-2, schedule="cosine")
    temperature: Positive = 4.0
    """T of both softmaxes in the distillation term."""
    ce_weight: NonNegative = 0.1
    """Weight of the cross-entropy with the labels."""
    kd_weight: NonNegative = 0.9
    """Weight of the distillation term; 0 trains without a teacher, on the labelled images alone."""
    pool: Literal["all", "labelled"] = "all"
    """Images that the teacher answers for: labelled and transfer, or the labelled ones alone."""


def full() -> Config:
    """A common full-size setting for CIFAR (the paper itself reports MNIST and speech at T between 2 and 20)."""
    sgd = Optimizer("sgd", 0.1, weight_decay=5e-4, nesterov=True, schedule="cosine")
    return Config(
        data="hub:uoft-cs/cifar10", labelled=0, augment="crop-flip", teacher="small:resnet32", teacher_steps=80_000, teacher_optimizer=sgd,
        student="small:resnet8", steps=80_000, batch_size=128, optimizer=sgd,
    )  # fmt: skip


TINY = {"steps": 6, "teacher_steps": 6}
FSDP2 = "nll"
ARMS = {
    "plain": {"kd_weight": 0.0, "ce_weight": 1.0},
    "kd": {},
    "kd without transfer set": {"pool": "labelled"},
}
CLAIMS = [
    Claim(
        "a teacher's answers on unlabelled images make the student more accurate",
        metric="accuracy", arm="kd", versus="plain", paper="MNIST, 800 units: 146 test errors alone, 74 distilled",
    ),
    Claim("the gain comes from the transfer set", metric="accuracy", arm="kd", versus="kd without transfer set"),
]  # fmt: skip


def main(
    cfg: Config, run: Run, *, data: ImageData | None = None, teacher: nn.Module | None = None, student: nn.Module | None = None
) -> dict[str, float]:
    """Train the teacher if need be, distil, evaluate. `data`, `teacher` (trained) and `student` replace what the config names."""
    data = data.to(run.device) if data else cfg.load(run, labelled=cfg.labelled)
    augment = augmenter(cfg.augment, data.size)
    images: Split = data.train
    if cfg.kd_weight:
        teacher = run.frozen(teacher if teacher is not None else cfg.classifier(run, data))
        present.classifier(run, "teacher", teacher, data.test)
        if cfg.pool == "all" and data.transfer is not None:
            images = join(data.train, data.transfer)

    student, optimizer = run.trainable("student", student or hub.load_classifier(cfg.student, data=data, fresh=True), cfg.optimizer)
    batches = Batches(images, cfg.batch_size, run.seed)
    terms: signals.Terms | None = None
    if teacher is not None and cfg.kd_weight:
        terms = signals.labels_and_teacher(
            run, teacher, batches, cfg.temperature, ce_weight=cfg.ce_weight, kd_weight=cfg.kd_weight * cfg.temperature**2,
            augmented=cfg.augment != "none",
        )  # fmt: skip
    for step in run.steps(cfg.steps):
        batch = batches(step)
        index, image, label = run.shard(batch)
        image = augment(image)
        logits = student(image)
        if terms is None:
            run.update(optimizer, ce=cfg.ce_weight * F.cross_entropy(logits, label))
        else:
            ce, kd = terms(logits, index, image, label, batch.labels)  # ce_weight CE(z_s, y) and kd_weight T^2 KL(z_t, z_s)
            run.update(optimizer, ce=ce, kd=kd)

    metrics = present.classifier(run, "student", student, data.test)
    run.save_student(student, saving.save_classifier)
    return metrics
