"""Masked language models by name."""

from __future__ import annotations

from stillroom.adapt.masked import MaskedText
from stillroom.core.errors import UserError
from stillroom.lm.tokenizer import pretrained_tokenizer
from stillroom.nets.pretrained import pretrained


def load_masked_text(spec: str, *, ratio: float) -> MaskedText:
    """The masked language model and tokenizer that `hf:ID-or-folder` names. UserError for anything else."""
    model, tokenizer = pretrained(spec, "AutoModelForMaskedLM"), pretrained_tokenizer(spec.partition(":")[2])
    if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
        raise UserError(f"{spec}: its tokenizer has no mask or padding token, which masked pre-training needs.")
    return MaskedText(model, tokenizer, ratio)
