"""Small networks by name, their bodies under new heads, and the pruning of a classifier's outputs."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.core.errors import UserError
from stillroom.nets.checked import Fields, check_parameters
from stillroom.nets.convnet import average_convnet, convnet
from stillroom.nets.mlp import mlp
from stillroom.nets.parts import Classifier
from stillroom.nets.residual_mlp import residual_mlp
from stillroom.nets.resnet import preact_resnet18, resnet
from stillroom.nets.vit import ViT

NAMES = (
    "mlp", "mlp-256x256", "convnet", "convnet-w16", "convnet-avg-16x32x64", "resnet8", "resnet20", "resnet32", "preact-resnet18",
    "residual-mlp-w128-d6", "vit-p2-w32-d3",
)  # fmt: skip
"""Examples; any widths, and any resnet of 6n+2 layers, can be built."""
DEEPEST, WIDEST, PARAMETERS = 2**10, 2**16, 2**28
"""No small network has more layers, units in a layer, or parameters (a gigabyte)."""


def build(name: str, *, classes: int, channels: int, size: int, mean: Sequence[float], std: Sequence[float]) -> Classifier:
    """A freshly initialised classifier of images (B, channels, size, size) in [0, 1], which it normalises by `mean` and `std`.

    `mlp-AxB` has hidden layers of A and B units (`mlp`: 256x256), `convnet-wN` stages of N, 2N and 4N channels (`convnet`: 16),
    `convnet-avg-AxBxC` stages of A, B and C channels with average-pooling, `resnetD` D = 6n+2 layers; `preact-resnet18`;
    `residual-mlp-wN-dD` D residual blocks of N units; `vit-pP-wW-dD` patches of P pixels, width W and D blocks. Each has
    `features(images)`, `head` (nn.Linear) and `spec`: `build(**net.spec)` builds its like. UserError for any other name, for images that
    the network cannot take, and for sizes that are not small.
    """
    shape: dict[str, Any] = {"classes": classes, "channels": channels, "size": size, "mean": tuple(mean), "std": tuple(std)}
    widths, depths = ([int(number) for number in re.findall(pattern, name[:100])] for pattern in (r"\d+", r"(?:-d|resnet)(\d+)"))
    if len(name) > 100 or max(widths, default=0) > WIDEST or max(depths, default=0) > DEEPEST:
        raise UserError(f"{name[:100]} is no small network: they have at most {DEEPEST} layers, of at most {WIDEST} units.")
    check_parameters(lambda: _assembled(name, **shape), PARAMETERS, f"{name} on images of {channels} x {size} x {size}")
    return _assembled(name, **shape)


def rebuild(spec: Any, file: Path) -> Classifier:
    """A freshly initialised network of the `spec` that a JSON file holds as `stillroom`. UserError naming the file and the field."""
    fields = Fields(file, spec, "stillroom")
    channels = fields.whole("channels", 2**12)
    shape: dict[str, Any] = {"classes": fields.whole("classes", 2**20), "channels": channels, "size": fields.whole("size", 2**12)}
    shape |= {"mean": fields.numbers("mean", channels), "std": fields.numbers("std", channels, positive=True)}
    name = fields.text("name")
    fields.only("name", *shape)
    try:
        return build(name, **shape)
    except UserError as error:
        raise UserError(f"{file}: stillroom.name: {error}") from error


def _assembled(name: str, *, classes: int, channels: int, size: int, mean: Sequence[float], std: Sequence[float]) -> Classifier:
    """What `build` builds, whatever its size."""
    if name == "preact-resnet18":
        body, width = preact_resnet18(channels)
    elif match := re.fullmatch(r"mlp(?:-([1-9]\d*(?:x[1-9]\d*)*))?", name):
        body, width = mlp(channels * size * size, [int(units) for units in (match[1] or "256x256").split("x")])
    elif match := re.fullmatch(r"convnet(?:-w([1-9]\d*))?", name):
        if size < 4:
            raise UserError(f"{name} halves images twice, which leaves nothing of {size} x {size} pixels: take an mlp or a resnet.")
        body, width = convnet(channels, int(match[1] or 16))
    elif match := re.fullmatch(r"residual-mlp-w([1-9]\d*)-d([1-9]\d*)", name):
        body, width = residual_mlp(channels * size * size, int(match[1]), int(match[2]))
    elif match := re.fullmatch(r"convnet-avg-([1-9]\d*(?:x[1-9]\d*)*)", name):
        widths = [int(units) for units in match[1].split("x")]
        if size % 2 ** len(widths):
            raise UserError(f"{name} halves images {len(widths)} times, so that {2 ** len(widths)} must divide their {size} pixels.")
        body, width = average_convnet(channels, size, widths)
    elif match := re.fullmatch(r"vit-p([1-9]\d*)-w([1-9]\d*)-d([1-9]\d*)", name):
        patch, width, depth = map(int, match.groups())
        if size % patch or width % max(1, width // 16):
            raise UserError(f"{name}: patches of {patch} must divide images of {size} pixels, and the W // 16 heads their width {width}.")
        shape: dict[str, Any] = {"classes": classes, "channels": channels, "size": size, "mean": tuple(mean), "std": tuple(std)}
        return ViT(name, patch, width, depth, **shape)
    elif (match := re.fullmatch(r"resnet(\d+)", name)) and int(match[1]) >= 8 and int(match[1]) % 6 == 2:
        body, width = resnet(channels, int(match[1]))
    else:
        near = difflib.get_close_matches(name, NAMES, cutoff=0.5)
        raise UserError(f"There is no small network {name!r}. {'Near' if near else 'There are'}: {', '.join(near or NAMES)}.")
    return Classifier(name, body, width, classes=classes, channels=channels, size=size, mean=tuple(mean), std=tuple(std))


def with_head(net: Any, classes: int) -> Classifier:
    """A small network with a copy of `net`'s body (buffers such as running statistics included) under a fresh head of `classes` outputs."""
    fresh = build(**{**net.spec, "classes": classes})
    body = {name: value for name, value in net.state_dict().items() if not name.startswith("head.")}
    fresh.load_state_dict({**fresh.state_dict(), **body})
    return fresh.to(net.head.weight.device)


