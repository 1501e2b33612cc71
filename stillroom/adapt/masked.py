"""Models that are pre-trained by hiding part of their input, behind one forward: small ViTs, transformers' ViT-MAE and masked language
models.

    values, hidden = model(inputs, masked=True, hidden=True)

`values` (B,) is the reconstruction error of a freshly masked input, whose batch mean is the method's own loss; `hidden` (B, d) is the
class token of the UNMASKED input after the last layer norm. Both come from one call, as DDP wants it. `model.encoder` is what remains
after pre-training, `model.classifier(classes, dropout)` a copy of it under a fresh head.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillroom.core.errors import needs
from stillroom.nets.build import with_head
from stillroom.nets.vit import MaskedDecoder, ViT
from stillroom.nets.wrapped import Wrapped

Answer = tuple[Tensor | None, Tensor | None]


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) to (B, N, patch * patch * C), row by row, channels last within a patch (the order of MAE)."""
    return images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def patch_error(predicted: Tensor, pixels: Tensor, hidden: Tensor) -> Tensor:
    """(B,) squared error, averaged over the pixels of hidden patches, to pixels that are normalised patch by patch.

    predicted, pixels (B, N, P); hidden (B, N), 1 where a patch was masked. The variance is the unbiased one plus 1e-6 (He et al. 2022).
    """
    target = (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True) + 1e-6).sqrt()
    return ((predicted - target).square().mean(-1) * hidden).sum(1) / hidden.sum(1)


def with_dropout(net: nn.Module, dropout: float) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return net


class MaskedViT(nn.Module):
    """A small ViT with a masked decoder."""

    def __init__(self, encoder: ViT, ratio: float):
        super().__init__()
        self.encoder, self.decoder, self.ratio = encoder, MaskedDecoder(encoder), ratio

    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predicted patches, pixels (both (B, N, P)) and which patches were hidden (B, N), of a random masking."""
        patches = self.encoder.patches(images)
        order = torch.rand(patches.shape[:2], device=patches.device).argsort(1)
        kept = order[:, : max(1, int(patches.shape[1] * (1 - self.ratio)))]
        visible = patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
        predicted = self.decoder(self.encoder.encode(visible), kept)
        pixels = patchify(self.encoder.body(images), self.encoder.embed.kernel_size[0])
        return predicted, pixels, torch.ones_like(predicted[..., 0]).scatter(1, kept, 0.0)

    def forward(self, images: Tensor, *, masked: bool = True, hidden: bool = True) -> Answer:
        values = patch_error(*self.reconstruct(images)) if masked else None
        return values, self.encoder.features(images) if hidden else None

    def classifier(self, classes: int, dropout: float) -> nn.Module:
        return with_dropout(with_head(self.encoder, classes), dropout)


class MaskedHfViT(nn.Module):
    """transformers' ViTMAEForPreTraining, given images (B, C, H, W) in [0, 1] as `pixels` (a `Wrapped`) prepares them."""

    def __init__(self, pixels: Wrapped, ratio: float):
        super().__init__()
        self.pixels, self.ratio = pixels, ratio

    @property
    def model(self) -> Any:
        return self.pixels.model

    @property
    def encoder(self) -> nn.Module:
        return self.model.vit

    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `MaskedViT.reconstruct`."""
        self.model.config.mask_ratio = self.ratio
        images = self.pixels.prepare(images)
        output = self.model(images)
        return output.logits, patchify(images, self.model.config.patch_size), output.mask

    def forward(self, images: Tensor, *, masked: bool = True, hidden: bool = True) -> Answer:
        values = patch_error(*self.reconstruct(images)) if masked else None
        if not hidden:
            return values, None
        # The model masks and shuffles always: with nothing to mask and this noise, it keeps all patches in their order.
        self.model.config.mask_ratio = 0.0
        count = self.model.vit.embeddings.patch_embeddings.num_patches
        noise = torch.arange(count, device=images.device, dtype=torch.float32).expand(len(images), -1)
        return values, self.model.vit(self.pixels.prepare(images), noise=noise).last_hidden_state[:, 0]

    def classifier(self, classes: int, dropout: float) -> nn.Module:
        transformers = needs("transformers", "hf")
        settings = self.model.config.to_dict()
        config = transformers.ViTConfig(
            **{k: v for k, v in settings.items() if k in transformers.ViTConfig().to_dict() and k != "model_type"}
        )
        config.num_labels = classes
        model = transformers.ViTForImageClassification(config)
        model.vit.load_state_dict(self.model.vit.state_dict())
        normalise = self.pixels.normalise
        wrapped = Wrapped(model, self.pixels.size, *(tuple(x.flatten().tolist()) for x in (normalise.mean, normalise.std)))
        return with_dropout(wrapped, dropout)


class MaskedText(nn.Module):
    """A transformers masked language model (BERT, RoBERTa, ...) with its tokenizer, given padded token ids (B, L).

    15 % of the tokens that are not special are predicted; of these 80 % are shown as the mask token, 10 % as a random token, 10 % as
    they are. The error is averaged over all predicted tokens of the batch, as transformers' own loss, so that each sample's value is
    weighted by its share of them.
    """

    special: Tensor

    def __init__(self, model: Any, tokenizer: Any, ratio: float):
        super().__init__()
        self.model, self.tokenizer, self.ratio = model, tokenizer, ratio
        self.register_buffer("special", torch.tensor(sorted(tokenizer.all_special_ids)), persistent=False)

    @property
    def encoder(self) -> nn.Module:
        return self.model.base_model

    def mask(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """What the model is shown (B, L), and which tokens it has to predict (B, L) bool: at least one in every batch."""
        open_ = ~torch.isin(ids, self.special)
        draw = torch.rand(ids.shape, device=ids.device).masked_fill(~open_, 2.0)
        chosen = (draw < self.ratio) | ((draw == draw.min()) & open_)
        kind = torch.rand(ids.shape, device=ids.device)
        shown = torch.where(chosen & (kind < 0.8), self.tokenizer.mask_token_id, ids)
        other = torch.randint(self.model.config.vocab_size, ids.shape, device=ids.device)
        return torch.where(chosen & (kind >= 0.8) & (kind < 0.9), other, shown), chosen

    def forward(self, ids: Tensor, *, masked: bool = True, hidden: bool = True) -> Answer:
        attention, values = ids != self.tokenizer.pad_token_id, None
        if masked:
            shown, chosen = self.mask(ids)
            logits = self.model(input_ids=shown, attention_mask=attention).logits
            errors = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none") * chosen
            values = errors.sum(1) * (len(ids) / chosen.sum())
        if not hidden:
            return values, None
        return values, self.encoder(input_ids=ids, attention_mask=attention).last_hidden_state[:, 0]

    def classifier(self, classes: int, dropout: float) -> nn.Module:
        transformers = needs("transformers", "hf")
        config = copy.deepcopy(self.model.config)
        config.num_labels = classes
        model = transformers.AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
        model.base_model.load_state_dict(self.model.base_model.state_dict(), strict=False)  # a pooler, if it has one, is part of the head
        return with_dropout(TextClassifier(model, self.tokenizer), dropout)


class TextClassifier(nn.Module):
    """Padded token ids (B, L) to logits. `save(folder)` writes model and tokenizer for `from_pretrained`."""

    def __init__(self, model: Any, tokenizer: Any):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=ids != self.tokenizer.pad_token_id).logits

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
