"""SLA: one joint label of class and input transformation, averaged or distilled (Lee, Hwang & Shin 2020, arXiv 1910.05872).

    L_SLA    = (1/M) sum_j CE( softmax(w^T f(t_j(x))), y M + j )                            joint head w, N*M outputs
    AG       = softmax(s),   s_i = (1/M) sum_j w_{i,j}^T f(t_j(x))                            M passes at test time
    L_SLA+SD = L_SLA + T^2 KL( softmax(stopgrad(s)/T) || softmax(u^T f(x)/T) ) + ce_weight CE(u^T f(x), y)      one-pass head u

t_0 is the identity. The target s is detached and comes from the same batch's joint logits; head u sees only the untransformed view.
One pass without u (single inference, "SI") conditions on the known transformation: it takes the columns of j = 0.

Exact: sample-major views in one forward pass (batch norm sees them together), label order, logits (not probabilities) averaged.
Shrunk: network and data. Ours: the heads are rows of one linear layer, which is the same network; the baselines DA and MT see the same
views (in the released trainer they are declared but missing); the last step, not the best. Left out: few-shot and imbalanced variants.
The paper's table is from memory: unconfirmed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from stillroom.catalogue import idle
from stillroom.catalogue.claims import Claim
from stillroom.core.config import Count, Natural, NonNegative, Positive
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.data.augment import Augmentation, augmenter
from stillroom.data.batches import Batches
from stillroom.data.images import ImageData
from stillroom.data.load import ImageConfig
from stillroom.losses.divergences import cross_entropy, kl
from stillroom.metrics.classification import ClassificationMetrics
from stillroom.metrics.modes import eval_mode
from stillroom.nets.build import keep_outputs
from stillroom.vision import hub, present, saving

Mode = Literal["plain", "da", "mt", "sla", "sla+sd"]
Transform = Literal["rotation", "rotation2", "color6", "color3", "rotation2+color3", "rotation+color3", "rotation+color6"]
COLOURS = {"color6": ("012", "021", "102", "120", "201", "210"), "color3": ("012", "120", "201")}


@dataclass(frozen=True)
class Config(ImageConfig):
    """Laptop defaults: a small conv net on 150 digits."""

    labelled: Natural = 150
    """Training images used. 0: all."""
    augment: Augmentation = "shift"
    """Augmentation before the transformations; the paper's for CIFAR is crop-flip."""
    student: str = "small:convnet-w16"
    """small:NAME, or hf:ID-or-folder, whose config is built with fresh weights."""
    steps: Count = 600
    """Training steps (paper: 80,000)."""
    batch_size: Count = 32
    """Images per step, before they are multiplied by the M views."""
    optimizer: Optimizer = Optimizer("sgd", 0.1, weight_decay=5e-4, schedule="step")
    mode: Mode = "sla+sd"
    """plain: no views, and none of the flags below; da: views keep the class label; mt: da and a second head for the transformation;
    sla; sla+sd."""
    transform: Transform = "rotation"
    """The M transformations; rotations need square images, colour permutations three channels."""
    temperature: Positive = 1.0
    """T of the self-distillation term (code: 1)."""
    kd_weight: NonNegative = 1.0
    """Weight of the self-distillation term."""
    ce_weight: NonNegative = 1.0
    """Weight beta of head u's cross-entropy (code: 1)."""
    sum_views: bool = False
    """Sum the joint loss over the M views instead of averaging it (the code's setting for ImageNet and iNaturalist)."""


def full() -> Config:
    """CIFAR-10 as in the reference code: ResNet-32, 80,000 iterations of 128 images, no Nesterov."""
    return Config(
        data="hub:uoft-cs/cifar10", labelled=0, augment="crop-flip", student="small:resnet32", steps=80_000, batch_size=128,
        optimizer=Optimizer("sgd", 0.1, weight_decay=1e-4, schedule="step"),
    )  # fmt: skip


TINY = {"steps": 6}
FSDP2 = "nll"
ARMS: dict[str, dict[str, str]] = {
    "plain": {"mode": "plain"},
    "da": {"mode": "da"},
    "mt": {"mode": "mt"},
    "sla": {"mode": "sla"},
    "sla+sd": {},
}
CLAIMS = [
    Claim(
        "self-distillation brings the views' gain into one pass", metric="accuracy", arm="sla+sd", versus="plain",
        paper="CIFAR-10, ResNet-32: 92.39 % to 93.26 % (unconfirmed)",
    ),
    Claim(
        "joint labels, views averaged, beat the baseline", metric="aggregated", arm="sla", versus="plain",
        paper="92.39 % to 94.50 % (unconfirmed)",
    ),
    Claim("they beat the same views under the class label alone", metric="aggregated", arm="sla", versus="da"),
    Claim("they beat the same views with a second, self-supervised task", metric="aggregated", arm="sla", versus="mt"),
    Claim("in one pass, asking for invariance (DA) costs accuracy", metric="accuracy", arm="plain", versus="da"),
    Claim("averaging views beats distilling them", metric="aggregated", arm="sla", versus="sla+sd", margin=-0.01),
]  # fmt: skip


