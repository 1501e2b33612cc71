"""Further pre-training: an encoder adapts to unlabelled inputs, then again as its own student (Lee et al. 2022, arXiv 2210.02871).

    0.    (theta_0, phi_0) = argmin L_MAE  from the checkpoint (theta_init, phi_init)             further pre-training
    1..T' (theta_t, phi_t) = argmin L_MAE + |h_theta(x) - h_theta_{t-1}(x)|^2  from the checkpoint again, never from theta_{t-1}
    then a fresh head on the encoder of the last round, and all weights trained with the labels of the same inputs.

L_MAE is the masked reconstruction of the method that made the checkpoint; h is the class token of the UNMASKED input after the last
layer norm, the squared distance is SUMMED over its dimensions and averaged over the batch. The teacher of a round is frozen, in eval
mode and without gradient; the decoder (or language-model head) phi learns from L_MAE alone. Optimizer and schedule begin anew in
every round. Only training inputs of the target are used.

Exact: losses, reductions, stop-gradients, restart, per-patch normalised pixels, decay of matrices only. hf: checkpoints of ViT-MAE
(images) and of masked language models (texts) take the same path.
Shrunk: a small ViT, whose checkpoint is made here from the first classes of the data; the others, with few images, are the target.
Ours: the text settings (standard 15 % masking), which our sheet has unconfirmed, as it has the paper's accuracies and the exact statement
of its theory (each round strictly nearer to the checkpoint); the arm of twice the steps, as many as both rounds take.
Left out: the regularisers that the paper compares with (RecAdam, MARS, R3F), and tokens other than the class token as what is distilled.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Interval
from torch import Tensor, nn

from stillroom.adapt.masked import TextClassifier, patchify
from stillroom.catalogue.claims import Claim
from stillroom.catalogue.idle import refuse_idle
from stillroom.core.config import Count, Natural, NonNegative, Share, override
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.data.augment import Augmentation, augmenter
from stillroom.data.batches import Batches
from stillroom.data.images import ImageData, Split, balanced_rows, of_classes
from stillroom.data.load import ImageConfig
from stillroom.data.text import TextData, load_texts
from stillroom.lm.masked import load_masked_text
from stillroom.metrics.classification import ClassificationMetrics, evaluate
from stillroom.vision import saving, trained
from stillroom.vision.masked import load_masked_images

POINTS = 10
"""Times that a round's held-out error is measured, for the report's picture."""


@dataclass(frozen=True)
class Config(ImageConfig):
    """Laptop defaults: digits 0 to 4 make the checkpoint, 25 images of 5 to 9 are the target: so few that reconstruction overfits."""

    data: str = "digits"
    """Images: digits, shapes, a folder of class folders or parquet files, hub:ID. Texts: a folder of jsonl or parquet files, hub:ID."""
    kind: Literal["images", "texts"] = "images"
    model: str = "small:vit-p2-w32-d3"
    """small:vit-pP-wW-dD, pre-trained first; or hf:ID-or-folder of a ViT-MAE or a masked language model, taken as it is."""
    source_classes: Count = 5
    """The first classes of `data`, which make the checkpoint of a small: model; the others are the target. Unused with hf:."""
    checkpoint_steps: Count = 600
    checkpoint_batch: Count = 64
    checkpoint_optimizer: Optimizer = Optimizer("adamw", 1e-3, beta2=0.95, weight_decay=0.01, decay="matrices", schedule="linear")
    labelled: Natural = 25
    """Target training inputs, used without and then with their labels. 0: all."""
    text_length: Count = 256
    """Tokens that a text is cut to."""
    mask_ratio: Annotated[float, Interval(gt=0.0, lt=1.0)] = 0.75
    """Share of patches, or tokens (usually 0.15), that are hidden."""
    steps: Natural = 1200
    """Pre-training steps of every round, S; 0 fine-tunes the checkpoint."""
    batch_size: Count = 25
    optimizer: Optimizer = Optimizer("adamw", 1e-3, beta2=0.95, weight_decay=0.01, decay="matrices", schedule="linear")
    """Of every round, anew."""
    rounds: Natural = 1
    """Rounds of self-distillation after the first one, T'; 0 is plain further pre-training."""
    start: Literal["checkpoint", "teacher"] = "checkpoint"
    """Weights that a student starts from; the teacher's (an ablation) leave nothing to distil."""
    mae_weight: NonNegative = 1.0
    """Weight of L_MAE in the rounds of self-distillation; 0 distils alone. The first round has no other loss."""
    kd_weight: NonNegative = 1.0
    """Weight of the summed squared distance of class tokens."""
    finetune_steps: Natural = 200
    finetune_batch: Count = 25
    finetune_optimizer: Optimizer = Optimizer("adamw", 1e-3, weight_decay=0.01, decay="matrices", schedule="linear", warmup=20, clip=1.0)
    finetune_dropout: Share = 0.0
    finetune_augment: Augmentation = "none"


