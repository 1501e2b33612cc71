"""Image classifiers and encoders by name."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from stillroom.core.errors import UserError, needs
from stillroom.data.images import ImageData
from stillroom.nets import packed
from stillroom.nets.build import build
from stillroom.nets.wrapped import Backbone, Encoder, Wrapped
from stillroom.vision.saving import WEIGHTS

KINDS = "small:NAME, hf:ID-or-folder, run:FOLDER or timm:NAME"
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


def load_classifier(spec: str, *, data: ImageData, fresh: bool = False) -> nn.Module:
    """The classifier that `spec` names: images (B, C, H, W) in [0, 1] to logits over the classes of `data`.

    `small:NAME` is one of Stillroom's own networks, always with fresh weights. `hf:ID-or-folder` is a transformers image classifier with
    its weights, or with `fresh` one of the same config with random weights and the classes, channels and normalisation of `data`.
    `run:FOLDER` is a student that an earlier run saved. `timm:NAME` needs timm. UserError for anything that cannot be loaded, for weights
    other than safetensors (pickles can run code: they are never opened), and for a number of classes other than that of `data`.
    """
    kind, _, name = spec.partition(":")
    if kind == "small" and name:
        return build(name, classes=len(data.classes), channels=data.channels, size=data.size, mean=data.mean, std=data.std)
    if kind == "run" and name:
        return _saved(Path(name), data, fresh)
    if kind == "hf" and name:
        return _transformers(name, data, fresh)
    if kind == "timm" and name:
        return _timm(name, data, fresh)
    raise UserError(f"{spec!r} names no classifier: write {KINDS}.")


def load_encoder(spec: str, *, data: ImageData, fresh: bool = False) -> nn.Module:
    """The image encoder that `spec` names: images (B, C, H, W) in [0, 1] to features (B, d).

    `small:NAME` is what the head of one of Stillroom's own networks sees, always with fresh weights. `hf:ID-or-folder` is a transformers
    backbone (without any head) with its weights, or with `fresh` one of the same config with random weights and the channels and
    normalisation of `data`. `run:FOLDER` is either, as an earlier run saved it, whatever its classes. UserError as for `load_classifier`.
    """
    kind, _, name = spec.partition(":")
    if kind == "small" and name:
        return Encoder(load_classifier(spec, data=data))
    if kind == "run" and name:
        folder = _student(Path(name))
        if "model_type" not in _config(folder):
            return Encoder(_saved(folder, data, fresh, any_classes=True))
        kind, name = "hf", str(folder)
    if kind != "hf" or not name:
        raise UserError(f"{spec!r} names no encoder: write small:NAME, hf:ID-or-folder or run:FOLDER.")
    transformers = needs("transformers", "hf")
    try:
        if fresh:
            config = transformers.AutoConfig.from_pretrained(name)
            config.num_channels = data.channels
            size = _expected_size(config, _read_processor(transformers, name))
            return Backbone(transformers.AutoModel.from_config(config), size, data.mean, data.std)
        model = transformers.AutoModel.from_pretrained(name, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"hf:{name} could not be loaded: {error}") from error
    return wrap(model, name, data=data, kind=Backbone)


def wrap(model: nn.Module, name: str, *, data: ImageData | None, kind: type[Wrapped] = Wrapped) -> Wrapped:
    """A transformers image model, loaded from `name`, with the size and normalisation that its processor file declares."""
    config: Any = model.config
    processor = _read_processor(needs("transformers", "hf"), name)
    return kind(model, _expected_size(config, processor), *_normalisation(name, config, processor, data))


def load_student(folder: str | Path) -> nn.Module:
    """The classifier that a run saved, whatever data it learned from. UserError as for `run:FOLDER`."""
    return _saved(Path(folder), None, False)


def _student(folder: Path) -> Path:
    """Where the student lies, of a run's folder or of the student's own."""
    return next((place for place in (folder / "student", folder) if (place / "config.json").is_file()), folder)


def _saved(folder: Path, data: ImageData | None, fresh: bool, any_classes: bool = False) -> nn.Module:
    folder = _student(folder)
    config = _config(folder)
    if "model_type" in config:
        return _transformers(str(folder), data, fresh)
    if "stillroom" not in config:
        raise UserError(
            f"{folder} holds a {config.get('class', 'network')}, which only Python can load: build it with your own code, give it "
            f"safetensors.torch.load_file('{folder / WEIGHTS}') and pass the module to the recipe's main()."
        )
    spec = config["stillroom"]
    if not any_classes:
        _same_classes(str(folder), spec["classes"], data)
    if data is not None and (spec["channels"], spec["size"]) != (data.channels, data.size):
        raise UserError(
            f"{folder} takes images of {spec['channels']} channels and {spec['size']} pixels a side, but {data.name} has "
            f"{data.channels} channels and {data.size} pixels."
        )
    net = build(**spec)
    if not fresh and (folder / packed.FILE).is_file():
        packed.load_packed(net, folder / packed.FILE)
    elif not fresh:
        _only_safetensors(folder)
        try:
            net.load_state_dict(load_file(folder / WEIGHTS))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder / WEIGHTS} could not be read ({error}). It may be damaged: copy it again.") from error
    return net


def _transformers(name: str, data: ImageData | None, fresh: bool) -> nn.Module:
    transformers = needs("transformers", "hf")
    folder = Path(name)
    if folder.is_dir() and "model_type" not in _config(folder):
        raise UserError(f"{folder / 'config.json'} names no transformers model. A student of Stillroom loads as run:{folder}.")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        processor = _read_processor(transformers, name)
        if fresh and data is not None:
            config.id2label = dict(enumerate(data.classes))
            config.label2id = {label: number for number, label in enumerate(data.classes)}
            config.num_channels = data.channels
            model = transformers.AutoModelForImageClassification.from_config(config)
            return Wrapped(model, _expected_size(config, processor), data.mean, data.std)
        _same_classes(name, config.num_labels, data)
        if folder.is_dir():
            _only_safetensors(folder)
        if coded := (folder / packed.FILE).is_file():
            model, missing = transformers.AutoModelForImageClassification.from_config(config), set()
        else:
            model, report = transformers.AutoModelForImageClassification.from_pretrained(
                name, use_safetensors=True, output_loading_info=True
            )
            missing = report["missing_keys"]
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"hf:{name} could not be loaded: {error}") from error
    if missing:
        raise UserError(f"hf:{name} is not a trained classifier: its weights lack {', '.join(sorted(missing)[:3])}.")
    net = wrap(model, name, data=data)
    if coded:
        packed.load_packed(net, folder / packed.FILE)
    return net


def _normalisation(
    name: str, config: Any, processor: Mapping[str, Any], data: ImageData | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:  # fmt: skip
    """Mean and deviation by which the model's images in [0, 1] are normalised. UserError if its channels are not those of `data`."""
    channels = getattr(config, "num_channels", 3)
    if data is not None and data.channels not in (1, channels):
        raise UserError(f"hf:{name} takes images of {channels} channel(s), but {data.name} has {data.channels}.")
    if not processor:
        warnings.warn(f"hf:{name} has no preprocessor_config.json: images are normalised by a mean and deviation of 0.5.", stacklevel=4)
    scale = 255 * processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 255.0
    normalise = processor.get("do_normalize", True)
    mean, std = (
        tuple(value / scale for value in (processor.get(key) or [0.5] * channels)) if normalise else (plain / scale,) * channels
        for key, plain in (("image_mean", 0.0), ("image_std", 1.0))
    )
    return mean, std


