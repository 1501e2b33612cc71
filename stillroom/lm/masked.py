"""Masked language models by name."""

from __future__ import annotations

from stillroom.adapt.masked import MaskedText
from stillroom.core.errors import UserError, needs
from stillroom.nets.pretrained import pretrained


def load_masked_text(spec: str, *, ratio: float) -> MaskedText:
    """The masked language model and tokenizer that `hf:ID-or-folder` names. UserError for anything else."""
    model, transformers = pretrained(spec, "AutoModelForMaskedLM"), needs("transformers", "hf")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(spec.partition(":")[2], trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{spec}: the tokenizer could not be loaded: {error}") from error
    if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
        raise UserError(f"{spec}: its tokenizer has no mask or padding token, which masked pre-training needs.")
    return MaskedText(model, tokenizer, ratio)
