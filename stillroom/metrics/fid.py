"""Frechet inception distance between images: the network and preprocessing of torch-fidelity (extra `fid`), the distance of `generation`.

torch-fidelity's Inception reproduces the published TensorFlow one; its weights (about 90 MB) are downloaded once into torch's hub folder.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stillroom.core.errors import UserError, needs
from stillroom.metrics.generation import frechet

INCEPTION = "inception-v3-compat"


class Bytes(Dataset):
    """Images [N, 1 or 3, H, W] in [0, 1] as the 8-bit RGB images that they would be saved as."""

    def __init__(self, images: Tensor):
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise UserError(f"FID takes images (N, 3, H, W) or (N, 1, H, W) in [0, 1], not {tuple(images.shape)}.")
        self.images = (images.detach().cpu().clamp(0, 1) * 255).round().byte().expand(-1, 3, -1, -1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


@cache
def extractor(name: str = INCEPTION, weights: str | None = None) -> Any:
    """A feature extractor of torch-fidelity (or one registered with it) on the GPU if there is one; weights: a local file instead of the
    download. UserError without the extra, or when the weights cannot be had."""
    try:
        needs("torch_fidelity", "fid")
    except RuntimeError as error:
        raise UserError(f"torch-fidelity does not import: {error}. Install the torchvision that belongs to this torch.") from None
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY as known
    from torch_fidelity.utils import create_feature_extractor

    layer = known[name].get_default_feature_layer_for_metric("fid")
    try:
        return create_feature_extractor(
            name, [layer], cuda=torch.cuda.is_available(), feature_extractor_weights_path=weights, verbose=False
        )
    except OSError as error:
        raise UserError(
            f"no weights for {name}: {error}. Download them where there is a network, and put the file into "
            f"{Path(torch.hub.get_dir()) / 'checkpoints'}."
        ) from None


def features(images: Tensor | str | Path, net: Any = None) -> Tensor:
    """[N, F] features of images [N, 3, H, W] in [0, 1], or of the png and jpg files of a folder, at their own size; see `extractor`.

    UserError for fewer than two images.
    """
    net = net or extractor()
    from torch_fidelity.utils import extract_featuresdict_from_input_id

    if isinstance(images, Tensor):
        source: Any = Bytes(images)
        count, where = len(source), "given"
    else:
        source, where = str(images), f"png or jpg files in {images}"
        count = sum(file.suffix.lower() in (".png", ".jpg", ".jpeg") for file in Path(images).glob("*"))
    if count < 2:
        raise UserError(f"FID needs at least two images (thousands to mean much), not the {count} {where}.")
    found = extract_featuresdict_from_input_id(
        1, net, input1=source, cuda=torch.cuda.is_available(), save_cpu_ram=isinstance(images, Tensor), verbose=False
    )
    return next(iter(found.values()))


def fid(a: Tensor | str | Path, b: Tensor | str | Path, net: Any = None) -> float:
    """Frechet inception distance of two sets: tensors [N, 3, H, W] in [0, 1], or folders of png and jpg files.

    Biased upwards for few images: compare only values over equally many, 10,000 to 50,000 for published figures.
    """
    return frechet(features(a, net), features(b, net))
