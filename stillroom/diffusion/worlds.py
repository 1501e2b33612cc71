"""Embedded settings: mixtures whose denoiser is exact, a small network that is trained to be there first, and yardsticks.

world("ring"), world("digits", width=32, steps=3000), Points("mine", mixture, classes=8, process=EDM(), prediction="edm")
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stillroom.adapt import lora
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.diffusion import processes
from stillroom.diffusion.denoiser import Denoiser, PredictionType
from stillroom.diffusion.exact import Mixture, four_classes, grid, ring
from stillroom.diffusion.objectives import squared
from stillroom.diffusion.processes import VP, Process
from stillroom.diffusion.setting import Setting
from stillroom.metrics.generation import coverage, energy_distance, frechet, mmd, modes
from stillroom.nets import denoisers

WEIGHTS, SPEC = "model.safetensors", "config.json"


class World(Setting):
    """A mixture as exact teacher and endless data. `Points` and `Digits` give network and yardsticks.

    classes: the networks learn conditions 0..classes - 1, and -1 for none. process, prediction: of the network that starts where the
    teacher is, by default the mixture's own with velocity (eps in VP). steps, batch: of its training. teacher: a trained network in
    place of the exact one, from which students then start.
    """

    real = True

    def __init__(
        self,
        name: str,
        mixture: Mixture,
        *,
        classes: int = 0,
        width: int,
        process: Process | None = None,
        prediction: PredictionType | None = None,
        steps: int = 1500,
        batch: int = 256,
        teacher: Denoiser | None = None,
    ):
        self.name, self.mixture, self.classes, self.width = name, mixture, classes, width
        self.teacher = teacher or mixture
        self.own_process = process or mixture.process
        self.own_prediction: PredictionType = prediction or ("eps" if isinstance(self.own_process, VP) else "velocity")
        self.steps, self.batch, self.null = steps, batch, -1 if classes else None

    def network(self, width: int, dropout: float) -> nn.Module:
        raise NotImplementedError

    def small(
        self, factor: int = 1, process: Process | None = None, prediction: PredictionType | None = None, dropout: float = 0.0
    ) -> Denoiser:
        if self.width // factor < 4 or self.width // factor % 4:
            raise UserError(f"a width of {self.width} divided by {factor} is no positive multiple of 4.", code=2)
        net = self.network(self.width // factor, dropout)
        return Denoiser(net, process or self.own_process, prediction or self.own_prediction)

    def start(self, run: Run) -> Denoiser:
        if isinstance(self.teacher, Denoiser):
            return copy.deepcopy(self.teacher).to(run.device).requires_grad_(True)
        return pretrained(run, self)

    def condition(self, n: int, device: torch.device | None = None) -> Tensor | None:
        return torch.randint(self.classes, (n,), device=device) if self.classes else None

    def samples(self, n: int, device: torch.device | None = None) -> tuple[Tensor, Tensor | None]:
        cond = self.condition(n, device)
        return self.mixture.to(device).sample(n, cond), cond

    def save(self, net: nn.Module, folder: Path, times: Sequence[float], fresh_noise: bool) -> None:
        """Tensors, and what makes the network and its samples again, for `run:FOLDER`; LoRA is merged."""
        plain: Any = lora.merge(copy.deepcopy(net))
        save_file({name: value.contiguous() for name, value in plain.state_dict().items()}, folder / WEIGHTS)
        facts = {"world": self.name, "denoiser": spec_of(plain), "times": list(times), "fresh_noise": fresh_noise}
        (folder / SPEC).write_text(json.dumps({"stillroom": facts}, indent=2) + "\n")


class Points(World):
    """A mixture of points [D], judged by MMD, energy distance and modes."""

    def __init__(self, name: str, mixture: Mixture, *, width: int = 64, depth: int = 3, **rest: Any):
        super().__init__(name, mixture, width=width, **rest)
        self.depth, self.shape = depth, tuple(mixture.centres.shape[1:])

    def network(self, width: int, dropout: float) -> nn.Module:
        return denoisers.PointNet(self.shape[0], width, self.depth, self.classes, dropout)

    def evaluate(self, run: Run, x: Tensor, reference: Tensor) -> dict[str, float]:
        centres = self.mixture.centres.to(x.device)
        return {"mmd": mmd(x, reference), "energy": energy_distance(x, reference)} | modes(x, centres, 4 * self.mixture.std)

    def show(self, run: Run, name: str, sets: Mapping[str, Tensor]) -> None:
        def draw(axes: Any) -> None:
            for label, x in sets.items():
                axes.scatter(*x[:600].detach().cpu().T, s=3, alpha=0.5, label=label)
            axes.set_aspect("equal")
            axes.legend(markerscale=3, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))  # beside the points, which may lie anywhere

        run.figure(name, draw)


class Digits(World):
    """Images [1, 8, 8] in [-1, 1], judged in the features of a small classifier."""

    shape = (1, 8, 8)

    def __init__(self, name: str, mixture: Mixture, *, width: int = 16, batch: int = 64, **rest: Any):
        super().__init__(name, mixture, width=width, batch=batch, **rest)

    def network(self, width: int, dropout: float) -> nn.Module:
        return denoisers.UNet(1, width, self.classes, dropout)

    def evaluate(self, run: Run, x: Tensor, reference: Tensor) -> dict[str, float]:
        features = digit_features(run, self.mixture)
        with torch.no_grad():
            ours, theirs = features(x), features(reference)
        return {"frechet": frechet(ours, theirs)} | coverage(theirs[:1000], ours[:1000])

    def show(self, run: Run, name: str, sets: Mapping[str, Tensor]) -> None:
        for label, x in sets.items():
            run.image(f"{name} {label}", (x[:32] + 1) / 2)


def pretrained(run: Run, world: World) -> Denoiser:
    """A network trained on the mixture's own data: what "initialised from the teacher" means for an exact teacher. Kept in the store.

    With classes it learns conditions too, 15 % of them dropped to -1.
    """
    optimizer = Optimizer(lr=2e-3, schedule="cosine")
    with torch.device("meta"):  # its form alone is part of the key
        form = spec_of(world.small(1))
    decides = (pretrained, world.name, form, world.mixture, optimizer, world.steps, world.batch)
    with run.stage(f"init-{world.name}", shared=decides) as stage:
        net, adam = stage.trainable("net", world.small(1), optimizer)
        plain = stage.unwrap(net)
        for _ in stage.steps(world.steps):
            x0, label = world.data(stage, world.batch)
            if label is not None:
                label = torch.where(torch.rand(len(label), device=label.device) < 0.15, -1, label)
            eps, t = torch.randn_like(x0), plain.process.uniform(len(x0), device=x0.device)
            stage.update(adam, squared(net(plain.process.mix(x0, eps, t), t, label, read=False), plain.target(x0, eps, t)))
        return stage.unwrap(net)


# -- the digits ----------------------------------------------------------------------------------------------------------------------
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


def digit_features(run: Run, mixture: Mixture) -> nn.Module:
    """Features of a classifier trained on the mixture's data, kept in the store, for Frechet and neighbour statistics."""
    optimizer = Optimizer(lr=3e-3, schedule="cosine")
    with run.stage("digit-classifier", shared=(digit_features, mixture, optimizer)) as stage:
        net, adam = stage.trainable("net", classifier(), optimizer)
        mixture.to(stage.device)
        for _ in stage.steps(300):
            label = torch.randint(10, (128,), device=stage.device)
            stage.update(adam, nn.functional.cross_entropy(net(mixture.sample(128, label)), label, reduction="none"))
        return stage.frozen(copy.deepcopy(stage.unwrap(net))[:-1])