def full() -> Config:
    """The released image scripts; `data` is one of FGVC-Aircraft, CUB-200, chest X-rays, DTD, Stanford Dogs, Flowers-102."""
    return Config(
        data="hub:nelorth/oxford-flowers", model="hf:facebook/vit-mae-base", labelled=0, image_size=224, steps=20_000, batch_size=64,
        optimizer=Optimizer("adamw", 1.5e-4, beta2=0.95, weight_decay=0.01, decay="matrices", schedule="linear"),
        finetune_steps=10_000, finetune_batch=32, finetune_dropout=0.1, finetune_augment="crop-flip",
        finetune_optimizer=Optimizer("adamw", 1e-4, weight_decay=0.01, decay="matrices", schedule="linear", warmup=500, clip=1.0),
    )  # fmt: skip


TINY = {"checkpoint_steps": 4, "steps": 4, "batch_size": 24, "finetune_steps": 4, "finetune_batch": 24}
FSDP2 = "accuracy"
ARMS: dict[str, dict[str, Any]] = {
    "fine-tuning": {"steps": 0, "rounds": 0},
    "further pre-training": {"rounds": 0},
    "twice as long": {"rounds": 0, "steps": 2400},
    "self-distillation": {},
    "started from the teacher": {"start": "teacher"},
}
_PAPER = "CUB 55.6 / 55.7 / 58.1, DTD 67.6 / 65.6 / 68.5 % for fine-tuning / further / self-distilled (unconfirmed)"
CLAIMS = [
    Claim("self-distillation keeps reconstruction from overfitting", "heldout", "self-distillation", "further pre-training", "lower"),
    Claim("and stays nearer to the checkpoint", "distance", "self-distillation", "further pre-training", "lower"),
    Claim("more steps of plain further pre-training do not do it", "heldout", "self-distillation", "twice as long", "lower"),
    Claim("nor does a student that starts from its teacher", "heldout", "self-distillation", "started from the teacher", "lower"),
    Claim("which moves further away", "distance", "self-distillation", "started from the teacher", "lower"),
    Claim("fine-tuned accuracy gains over further pre-training", "accuracy", "self-distillation", "further pre-training", paper=_PAPER),
    Claim("fine-tuned accuracy gains over fine-tuning alone", "accuracy", "self-distillation", "fine-tuning", paper=_PAPER),
]  # fmt: skip


@dataclass(frozen=True)
class Round:
    """What decides a round of pre-training, beside where it starts, its teacher and its data."""

    steps: int
    batch_size: int
    optimizer: Optimizer
    mae_weight: float = 1.0
    kd_weight: float = 0.0


def main(cfg: Config, run: Run, *, data: ImageData | TextData | None = None, student: Any = None) -> dict[str, float]:
    """Make the checkpoint if need be, pre-train further round by round, fine-tune, evaluate.

    `data` (the target) and `student` (a pre-trained one with the forward of `adapt.masked`) replace what the config names.
    """
    if not cfg.mae_weight and not cfg.kd_weight:
        raise UserError("--mae-weight 0 and --kd-weight 0 leave a student nothing to learn.", code=2)
    checkpoint, target = find_checkpoint(cfg, run, data, student)
    checkpoint = checkpoint.to(run.device)
    student, teacher, curves = checkpoint, None, []
    for t in range(cfg.rounds + 1 if cfg.steps else 0):
        settings = Round(cfg.steps, cfg.batch_size, cfg.optimizer, *((cfg.mae_weight, cfg.kd_weight) if t else ()))
        begin = teacher if teacher is not None and cfg.start == "teacher" else checkpoint
        with run.stage(f"round-{t}", shared=(pretrain, settings, begin, teacher, target.train, target.test)) as stage:
            student, curve = pretrain(stage, settings, begin, teacher, target.train, target.test)
        teacher = student
        curves.append(curve)
        run.row(f"round {t}", heldout=float(heldout(student, target.test)), distance=distance(student, checkpoint))

    metrics = {"heldout": float(heldout(student, target.test)), "distance": distance(student, checkpoint)}
    net, images = student.classifier(len(target.classes), cfg.finetune_dropout), isinstance(target, ImageData)
    look = augmenter(cfg.finetune_augment, target.size) if images else lambda ids: ids
    net = trained.fit(run, "student", net, target.train, cfg.finetune_steps, cfg.finetune_optimizer, cfg.finetune_batch, look)
    metrics["accuracy"] = ClassificationMetrics.of(*evaluate(net, target.test)).accuracy
    run.row("student", **metrics)
    if curves:
        run.figure("held-out reconstruction error", partial(draw, curves=curves, every=cfg.steps / POINTS))
    if images:
        run.image("held-out images, what is shown, reconstructions", reconstructions(student, target.test))
    run.save_student(net, save)
    return metrics


