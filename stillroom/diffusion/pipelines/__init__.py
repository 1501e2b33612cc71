"""diffusers pipelines as teachers, and students that plain diffusers loads.

Pipelines around one U-Net or one transformer: Stable Diffusion 1.x / 2.x (epsilon or v), SDXL, Stable Diffusion 3 and Flux (flow), and
unconditional DDPM-style pixel U-Nets. The network becomes a `Denoiser` in the process that the pipeline's scheduler describes; text is
encoded by the pipeline's own `encode_prompt`, latents are decoded by its VAE.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import nn

from stillroom.core.errors import UserError, needs
from stillroom.diffusion.pipelines.base import Pipeline, described, shift_of
from stillroom.diffusion.pipelines.checked import FILE, LIBRARIES, parts_of
from stillroom.diffusion.pipelines.flux import Flux, pack, unpack
from stillroom.nets.checked import loading

__all__ = ["Flux", "Pipeline", "described", "load", "pack", "shift_of", "unpack"]


def load(where: str, size: int = 0, guidance: float = 1.0) -> Pipeline:
    """A pipeline from a folder or hub id; `size` in pixels, 0 for its own; `guidance` for a network that takes the scale as an input.

    UserError for anything that is not a usable pipeline, naming the file for what `parts_of` refuses: folders may be anybody's.
    """
    diffusers = needs("diffusers", "diffusers", "--teacher diffusers:...")
    folder = Path(where)
    if folder.exists() and not (folder / FILE).is_file():
        raise UserError(f"{where} is not a diffusers pipeline: it holds no {FILE}. Give the folder that save_pretrained wrote.")
    with loading(f"The diffusers pipeline {where}"):
        if not folder.exists():  # what lies on the hub is checked as what lies here
            folder = Path(diffusers.DiffusionPipeline.download(where, use_safetensors=True, trust_remote_code=False))
        parts = {name: _network(folder / name, *part) for name, part in parts_of(folder, diffusers.pipelines).items()}
        # Parts that were saved as None (SD3 without its third text encoder) must be said to be None; others than networks are left to it.
        given = {name: part for name, part in parts.items() if part is not False}
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, use_safetensors=True, trust_remote_code=False, **given)
        return _described(pipe, where, size, guidance)


def _network(folder: Path, library: str | None, name: str) -> Any:
    """The network that a folder holds, None for a part that was saved as None, False for what is no network. UserError for weights that
    lack some: diffusers would go on with random ones."""
    if library is None:
        return None
    kind = getattr(importlib.import_module(library), name, None) if library in LIBRARIES else None
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        return False
    network: Any = kind
    with loading(folder):
        net, report = network.from_pretrained(folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
    if report["missing_keys"]:
        raise UserError(f"The weights in {folder} lack {', '.join(sorted(report['missing_keys'])[:3])}: copy the pipeline again.")
    return net


def _described(pipe: Any, where: str, size: int, guidance: float) -> Pipeline:
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
