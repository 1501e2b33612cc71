"""diffusers pipelines as teachers, and students that plain diffusers loads.

Pipelines around one U-Net or one transformer: Stable Diffusion 1.x / 2.x (epsilon or v), SDXL, Stable Diffusion 3 and Flux (flow), and
unconditional DDPM-style pixel U-Nets. The network becomes a `Denoiser` in the process that the pipeline's scheduler describes; text is
encoded by the pipeline's own `encode_prompt`, latents are decoded by its VAE.
"""

from __future__ import annotations

import json
from pathlib import Path

from stillroom.core.errors import UserError, needs
from stillroom.diffusion.pipelines.base import Pipeline, described, shift_of
from stillroom.diffusion.pipelines.flux import Flux, pack, unpack

__all__ = ["Flux", "Pipeline", "described", "load", "pack", "shift_of", "unpack"]


def load(where: str, size: int = 0, guidance: float = 1.0) -> Pipeline:
    """A pipeline from a folder or hub id; `size` in pixels, 0 for its own; `guidance` for a network that takes the scale as an input.

    UserError for anything that is not a usable pipeline.
    """
    diffusers = needs("diffusers", "diffusers", "--teacher diffusers:...")
    folder = Path(where)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise UserError(f"{where} is not a diffusers pipeline: it holds no model_index.json. Give the folder that save_pretrained wrote.")
    absent = {}
    if folder.exists():  # parts that were saved as None (SD3 without its third text encoder) must be said to be None
        index = json.loads((folder / "model_index.json").read_text())
        absent = {name: None for name, value in index.items() if isinstance(value, list) and value[0] is None}
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(where, trust_remote_code=False, **absent)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot load the diffusers pipeline {where}: {str(error).splitlines()[0]}") from None
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    net = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    kind = type(net).__name__
    if type(pipe).__name__ == "FluxPipeline":
        return Flux(pipe, where, size, guidance)
    if kind not in ("UNet2DModel", "UNet2DConditionModel", "SD3Transformer2DModel"):
        raise UserError(
            f"{where}: a {type(pipe).__name__} around a {kind} is not supported; U-Nets, Stable Diffusion 3 and FluxPipeline are."
        )
    return Pipeline(pipe, where, size)
