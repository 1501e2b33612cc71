"""What a few-step recipe is run on, by name: an exact teacher with its yardsticks, or a diffusers pipeline.

    setting = load("ring")                          # 2-D, exact
    setting = load("diffusers:FOLDER", prompts)     # a pipeline on disk

Recipes are the same code for all of them: a frozen teacher `(x, t, cond, process) -> Prediction`, a shape, conditions to draw, a network
to start students from, and a way to judge and to show samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stillroom.core.config import Natural, NonNegative
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.diffusion.denoiser import Denoiser, Guided, take
from stillroom.diffusion.exact import Mixture, four_classes, grid, ring
from stillroom.diffusion.objectives import squared
from stillroom.diffusion.processes import VP, Flow, Process
from stillroom.diffusion.sampling import sample
from stillroom.metrics.generation import coverage, energy_distance, frechet, mmd, modes
from stillroom.nets.denoisers import PointNet, UNet


@dataclass
class Setting:
    """A teacher and everything that goes with it."""

    name: str
    teacher: nn.Module
    process: Process
    shape: tuple[int, ...]
    student: Callable[[Run], Denoiser]
    """A trainable network that starts where the teacher is."""
    small: Callable[[int], Denoiser]
    """A fresh network, smaller than the student by the given factor."""
    evaluate: Callable[[Run, Tensor, Tensor], dict[str, float]]
    """(run, samples, reference samples) -> metrics."""
    show: Callable[[Run, str, Mapping[str, Tensor]], None]
    """Put named samples into the report."""
    truth: Callable[[int, Any], Tensor] | None = None
    """(n, conditions) -> real data, where there are any."""
    condition: Callable[[int], Any] = lambda n: None
    """Conditions for n samples, drawn from torch's generator."""
    null: Any = None
    pipeline: Any = None
    """The diffusers pipeline behind the teacher, for saving students."""
    embedded: float | None = None
    """The guidance scale that conditions carry, for networks that take it as an input."""
    _guided: dict[float, nn.Module] = field(default_factory=dict)

    def guided(self, weight: float) -> nn.Module:
        """The teacher under classifier-free guidance, the same network for the same weight; 1 is the plain teacher.

        A network that takes the scale as an input gets it from the conditions, so it is the teacher as it is. UserError where there is
        nothing to guide by, or for another scale than that of the conditions.
        """
        if self.embedded is not None:
            if weight != self.embedded:
                raise UserError(
                    f"guidance {weight:g}: the teacher {self.name} takes the guidance scale as an input, and its conditions were made "
                    f"with {self.embedded:g}; load it with guidance={weight:g}."
                )
            return self.teacher
        if weight == 1:
            return self.teacher
        if self.null is None:
            raise UserError(f"--guidance {weight:g}: the teacher {self.name} takes no conditions, so there is nothing to guide; use 1.")
        return self._guided.setdefault(weight, Guided(self.teacher, weight, self.null))

    def noise(self, n: int, device: torch.device | None = None) -> Tensor:
        return torch.randn(n, *self.shape, device=device)

    def save(self, net: nn.Module, folder: Path, times: Sequence[float], fresh_noise: bool) -> None:
        """A student for plain diffusers (see `Pipeline.save`), or the tensors of an embedded teacher's student."""
        if self.pipeline:
            self.pipeline.save(folder, net, times, fresh_noise)
        else:
            save_file(net.state_dict(), folder / "model.safetensors")

    def reference(self, n: int, guidance: float, steps: int, device: torch.device | None = None) -> tuple[Tensor, Any]:
        """n samples to compare with, and their conditions: real data if there are any, else the teacher's own at `steps` steps."""
        cond = placed(self.condition(n), device)
        if self.truth is not None:
            return self.truth(n, cond), cond
        start = self.process.start(self.noise(n, device))
        return sample(self.guided(guidance), start, self.process.grid(steps), cond, process=self.process), cond


def placed(cond: Any, device: torch.device | None) -> Any:
    """A condition on a device; a plain label stays as it is."""
    if isinstance(cond, dict):
        return {name: placed(value, device) for name, value in cond.items()}
    return cond.to(device) if isinstance(cond, Tensor) else cond