# -- equations ---------------------------------------------------------------------------------------------------------------------
def losses(errors: Tensor | None, hidden: Tensor | None, known: Tensor | None, mae_weight: float, kd_weight: float) -> dict[str, Tensor]:
    """The terms of L, (B,) each: reconstruction `errors` (B,), and | h_theta(x) - stopgrad(h_theta_T(x)) |^2 SUMMED over the dimensions of
    the student's `hidden` and the teacher's `known` (B, d). None: the term is not there."""
    parts = {}
    if errors is not None:
        parts["mae"] = mae_weight * errors
    if hidden is not None and known is not None:
        parts["kd"] = kd_weight * (hidden - known.detach()).square().sum(-1)
    return parts


@torch.no_grad()
def distance(model: Any, checkpoint: Any) -> float:
    """|theta - theta_init|, the Euclidean distance of the encoders' weights."""
    pairs = zip(model.encoder.parameters(), checkpoint.encoder.parameters(), strict=True)
    return float(sum((a - b).double().square().sum() for a, b in pairs)) ** 0.5


# -- target and checkpoint ---------------------------------------------------------------------------------------------------------
def find_checkpoint(cfg: Config, run: Run, data: ImageData | TextData | None, model: Any) -> tuple[Any, Any]:
    """(theta_init, phi_init), and the target task. UserError when they do not fit."""
    presets = (Config(), full(), override(Config(), TINY))
    making = ("source_classes", "checkpoint_steps", "checkpoint_batch", "checkpoint_optimizer")
    if cfg.kind == "texts":
        refuse_idle(cfg, presets, "on texts", "image_size", "skip_bad", "finetune_augment", *making)
        model = model if model is not None else load_masked_text(cfg.model, ratio=cfg.mask_ratio)
        read: Any = {"seed": run.seed, "limit": cfg.limit or None, "length": cfg.text_length, "labelled": cfg.labelled or None}
        return model, (data or load_texts(cfg.data, model.tokenizer, **read)).to(run.device)
    refuse_idle(cfg, presets, "on images", "text_length")
    data = data.to(run.device) if data else cfg.load(run)
    assert isinstance(data, ImageData)
    if model is not None or not cfg.model.startswith("small:"):
        refuse_idle(cfg, presets, "on a checkpoint that is taken as it is", *making)
        target = task_of(cfg, run, data, 0, len(data.classes))
        return model if model is not None else load_masked_images(cfg.model, data=data, ratio=cfg.mask_ratio), target
    if cfg.source_classes >= len(data.classes):
        raise UserError(f"--source-classes {cfg.source_classes} leaves no target: {data.name} has {len(data.classes)} classes.", code=2)
    source, target = (task_of(cfg, run, data, *ends) for ends in ((0, cfg.source_classes), (cfg.source_classes, len(data.classes))))
    settings = Round(cfg.checkpoint_steps, cfg.checkpoint_batch, cfg.checkpoint_optimizer)
    with run.stage("checkpoint", shared=(pretrain, settings, cfg.model, cfg.mask_ratio, source.train, source.test)) as stage:
        fresh = load_masked_images(cfg.model, data=source, ratio=cfg.mask_ratio)
        return stage.unwrap(pretrain(stage, settings, fresh, None, source.train, source.test)[0]), target