def _read_processor(transformers: Any, name: str) -> dict[str, Any]:
    """preprocessor_config.json, read without the image processor's class, which may want torchvision; empty if there is none."""
    try:
        return transformers.BaseImageProcessor.get_image_processor_dict(name)[0]
    except OSError:
        return {}


def _expected_size(config: Any, processor: Mapping[str, Any]) -> int | None:
    """Pixels a side that the model was trained at: the processor's crop or size, else the config's image_size; None if unsaid."""
    for size in (
        processor.get("crop_size") if processor.get("do_center_crop") else None,
        processor.get("size"),
        getattr(config, "image_size", None),
    ):
        if isinstance(size, Mapping):
            size = size.get("height") or size.get("shortest_edge")
        if isinstance(size, list | tuple):
            size = size[0]
        if isinstance(size, int):
            return size if processor.get("do_resize", True) else None
    return None


def _timm(name: str, data: ImageData, fresh: bool) -> nn.Module:
    timm = needs("timm", "timm")
    try:
        shape = {"num_classes": len(data.classes), "in_chans": data.channels} if fresh else {}
        model = timm.create_model(name, pretrained=not fresh, **shape)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"timm:{name} could not be loaded: {error}") from error
    _same_classes(f"timm:{name}", model.num_classes, data)
    expected = timm.data.resolve_model_data_config(model)
    mean, std = (data.mean, data.std) if fresh else (expected["mean"], expected["std"])
    return Wrapped(model, expected["input_size"][-1], mean, std)


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        what = "there is no such folder" if not folder.is_dir() else "the folder has no config.json"
        raise UserError(f"{folder}: {what}. Give the folder that save_pretrained, or an earlier run, has written.")
    try:
        return dict(json.loads(file.read_text()))
    except ValueError as error:
        raise UserError(f"{file} is not readable JSON ({error}).") from error


def _only_safetensors(folder: Path) -> None:
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    if any(name.endswith(".safetensors") for name in files):
        return
    if pickles := [name for name in files if Path(name).suffix in PICKLES]:
        raise UserError(
            f"{folder}: {pickles[0]} is a pickle, which can run code when it is opened, and was not opened. If you trust its source, "
            "convert it once: load it in Python and save it with save_pretrained or safetensors.torch.save_file."
        )
    raise UserError(f"{folder}: no weights were found (*.safetensors).")


def _same_classes(name: str, count: int, data: ImageData | None) -> None:
    if data is not None and count != len(data.classes):
        raise UserError(
            f"{name} tells {count} classes apart, but {data.name} has {len(data.classes)}. Teacher and data must agree: train the teacher "
            "on this data, or choose data with its classes."
        )