def main(cfg: Config, run: Run, *, data: ImageData | None = None, student: nn.Module | None = None) -> dict[str, float]:
    """Train and evaluate. `data` and `student` (with `heads(cfg, N)[0]` outputs) replace what the config names."""
    data = data.to(run.device) if data else cfg.load(run, labelled=cfg.labelled, transfer=False)
    refuse_ignored(cfg)
    classes = len(data.classes)
    views, m = transforms(cfg.transform, data.channels) if cfg.mode != "plain" else (lambda x: x, 1)
    outputs, joint, single, _ = heads(cfg.mode, classes, m)
    named = dataclasses.replace(data, classes=names(cfg.mode, data.classes, m))
    student = student or hub.load_classifier(cfg.student, data=named, fresh=True)
    student, optimizer = run.trainable("student", student, cfg.optimizer)
    augment, batches = augmenter(cfg.augment, data.size), Batches(data.train, cfg.batch_size, run.seed)
    for step in run.steps(cfg.steps):
        _, image, label = run.shard(batches(step))
        run.update(optimizer, **losses(student(views(augment(image))), label, cfg, classes, m))

    net = run.unwrap(student)
    deployed = keep_outputs(net, torch.arange(classes) * m if cfg.mode == "sla" else torch.arange(outputs)[single])
    metrics = present.classifier(run, "student", deployed, data.test)
    with eval_mode(net), torch.inference_mode():
        logits = torch.cat([net(views(data.test.take(rows).images)) for rows in torch.arange(len(data.test)).split(256)])
    averaged = aggregate(logits[:, joint], m) if "sla" in cfg.mode else logits[:, single].unflatten(0, (-1, m)).mean(1)
    metrics["aggregated"] = ClassificationMetrics.of(averaged, data.test.labels).accuracy
    if cfg.mode == "sla+sd":
        metrics["single"] = ClassificationMetrics.of(logits[::m, joint][:, ::m], data.test.labels).accuracy
    run.image("views of one image", views(data.test.take(torch.arange(4)).images), columns=m)
    run.save_student(deployed, saving.save_classifier)
    return metrics


def losses(logits: Tensor, label: Tensor, cfg: Config, classes: int, m: int) -> dict[str, Tensor]:
    """The terms of the mode for logits (B M, outputs) of sample-major views x_0 t_0, x_0 t_1, …, x_1 t_0, … and labels (B,). Scalars.

    ce: all views under the class label, or (sla+sd) head u on the untransformed view; transform: which view it is; joint: L_SLA; kd: head
    u learns the views' detached average.
    """
    _, joint, single, other = heads(cfg.mode, classes, m)
    every, which = label.repeat_interleave(m), torch.arange(m, device=label.device).repeat(len(label))
    if cfg.mode in ("plain", "da", "mt"):
        ce = cross_entropy(logits[:, single], every).mean()
        return {"ce": ce, "transform": cross_entropy(logits[:, other], which).mean()} if cfg.mode == "mt" else {"ce": ce}
    parts = {"joint": cross_entropy(logits[:, joint], every * m + which).mean() * (m if cfg.sum_views else 1)}
    if cfg.mode == "sla+sd":
        target, student_logits = aggregate(logits[:, joint], m).detach(), logits[::m, single]
        parts["kd"] = cfg.kd_weight * kl(target, student_logits, cfg.temperature, times_t2=True).mean()
        parts["ce"] = cfg.ce_weight * cross_entropy(student_logits, label).mean()
    return parts


def heads(mode: Mode, classes: int, m: int) -> tuple[int, slice, slice, slice]:
    """Outputs of the one linear layer, and the columns of the joint head, the single head u and the transformation head."""
    joint = classes * m if mode in ("sla", "sla+sd") else 0
    single = joint + (0 if mode == "sla" else classes)
    outputs = single + (m if mode == "mt" else 0)
    return outputs, slice(0, joint), slice(joint, single), slice(single, outputs)


def names(mode: Mode, classes: tuple[str, ...], m: int) -> tuple[str, ...]:
    """A name for every output of `heads`; those that are deployed bear the names of the classes themselves."""
    joint = [name if mode == "sla" and not j else f"{name}, view {j}" for name in classes for j in range(m)] if "sla" in mode else []
    return (*joint, *(() if mode == "sla" else classes), *(f"view {j}" for j in range(m if mode == "mt" else 0)))


def aggregate(joint: Tensor, m: int) -> Tensor:
    """(B M, N M) joint logits, sample-major -> (B, N): column block j of view j, averaged over j as logits."""
    return torch.stack([joint[j::m, j::m] for j in range(m)]).mean(0)


def refuse_ignored(cfg: Config) -> None:
    """UserError for a flag that another mode than plain would ignore."""
    distils = ("temperature", "kd_weight", "ce_weight")
    ignored = {"da": (*distils, "sum_views"), "mt": (*distils, "sum_views"), "sla": distils}.get(cfg.mode, ())
    for name in ignored:
        if getattr(cfg, name) != getattr(Config(), name):
            idle.refuse(f"--{name.replace('_', '-')} changes nothing in --mode {cfg.mode}: leave it out.")


def transforms(name: Transform, channels: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """`views(images)` (B, C, H, W) -> (B M, C, H, W) sample-major, the identity first; and M. UserError for colours on grey images."""
    rotation, _, colour = name.partition("+") if not name.startswith("color") else ("", "", name)
    turns = {"": (0,), "rotation": (0, 1, 2, 3), "rotation2": (0, 2)}[rotation]
    orders = [[int(c) for c in order] for order in COLOURS[colour]] if colour else [list(range(channels))]
    if colour and channels != 3:
        raise UserError(f"--transform {name} permutes three colour channels, but the images have {channels}; use rotation.", code=2)

    def views(images: Tensor) -> Tensor:
        turned = [images.rot90(turn, (-2, -1)) for turn in turns]
        # Channel by channel: a list as an index would be sent to the images' device at every call.
        return torch.stack([torch.stack([x[:, c] for c in order], 1) if colour else x for x in turned for order in orders], 1).flatten(0, 1)

    return views, len(turns) * len(orders)
