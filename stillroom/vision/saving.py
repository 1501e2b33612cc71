"""Classifiers on disk, in the format of the library that they came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from torch import nn

from stillroom.core.store import replacing
from stillroom.nets import packed
from stillroom.nets.wrapped import Wrapped

WEIGHTS = "model.safetensors"


def save_classifier(net: nn.Module, folder: str | Path, coded: Mapping[str, packed.Coded] | None = None) -> None:
    """Save so that the library that the net came from loads it; the folder appears whole or not at all.

    A transformers model: `AutoModelForImageClassification.from_pretrained(folder)` and `AutoImageProcessor` read it. A small network:
    model.safetensors and its spec in config.json, for `run:FOLDER`. Any other module: model.safetensors, and its class in config.json;
    load it in Python with that class and `load_state_dict`. With `coded` (codes by name of `net`'s parameters) the weights are packed into
    packed.safetensors instead, which `run:FOLDER` reads and `stillroom export` turns into the library's own format.
    """
    model: Any = net.model if isinstance(net, Wrapped) else net
    with replacing(Path(folder)) as place:
        if coded is not None:
            packed.save_packed(net, coded, place / packed.FILE)
        if hasattr(model, "save_pretrained"):
            (model if coded is None else model.config).save_pretrained(place)
            if isinstance(net, Wrapped):
                _write(place / "preprocessor_config.json", _processor(net))
            return
        if coded is None:
            save_model(model, str(place / WEIGHTS))
        if spec := getattr(model, "spec", None):
            _write(place / "config.json", {"stillroom": spec})
        else:
            _write(place / "config.json", {"class": f"{type(model).__module__}.{type(model).__qualname__}"})


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def _processor(net: Wrapped) -> dict[str, Any]:
    """What `forward` does to the pixels, in the terms of transformers."""
    size = {} if net.size is None else {"size": {"height": net.size, "width": net.size}, "resample": 2}
    mean, std = (values.flatten().tolist() for values in (net.normalise.mean, net.normalise.std))
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": net.size is not None,
        **size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