def keep_outputs(net: nn.Module, rows: slice | Tensor) -> nn.Module:
    """A deep copy of a classifier that gives only these of its logits: its last linear layer loses the other rows.

    For training with several heads held in one linear layer, of which one is kept. The declared number of classes follows (`spec` of a
    small network; num_labels and label names of a transformers config). ValueError if no linear layer has the declared outputs.
    """
    net = copy.deepcopy(net)
    model = next((module for module in net.modules() if hasattr(getattr(module, "config", None), "id2label")), None)
    spec: Any = getattr(net, "spec", None)
    declared = model.config.num_labels if isinstance(model, nn.Module) else spec["classes"] if spec else None  # type: ignore[union-attr]
    linears = [m for m in net.modules() if isinstance(m, nn.Linear) and declared in (None, m.out_features)]
    if not linears:
        raise ValueError(f"{type(net).__name__} has no linear layer of {declared or 'any'} outputs")
    head = linears[-1]
    kept = torch.arange(head.out_features)[rows.cpu() if isinstance(rows, Tensor) else rows]
    with torch.no_grad():
        head.weight = nn.Parameter(head.weight[kept].clone(), head.weight.requires_grad)
        if head.bias is not None:
            head.bias = nn.Parameter(head.bias[kept].clone(), head.bias.requires_grad)
    head.out_features = len(kept)
    if isinstance(model, nn.Module):
        config: Any = model.config
        names = [config.id2label[row] for row in kept.tolist()]
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
        for module in net.modules():
            if hasattr(module, "num_labels"):
                module.num_labels = len(kept)  # type: ignore[assignment]
    if spec:
        net.spec = {**spec, "classes": len(kept)}  # type: ignore[assignment]
    return net