# -- by name, and from disk ----------------------------------------------------------------------------------------------------------
NAMES = ("ring", "grid", "classes", "digits")


def world(name: str, **arguments: Any) -> World:
    """The embedded world of that name; arguments as of `World`. KeyError for another name."""
    match name:
        case "ring":
            return Points(name, ring(), **arguments)
        case "grid":
            return Points(name, grid(), **arguments)
        case "classes":
            return Points(name, four_classes(), **{"classes": 4, **arguments})
        case "digits":
            return Digits(name, digit_mixture(), **arguments)
    raise KeyError(name)


def spec_of(net: Denoiser) -> dict[str, Any]:
    """What makes a denoiser of the same form, as JSON has it."""
    network: Any = net.net
    process = processes.describe(net.process)
    return {"network": network.spec, "process": process, "prediction": net.prediction, "sigma_data": net.sigma_data}


class Saved(NamedTuple):
    """A few-step student from disk."""

    net: Denoiser
    world: str
    times: list[float]
    fresh_noise: bool


def saved(folder: str | Path) -> Saved:
    """The student that a few-step recipe saved in a run's folder (or in its student/, or student/phase1). UserError for anything else."""
    folder = Path(folder)
    place = folder / "student" if (folder / "student").is_dir() else folder
    try:
        facts = json.loads((place / SPEC).read_text())["stillroom"]
        spec = facts["denoiser"]
        net = Denoiser(
            denoisers.build(**spec["network"]), processes.named(**spec["process"]), spec["prediction"], float(spec["sigma_data"])
        )
        net.load_state_dict(load_file(place / WEIGHTS))
        return Saved(net, str(facts["world"]), [float(t) for t in facts["times"]], bool(facts["fresh_noise"]))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} holds no few-step student of an embedded teacher ({type(error).__name__}: {error}).", code=2) from None
