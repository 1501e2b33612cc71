"""Pictures of a run: matplotlib drawings as SVG in the page's own ink, tensors as PNG grids."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

INK = "#123456"  # stands for the page's text colour while matplotlib draws: the colour of everything in the style file
STYLE = Path(__file__).with_name("page.mplstyle")
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#eab308", "#06b6d4", "#ec4899")


def svg(draw: Callable[[Any], None], size: tuple[float, float] = (5.2, 3.3)) -> str:
    """What `draw(axes)` draws on matplotlib axes, as SVG whose ink is the page's text colour."""
    from cycler import cycler
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"axes.prop_cycle": cycler(color=COLOURS)}, STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def png(images: torch.Tensor, columns: int = 8) -> bytes:
    """A grid of images (N, C, H, W) in [0, 1]; grey ones have C = 1. Small ones are enlarged without smoothing."""
    from PIL import Image
    from torch.nn.functional import pad

    if not len(images):
        raise ValueError("there are no images to draw")
    images = images.detach().float().clamp(0, 1).cpu()
    images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    images = pad(images, (1, 1, 1, 1, 0, 0, 0, rows * columns - len(images)), value=1.0).unflatten(0, (rows, columns))
    picture = Image.fromarray(images.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).mul(255).round().byte().numpy())
    scale = max(1, 640 // picture.width)
    buffer = io.BytesIO()
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()
