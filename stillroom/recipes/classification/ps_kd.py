"""PS-KD: a classifier's own past predictions soften its targets (Kim, Ji, Yoon & Hwang 2021, arXiv 2006.12000).

    target_t = (1 - a_t) onehot(y) + a_t p_{t-1}(x),    a_t = a_T t / T,    t = 1..T epochs
    loss     = mean over the batch of  - sum_c target_c log softmax(z_t(x))_c

p_{t-1}(x) is the network's own prediction for this very sample when it was last trained on it: the softmax of that forward pass, in
train mode, on the augmented view, before the update. It is kept per sample index and carries no gradient. Before a sample's first visit
it is the label itself, so epoch 1 trains on labels whatever a_1. No second network, no second forward pass.

Exact: targets, ramp, memory, order of reading and writing. Shrunk: network and data; 20 % of the training labels are random, since
the gain in accuracy needs noise or a large network (on clean labels only likelihood and calibration improve). Ours: the last epoch, not
the best on test images. Left out: mixed inputs (CutMix), for which the paper's handling of the memory is unconfirmed; detection and
translation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from stillroom.catalogue.claims import Claim
from stillroom.core.config import Count, Natural, Share
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.data.augment import Augmentation, augmenter
from stillroom.data.batches import Batches
from stillroom.data.images import ImageData
from stillroom.data.load import ImageConfig
from stillroom.losses.divergences import soft_cross_entropy
from stillroom.vision import hub, present, saving


@dataclass(frozen=True)
class Config(ImageConfig):
    """Laptop defaults: an MLP on 250 digits, a fifth of them with random labels."""

    labelled: Natural = 250
    """Training images used. 0: all."""
    noise: Share = 0.2
    """Share of training labels that are replaced at random."""
    augment: Augmentation = "none"
    """Augmentation of training images; the paper's for CIFAR is crop-flip."""
    student: str = "small:mlp-256x256"
    """small:NAME, or hf:ID-or-folder, whose config is built with fresh weights."""
    epochs: Count = 60
    """T (paper: 300)."""
    batch_size: Count = 32
    optimizer: Optimizer = Optimizer("sgd", 0.1, weight_decay=5e-4, nesterov=True, schedule="step")
    past_weight: Share = 0.8
    """Weight of the past prediction in the last epoch, a_T (code: 0.8). 0 is plain training."""
    ramp: Literal["linear", "constant"] = "linear"
    """How the weight grows: a_T t / T, or a_T from the start (ablation)."""
    smoothing: Share = 0.0
    """Label smoothing: this share of the label's mass is spread evenly over the classes (a baseline)."""


def full() -> Config:
    """CIFAR-100 as in the reference code: PreAct ResNet-18, 300 epochs, rate divided by 10 at epochs 150 and 225."""
    return Config(
        data="hub:uoft-cs/cifar100", labelled=0, noise=0.0, augment="crop-flip", student="small:preact-resnet18", epochs=300, batch_size=128
    )  # fmt: skip


TINY = {"epochs": 2}
FSDP2 = "nll"
ARMS = {
    "plain": {"past_weight": 0.0},
    "smoothing": {"past_weight": 0.0, "smoothing": 0.1},
    "ps-kd": {},
    "constant weight": {"ramp": "constant"},
}
CLAIMS = [
    Claim(
        "targets softened by the past calibrate better", metric="ece", arm="ps-kd", versus="plain", better="lower",
        paper="CIFAR-100, PreAct ResNet-18: ECE 11.84 % to 1.77 %",
    ),
    Claim("they give a better likelihood", metric="nll", arm="ps-kd", versus="plain", better="lower", paper="NLL 1.10 to 0.76"),
    Claim("they rank confidence better", metric="aurc", arm="ps-kd", versus="plain", better="lower", paper="AURC 67.65 to 52.10 (x1000)"),
    Claim("they are more accurate", metric="accuracy", arm="ps-kd", versus="plain", paper="error 24.18 % to 20.82 %"),
    Claim(
        "they calibrate better than label smoothing", metric="ece", arm="ps-kd", versus="smoothing", better="lower",
        paper="ECE 1.77 % against 10.79 %",
    ),
    Claim("a weight that grows calibrates better than a constant one", metric="ece", arm="ps-kd", versus="constant weight", better="lower"),
]  # fmt: skip


def main(cfg: Config, run: Run, *, data: ImageData | None = None, student: nn.Module | None = None) -> dict[str, float]:
    """Train and evaluate. `data` and `student` replace what the config names."""
    data = data.to(run.device) if data else cfg.load(run, labelled=cfg.labelled, transfer=False, noise=cfg.noise)
    classes = len(data.classes)
    augment, batches = augmenter(cfg.augment, data.size), Batches(data.train, cfg.batch_size, run.seed)
    student, optimizer = run.trainable("student", student or hub.load_classifier(cfg.student, data=data, fresh=True), cfg.optimizer)
    labels = smoothed(one_hot(data.train.labels, classes).float(), cfg.smoothing)
    past = labels.clone()  # before the first visit the label itself, also for samples that a ragged last batch leaves out of epoch 1
    run.track(past=past)
    for step in run.steps(cfg.epochs * batches.steps_per_epoch):
        index, image, _ = run.shard(batches(step))
        weight = weight_of(cfg, batches.epoch(step) + 1)
        logits = student(augment(image))
        run.update(optimizer, soft_cross_entropy(logits, softened(labels[index], past[index], weight)))
        past[run.gather(index)] = run.gather(logits.detach().float().softmax(-1))
        run.log(past_weight=weight)

    metrics = present.classifier(run, "student", student, data.test)
    run.save_student(student, saving.save_classifier)
    return metrics


def smoothed(labels: Tensor, share: float) -> Tensor:
    """One-hot labels (N, C), of whose mass `share` is spread evenly over all classes."""
    return (1 - share) * labels + share / labels.shape[-1]


def weight_of(cfg: Config, epoch: int) -> float:
    """a_t of epoch t = 1..T: a_T t / T, or a_T throughout."""
    return cfg.past_weight * (epoch / cfg.epochs if cfg.ramp == "linear" else 1.0)


def softened(labels: Tensor, past: Tensor, weight: float) -> Tensor:
    """target_t = (1 - a_t) labels + a_t past, all (B, C)."""
    return torch.lerp(labels, past, weight)
