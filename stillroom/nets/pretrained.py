"""transformers models by name, with the head that they were pre-trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillroom.core.errors import UserError, needs
from stillroom.nets.checked import check_config, loading, only_safetensors, read_object

ADAPTER = "adapter_config.json"


def adapter_of(name: str) -> Path | None:
    """The adapter_config.json of an ID or a folder that holds a PEFT adapter, None for a whole model. UserError for a folder with both,
    of which nobody could say what is meant."""
    needs("transformers", "hf")
    from transformers.utils import find_adapter_config_file

    folder = Path(name)
    if not folder.is_dir():
        with loading(f"hf:{name}"):
            return Path(found) if (found := find_adapter_config_file(name)) else None
    if not (folder / ADAPTER).exists():
        return None
    if (folder / "config.json").exists():
        raise UserError(f"{folder / ADAPTER} lies beside config.json: give adapter and whole model a folder each.")
    return folder / ADAPTER


def configured(name: str) -> Any:
    """The transformers config of an ID or a folder, its fields checked first. Code that it names is never run, nor asked for.

    UserError that names config.json and the field, and for a PEFT adapter: transformers would follow it to whatever base it names.
    """
    transformers = needs("transformers", "hf")
    if file := adapter_of(name):
        raise UserError(f"{file} says that {name} is a PEFT adapter, where a whole model is needed: merge it into its base and save that.")
    local = Path(name).is_dir()
    where = Path(name) / "config.json" if local else f"hf:{name}"
    with loading(where):
        check_config(read_object(Path(where)) if local else transformers.PreTrainedConfig.get_config_dict(name)[0], where)
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)


def pretrained(spec: str, loader: str, model_type: str | None = None) -> Any:
    """The transformers model that `hf:ID-or-folder` names, its pre-training head included. UserError for anything else."""
    kind, _, name = spec.partition(":")
    if kind != "hf" or not name:
        raise UserError(f"{spec!r} names no model for masked pre-training: write small:vit-pP-wW-dD or hf:ID-or-folder.")
    transformers = needs("transformers", "hf")
    found = configured(name).model_type
    if model_type not in (None, found):
        raise UserError(f"{spec} is a {found}, and masked pre-training on images needs a {model_type} with its decoder.")
    if Path(name).is_dir():
        only_safetensors(Path(name))
    with loading(spec):
        model, report = getattr(transformers, loader).from_pretrained(
            name, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    if report["missing_keys"]:
        raise UserError(f"{spec} lacks {', '.join(sorted(report['missing_keys'])[:3])}: it was saved without its pre-training head.")
    return model
