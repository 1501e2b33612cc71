"""Masked auto-encoders of images by name."""

from __future__ import annotations

from stillroom.adapt.masked import MaskedHfViT, MaskedViT
from stillroom.core.errors import UserError
from stillroom.data.images import ImageData
from stillroom.nets.build import build
from stillroom.nets.pretrained import pretrained
from stillroom.nets.vit import ViT
from stillroom.vision import hub


def load_masked_images(spec: str, *, data: ImageData, ratio: float) -> MaskedViT | MaskedHfViT:
    """`small:vit-...` with fresh weights, or the ViT-MAE with its decoder that `hf:ID-or-folder` names. UserError for anything else."""
    kind, _, name = spec.partition(":")
    if kind == "small" and name:
        net = build(name, classes=len(data.classes), channels=data.channels, size=data.size, mean=data.mean, std=data.std)
        if not isinstance(net, ViT):
            raise UserError(f"{spec}: masked pre-training needs patches: give small:vit-pP-wW-dD or hf:ID of a ViT-MAE.")
        return MaskedViT(net, ratio)
    model = pretrained(spec, "ViTMAEForPreTraining", "vit_mae")
    return MaskedHfViT(hub.wrap(model, name, data=data), ratio)
