"""Flux pipelines: packed latents, and a guidance embedding in some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.diffusion.pipelines.base import Backbone, Pipeline


class Packed(Backbone):
    """A Flux transformer, which sees 2x2 patches of the latents as tokens; text tokens have no position."""

    def forward(self, x: Tensor, time: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
        assert cond is not None
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        rows, columns = (torch.arange(n, dtype=torch.float32, device=x.device) for n in (h, w))
        out = self.net(
            pack(x),
            timestep=time,
            img_ids=torch.cartesian_prod(torch.zeros_like(rows[:1]), rows, columns),
            txt_ids=rows.new_zeros(cond["encoder_hidden_states"].shape[1], 3),
            return_dict=False,
            **cond,
        )[0]
        return unpack(out, h, w)


def pack(x: Tensor) -> Tensor:
    """Latents [B, C, 2h, 2w] as Flux's tokens [B, h w, 4 C]."""
    return nn.functional.pixel_unshuffle(x, 2).flatten(2).mT


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """The inverse of `pack`."""
    return nn.functional.pixel_shuffle(tokens.mT.unflatten(2, (h, w)), 2)


class Flux(Pipeline):
    """A FluxPipeline, with a guidance embedding (FLUX.1-dev) or without (Schnell, and networks whose guidance was undone).

    A network with guidance embedding was distilled from classifier-free guidance: its scale is an input, so conditions carry it.
    """

    backbone = Packed

    def __init__(self, pipe: Any, where: str, size: int = 0, guidance: float = 1.0):
        self.guidance = guidance if pipe.transformer.config.guidance_embeds else None
        super().__init__(pipe, where, size)

    def _layout(self, config: Any) -> tuple[int, int, int]:
        return config.in_channels // 4, 2, self.pipe.default_sample_size

    @torch.no_grad()
    def words(self, prompts: Sequence[str], null: bool = False) -> dict[str, Tensor]:
        device, tokens = self.pipe.device, self.asked()["max_sequence_length"]
        hidden, pooled, _ = self.pipe.encode_prompt(prompt=list(prompts), prompt_2=None, device=device, max_sequence_length=tokens)
        text = {"encoder_hidden_states": hidden.detach().clone(), "pooled_projections": pooled.detach().clone()}
        if self.guidance is not None:
            text["guidance"] = torch.full((len(prompts),), self.guidance, device=device)
        return text

    def asked(self) -> dict[str, Any]:
        # Text lengths that the two models were trained with.
        own = {"max_sequence_length": 256} if self.guidance is None else {"max_sequence_length": 512, "guidance_scale": self.guidance}
        return super().asked() | own
