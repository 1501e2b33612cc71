"""A diffusers pipeline as a setting, with the user's prompts and images."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.core.errors import UserError, needs
from stillroom.core.run import Run
from stillroom.diffusion import pipelines
from stillroom.diffusion.denoiser import Denoiser, PredictionType, take
from stillroom.diffusion.processes import Process
from stillroom.diffusion.setting import Setting
from stillroom.metrics.generation import energy_distance, frechet

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


class Piped(Setting):
    """The pipeline in the folder or hub repository `where`; students work in its latent space and start as copies of its network.

    prompts: file of one prompt a line, from which conditions are drawn; without it, the captions of the images. images: folder of real
    data. fid: also judge decoded samples by FID, against a folder of real images or against the "teacher" samples. UserError for files that
    do not serve, and what `pipelines.load` raises.
    """

    at_once = 8

    def __init__(self, where: str, prompts: str = "", size: int = 0, guidance: float = 1.0, fid: str = "", images: str = ""):
        if fid:
            from stillroom.metrics.fid import extractor

            extractor()  # a missing extra is said now, not after training
        self.fid = fid
        self.pipe = pipe = pipelines.load(where, size, guidance)
        self.name, self.teacher, self.shape, self.null, self.embedded = (
            Path(where).name,
            pipe.denoiser,
            pipe.shape,
            pipe.null,
            pipe.guidance,
        )
        self.files, self.captions = captioned(Path(images), pipe.encoders) if images else ([], [])
        self.real = bool(self.files)
        if prompts and not pipe.encoders:
            raise UserError(f"--prompts {prompts}: the pipeline {where} takes no text.", code=2)
        self.encoded = pipe.words(read_prompts(prompts) if prompts or not self.captions else self.captions) if pipe.encoders else None

    def start(self, run: Run) -> Denoiser:
        return copy.deepcopy(self.pipe.denoiser).to(run.device).requires_grad_(True)

    def small(
        self, factor: int, process: Process | None = None, prediction: PredictionType | None = None, dropout: float = 0.0
    ) -> Denoiser:
        return self.pipe.smaller(factor, process, prediction, dropout)

    def condition(self, n: int, device: torch.device | None = None) -> Any:
        if self.encoded is None:
            return None
        rows = len(next(iter(self.encoded.values())))
        return placed(take(self.encoded, torch.randint(rows, (n,))), device)

    def samples(self, n: int, device: torch.device | None = None) -> tuple[Tensor, Any]:
        if not self.real:
            return super().samples(n, device)
        index = torch.randint(len(self.files), (n,))
        words = self.pipe.words([self.captions[i] for i in index.tolist()]) if self.pipe.encoders else None
        return self.codes[index].to(device), placed(words, device)

    @cached_property
    def codes(self) -> Tensor:
        """[N, ...] latents of all images, on the CPU."""
        side = self.shape[-1] * self.pipe.scale
        channels = 3 if self.pipe.vae is not None else self.shape[0]
        parts = [self.files[at : at + self.at_once] for at in range(0, len(self.files), self.at_once)]
        with torch.no_grad():
            return torch.cat(
                [self.pipe.latents(torch.stack([read(file, side, channels) for file in part])).float().cpu() for part in parts]
            )

    @torch.no_grad()
    def images(self, x: Tensor) -> Tensor:
        """Decoded samples in [0, 1], on the CPU."""
        return torch.cat([self.pipe.decode(part).clamp(0, 1).cpu() for part in x.split(self.at_once)])

    def evaluate(self, run: Run, x: Tensor, reference: Tensor) -> dict[str, float]:
        metrics = {"energy": energy_distance(x, reference)}
        if self.fid:
            from stillroom.metrics.fid import features

            truth = features(self.images(reference)) if self.fid == "teacher" else self._features
            metrics["fid"] = frechet(features(self.images(x)), truth)
        return metrics

    @cached_property
    def _features(self) -> Tensor:
        from stillroom.metrics.fid import features

        return features(self.fid)

    def show(self, run: Run, name: str, sets: Mapping[str, Tensor]) -> None:
        for label, x in sets.items():
            run.image(f"{name} {label}", self.images(x[:8]), columns=8)

    def save(self, net: nn.Module, folder: Path, times: Sequence[float], fresh_noise: bool) -> None:
        """For plain diffusers; see `Pipeline.save`."""
        self.pipe.save(folder, net, times, fresh_noise)


def placed(cond: Any, device: torch.device | None) -> Any:
    """A condition on a device."""
    return cond if cond is None else {name: value.to(device) for name, value in cond.items()}


def read_prompts(file: str) -> list[str]:
    """One prompt per line, blank lines skipped. UserError when there is no file, or nothing in it."""
    if not file:
        raise UserError("this teacher is conditioned on text: give --prompts FILE with one prompt per line.", code=2)
    try:
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --prompts {file}: {error}", code=2) from None
    if not lines:
        raise UserError(f"--prompts {file} is empty: it needs at least one line of text.")
    return lines


def captioned(folder: Path, words: bool) -> tuple[list[Path], list[str]]:
    """The pictures of a folder, and the caption of each if `words` are wanted: NAME.txt beside it, or its line of metadata.jsonl
    ({"file_name": …, "text": …}). UserError for a folder without pictures, and for a picture without caption."""
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in PICTURES and file.is_file())
    if not files:
        raise UserError(f"--images {folder} holds no {', '.join(PICTURES)} files.", code=2)
    if not words:
        return files, []
    table, said = folder / "metadata.jsonl", {}
    if table.is_file():
        try:
            rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
            said = {str(row["file_name"]): str(row["text"]) for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{table}: each line must hold file_name and text ({type(error).__name__}: {error}).", code=2) from None
    captions = []
    for file in files:
        beside = file.with_suffix(".txt")
        if file.name not in said and not beside.is_file():
            raise UserError(f"--images: {file.name} has no caption: neither {beside.name} nor a line of metadata.jsonl.", code=2)
        captions.append(said[file.name] if file.name in said else beside.read_text(encoding="utf-8").strip())
    return files, captions


def read(file: Path, side: int, channels: int) -> Tensor:
    """[C, side, side] in [0, 1]: the middle square of a picture, resized. UserError for a file that is none."""
    needs("PIL", "images", "--images")
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            picture = ImageOps.fit(
                ImageOps.exif_transpose(opened).convert("RGB" if channels == 3 else "L"), (side, side), Image.Resampling.LANCZOS
            )
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"--images: cannot read {file}: {error}") from None
    return torch.from_numpy(np.array(picture)).reshape(side, side, channels).permute(2, 0, 1) / 255