# -- exact teachers ----------------------------------------------------------------------------------------------------------------
def pretrained(run: Run, name: str, small: Callable[[int], Denoiser], teacher: Mixture, batch: int = 256, classes: int = 0) -> Denoiser:
    """A network trained on the mixture's own data: what "initialised from the teacher" means for an exact teacher.

    With classes it learns conditions too, 15 % of them dropped to -1.
    """
    optimizer, steps = Optimizer(lr=2e-3, schedule="cosine"), 1500
    with run.stage(f"init-{name}", shared=(pretrained, name, teacher, optimizer, steps, batch, classes)) as stage:
        net, adam = stage.trainable("net", small(1), optimizer)
        plain = stage.unwrap(net)
        process = plain.process
        for _ in stage.steps(steps):
            label = torch.randint(classes, (batch,), device=stage.device) if classes else None
            x0, label = stage.shard((teacher.sample(batch, label), label))
            if label is not None:
                label = torch.where(torch.rand(len(label), device=label.device) < 0.15, -1, label)
            eps, t = torch.randn_like(x0), process.uniform(len(x0), device=x0.device)
            stage.update(adam, squared(net(process.mix(x0, eps, t), t, label, read=False), plain.target(x0, eps, t)))
        return stage.unwrap(net)


def points(name: str, teacher: Mixture, classes: int = 0) -> Setting:
    """A 2-D mixture; with classes, a conditional one whose networks predict eps in the discrete VP process."""
    small = lambda factor: (
        Denoiser(PointNet(2, 64 // factor, 3, classes), VP(time_scale=1e-3), "eps")
        if classes
        else Denoiser(PointNet(2, 64 // factor, 3), Flow(), "velocity")
    )

    def evaluate(run: Run, x: Tensor, reference: Tensor) -> dict[str, float]:
        return {"mmd": mmd(x, reference), "energy": energy_distance(x, reference)} | modes(x, teacher.centres, 4 * teacher.std)

    def show(run: Run, name: str, sets: Mapping[str, Tensor]) -> None:
        def draw(axes: Any) -> None:
            for label, x in sets.items():
                axes.scatter(*x[:600].detach().cpu().T, s=3, alpha=0.5, label=label)
            axes.set_aspect("equal")
            axes.legend(markerscale=3, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))  # beside the points, which may lie anywhere

        run.figure(name, draw)

    return Setting(
        name,
        teacher,
        teacher.process,
        (2,),
        lambda run: pretrained(run, name, small, teacher, classes=classes),
        small,
        evaluate,
        show,
        truth=teacher.sample,
        condition=lambda n: torch.randint(classes, (n,)) if classes else None,
        null=-1 if classes else None,
    )


def digit_mixture(mirrored: bool = True, std: float = 0.25, count: int = 400) -> Mixture:
    """8x8 digits in [-1, 1] blurred by a Gaussian: an exact teacher of images; mirrored, it commutes exactly with a left-right flip."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images[:count], dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target[:count])
    if mirrored:
        images, labels = torch.cat([images, images.flip(-1)]), torch.cat([labels, labels])
    return Mixture(images, std, labels=labels)


def classifier() -> nn.Sequential:
    """Ten (mirrored) digits; the layer before the last gives 32 features."""
    conv = lambda a, b: [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*conv(1, 16), *conv(16, 32), nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10))


def digit_features(run: Run, teacher: Mixture) -> nn.Module:
    """Features of a classifier trained on the mixture's data, kept in the store, for Frechet and neighbour statistics."""
    optimizer = Optimizer(lr=3e-3, schedule="cosine")
    with run.stage("digit-classifier", shared=(digit_features, teacher, optimizer)) as stage:
        net, adam = stage.trainable("net", classifier(), optimizer)
        for _ in stage.steps(300):
            label = torch.randint(10, (128,))
            stage.update(adam, nn.functional.cross_entropy(net(teacher.sample(128, label)), label, reduction="none"))
        return stage.frozen(copy.deepcopy(stage.unwrap(net))[:-1])


def digits(name: str, teacher: Mixture) -> Setting:
    """Images [1, 8, 8] in [-1, 1]."""
    small = lambda factor: Denoiser(UNet(1, 16 // factor), Flow(), "velocity")

    def evaluate(run: Run, x: Tensor, reference: Tensor) -> dict[str, float]:
        features = digit_features(run, teacher)
        with torch.no_grad():
            ours, theirs = features(x), features(reference)
        return {"frechet": frechet(ours, theirs)} | coverage(theirs[:1000], ours[:1000])

    def show(run: Run, name: str, sets: Mapping[str, Tensor]) -> None:
        for label, x in sets.items():
            run.image(f"{name} {label}", (x[:32] + 1) / 2)

    def student(run: Run) -> Denoiser:
        return pretrained(run, name, small, teacher, batch=64)

    return Setting(name, teacher, teacher.process, (1, 8, 8), student, small, evaluate, show, truth=teacher.sample)


@dataclass(frozen=True)
class TeacherConfig:
    """Which teacher a few-step recipe distils: its Config inherits these flags."""

    teacher: str = "ring"
    """ring, grid, classes, digits (exact, nothing to train), or diffusers:FOLDER-OR-ID."""
    prompts: str = ""
    """Text file with one prompt per line (diffusers only)."""
    size: Natural = 0
    """Image size in pixels (diffusers only); 0 is the pipeline's own."""
    guidance: NonNegative = 1.0
    """Classifier-free guidance of the teacher (1: none); the input of a network with guidance embedding (FLUX.1-dev)."""
    fid: str = ""
    """Folder of real images, or "teacher": FID of the samples against them (diffusers only; pip install 'stillroom[fid]')."""

    def setting(self) -> Setting:
        """See `load`."""
        return load(self.teacher, self.prompts, self.size, self.guidance, self.fid)


# -- by name -----------------------------------------------------------------------------------------------------------------------
def load(name: str, prompts: str = "", size: int = 0, guidance: float = 1.0, fid: str = "") -> Setting:
    """The setting called `name`; see `pipelines.load` for `size` and `guidance`, `pipeline` for `fid`.

    UserError for an unknown name, for `fid` with an embedded teacher, and what `pipelines.load` raises for a diffusers folder.
    """
    if fid and not name.startswith("diffusers:"):
        raise UserError(f"--fid judges the images of a diffusers pipeline; the embedded teacher {name} has its own yardsticks.", code=2)
    match name:
        case "ring":
            return points(name, ring())
        case "grid":
            return points(name, grid())
        case "classes":
            return points(name, four_classes(), classes=4)
        case "digits":
            return digits(name, digit_mixture())
    if name.startswith("diffusers:"):
        return pipeline(name.removeprefix("diffusers:"), prompts, size, guidance, fid)
    raise UserError(f"--teacher {name!r} is none of ring, grid, classes, digits, diffusers:FOLDER-OR-ID.", code=2)


def pipeline(where: str, prompts: str, size: int, guidance: float, fid: str = "") -> Setting:
    """A diffusers pipeline; students start as copies of its network and work in its latent space.

    fid: also judge decoded samples by FID, against a folder of real images or against the "teacher" samples.
    """
    from stillroom.diffusion import pipelines
    from stillroom.metrics.fid import extractor, features

    if fid:
        extractor()  # a missing extra is said now, not after training
    real = features(fid) if fid not in ("", "teacher") else None

    pipe = pipelines.load(where, size, guidance)
    lines = pipelines.read_prompts(prompts) if pipe.encoders else [""]
    encoded = pipe.encode(lines)

    def condition(n: int) -> Any:
        return take(encoded, torch.randint(len(lines), (n,)))

    def evaluate(run: Run, x: Tensor, reference: Tensor) -> dict[str, float]:
        metrics = {"energy": energy_distance(x, reference)}
        if fid:
            metrics["fid"] = frechet(features(images(x)), features(images(reference)) if real is None else real)
        return metrics

    def images(x: Tensor) -> Tensor:
        return torch.cat([pipe.decode(part).cpu() for part in x.split(8)])

    def show(run: Run, name: str, sets: Mapping[str, Tensor]) -> None:
        for label, x in sets.items():
            run.image(f"{name} {label}", pipe.decode(x[:8]), columns=8)

    return Setting(
        Path(where).name,
        pipe.denoiser,
        pipe.denoiser.process,
        pipe.shape,
        lambda run: pipe.student(),
        pipe.smaller,
        evaluate,
        show,
        condition=condition,
        null=pipe.null,
        pipeline=pipe,
        embedded=pipe.guidance,
    )
