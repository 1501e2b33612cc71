"""transformers models by name, with the head that they were pre-trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillroom.core.errors import UserError, needs
from stillroom.nets.checked import check_config, loading, only_safetensors, read_object


def configured(name: str) -> Any:
    """The transformers config of an ID or a folder, its fields checked first. Code that it names is never run, nor asked for.

    UserError that names config.json and the field.
    """
    transformers = needs("transformers", "hf")
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