def task_of(cfg: Config, run: Run, data: ImageData, low: int, high: int) -> ImageData:
    """The task of classes low..high-1; as target, with `labelled` training images, which the source (low = 0 of a
    small: model) does not need."""
    train, test = (of_classes(split, low, high) for split in (data.train, data.test))
    if cfg.labelled and high == len(data.classes):
        if cfg.labelled > len(train):
            raise UserError(f"--labelled {cfg.labelled} is more than the {len(train)} training images of the target.", code=2)
        train = train.subset(balanced_rows(train.labels, cfg.labelled, torch.Generator().manual_seed(run.seed)).to(train.device))
    return ImageData.of(data.name, train, test, data.classes[low:high])


# -- pre-training ------------------------------------------------------------------------------------------------------------------
def pretrain(stage: Run, settings: Round, begin: Any, teacher: nn.Module | None, train: Split, test: Split) -> tuple[Any, Tensor]:
    """One round: a copy of `begin` learns masked reconstruction and, with a teacher, its hidden states. Returns the model and its
    held-out error at the `marks` of the round."""
    model, optimizer = stage.trainable("model", copy.deepcopy(begin), settings.optimizer)
    if teacher is not None:
        teacher = stage.frozen(copy.deepcopy(teacher))
    curve, places = torch.full((POINTS,), torch.nan, device=stage.device), marks(settings.steps)
    stage.track(curve=curve)
    batches = Batches(train, settings.batch_size, stage.seed)
    for step in stage.steps(settings.steps):
        inputs, known = stage.shard(batches(step)).images, None
        errors, hidden = model(inputs, masked=settings.mae_weight > 0, hidden=teacher is not None)
        if teacher is not None:
            with torch.no_grad():
                _, known = teacher(inputs, masked=False)
        stage.update(optimizer, **losses(errors, hidden, known, settings.mae_weight, settings.kd_weight))
        if step in places and stage.last_chunk:
            curve[places[step]] = heldout(stage.unwrap(model), test)
    return stage.unwrap(model), curve


def marks(steps: int) -> dict[int, int]:
    """Places in the curve by the steps after which the held-out error is measured: POINTS of them evenly spread, the last at the end."""
    return {-(-steps * (place + 1) // POINTS) - 1: place for place in range(POINTS)}


@torch.no_grad()
def heldout(model: Any, test: Split, most: int = 512) -> Tensor:
    """The mean reconstruction error of at most `most` test inputs under masks that are the same for every model; in eval mode."""
    mode = model.training
    model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rows = torch.arange(min(most, len(test)), device=test.device).split(64)
        values = torch.cat([model(test.take(index).images, hidden=False)[0] for index in rows])
    model.train(mode)
    return values.mean()


# -- pictures ----------------------------------------------------------------------------------------------------------------------
def reconstructions(model: Any, test: Split, count: int = 8) -> Tensor:
    """(3 count, C, H, W) in [0, 1]: images, what the model is shown, and its prediction where patches were hidden, brought to the true mean
    and deviation of each patch, which it does not predict."""
    images = test.take(torch.arange(min(count, len(test)))).images
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        predicted, normalised, hidden = model.eval().reconstruct(images)
    side = images.shape[-1]
    if normalised.shape[1] * normalised.shape[2] != images[0].numel():  # a model of another size or number of channels
        return images
    patch = round((normalised.shape[2] / images.shape[1]) ** 0.5)
    pixels, hidden = patchify(images, patch), hidden.unsqueeze(-1)
    filled = pixels.mean(-1, keepdim=True) + predicted * pixels.std(-1, keepdim=True)
    rows = [pixels, pixels * (1 - hidden) + 0.5 * hidden, torch.where(hidden > 0, filled, pixels)]
    grid = torch.cat(rows).unflatten(1, (side // patch, -1)).unflatten(-1, (patch, patch, -1))
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3).clamp(0, 1)


def draw(axes: Any, curves: list[Tensor], every: float) -> None:
    for t, curve in enumerate(curves):
        name = f"self-distillation, round {t}" if t else "further pre-training"
        axes.plot([every * (i + 1) for i in range(len(curve))], curve.tolist(), label=name, linewidth=1.4)
    axes.set(xlabel="step of the round", ylabel="masked reconstruction error")
    axes.set_title("test inputs of the target", fontsize=10, loc="left")
    axes.legend(fontsize=9)


def save(classifier: nn.Module, folder: Path) -> None:
    classifier.save(folder) if isinstance(classifier, TextClassifier) else saving.save_classifier(classifier, folder)
