"""LoRA that PEFT saved, folded into the model it was trained on. Only tensors are read, by safetensors: PEFT's own loader would import
modules and open pickles that adapter_config.json names."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stillroom.core.errors import UserError
from stillroom.nets.checked import Fields, is_number, read_object

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
ID = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*")
MERGE = "Merge it in Python (PEFT's merge_and_unload), save the model with save_pretrained, and give that folder."
PLAIN = {
    "bias": "none", "use_dora": False, "use_qalora": False, "lora_bias": False, "alpha_pattern": {},
    "layer_replication": None, "trainable_token_indices": None, "target_parameters": None, "alora_invocation_tokens": None,
    "revision": None,
}  # fmt: skip
"""Fields that change what an adapter does to its base, and the value at which it is plain LoRA; None: any that is empty."""


def base_of(file: Path) -> str:
    """The folder or ID of the model that an adapter_config.json was trained on.

    UserError unless it is an existing folder or an ID, and for a name that could be either: others wrote it, and do not know this place.
    """
    fields = Fields(file, read_object(file))
    name = fields.text("base_model_name_or_path")
    folder, hub = bool(name) and "\0" not in name and Path(name).is_dir(), bool(ID.fullmatch(name))
    if folder and hub:
        raise UserError(f"{file}: base_model_name_or_path {name!r} is a folder here and an ID on the hub: write ./{name} for the folder.")
    if not folder and not hub:
        raise fields.wrong("base_model_name_or_path", "a folder that exists here or an ID on the hub (correct it if you know the base)")
    return name


@torch.no_grad()
def fold(net: Any, file: Path) -> None:
    """Add the LoRA beside an adapter_config.json to the weights of its base, in place: W + factor B A, and whole tensors as they are.

    UserError for anything but plain LoRA on layers of the net, for damaged files, and for weights other than safetensors.
    """
    fields = Fields(file, read_object(file))
    if fields.text("peft_type") != "LORA":
        raise UserError(f"{file}: a {fields.text('peft_type')[:50]} adapter cannot be read here, only LORA. {MERGE}")
    for field, plain in PLAIN.items():
        if fields.values.get(field) and fields.values[field] != plain:
            raise UserError(f"{fields.wrong(field, 'plain LoRA')} {MERGE}")
    if not is_number(fields.values.get("lora_alpha"), positive=True):
        raise fields.wrong("lora_alpha", "a positive number")
    alpha, root = float(fields.values["lora_alpha"]), fields.flag("use_rslora", False)
    weights = file.parent / WEIGHTS
    if not weights.is_file():
        raise UserError(f"{weights} is not a file; adapters are read from safetensors, never from pickles such as adapter_model.bin.")
    try:
        tensors = load_file(weights)
        own = dict(net.named_modules())
        for name, tensor in tensors.items():
            path, _, kind = name.removeprefix(PREFIX).rpartition(".lora_")
            if not path:
                _whole(net, name.removeprefix(PREFIX), tensor)
            elif kind == "B.weight":
                down = tensors[f"{name.removesuffix('B.weight')}A.weight"]
                rank = len(down)
                _add(net, own[path], tensor.float() @ down.float() * (alpha / (math.sqrt(rank) if root else rank)))
            elif kind != "A.weight" or f"{name.removesuffix('A.weight')}B.weight" not in tensors:
                raise ValueError(f"{name} is no part of plain LoRA. {MERGE}")
    except (OSError, KeyError, AttributeError, RuntimeError, ValueError, ZeroDivisionError, SafetensorError) as error:
        raise UserError(f"{weights} could not be folded into a {type(net).__name__} ({error}).") from error


def _whole(net: Any, name: str, tensor: Tensor) -> None:
    """Take a tensor that was saved whole (PEFT's modules_to_save)."""
    place = _unshared(net, net.get_parameter(name))
    if place.shape != tensor.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, where {tuple(place.shape)} was expected")
    place.copy_(tensor)


def _add(net: Any, layer: nn.Module, change: Tensor) -> None:
    """Add (out, in) to a layer's weight."""
    weight = _unshared(net, layer.weight)
    change = change.T if type(layer).__name__ == "Conv1D" else change  # GPT-2's linear layers keep (in, out)
    if weight.shape != change.shape:
        raise ValueError(f"a change of shape {tuple(change.shape)} fits no weight of {tuple(weight.shape)}")
    weight.add_(change.to(weight.dtype))


def _unshared(net: Any, weight: Any) -> Any:
    """The weight. ValueError if embedding and output layer share it: PEFT changes one of them, and folding would change both."""
    if weight is net.get_input_embeddings().weight and weight is net.get_output_embeddings().weight:
        raise ValueError(f"the embedding shares its weight with the output layer, and the adapter changes one of them. {MERGE}")
    return weight
