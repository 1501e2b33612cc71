"""transformers models by name, with the head that they were pre-trained with."""

from __future__ import annotations

from typing import Any

from safetensors import SafetensorError

from stillroom.core.errors import UserError, needs


def pretrained(spec: str, loader: str, model_type: str | None = None) -> Any:
    """The transformers model that `hf:ID-or-folder` names, its pre-training head included. UserError for anything else."""
    kind, _, name = spec.partition(":")
    if kind != "hf" or not name:
        raise UserError(f"{spec!r} names no model for masked pre-training: write small:vit-pP-wW-dD or hf:ID-or-folder.")
    transformers = needs("transformers", "hf")
    try:
        found = transformers.AutoConfig.from_pretrained(name).model_type
        if model_type not in (None, found):
            raise UserError(f"{spec} is a {found}, and masked pre-training on images needs a {model_type} with its decoder.")
        model, report = getattr(transformers, loader).from_pretrained(name, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{spec} could not be loaded: {error}") from error
    if report["missing_keys"]:
        raise UserError(f"{spec} lacks {', '.join(sorted(report['missing_keys'])[:3])}: it was saved without its pre-training head.")
    return model
