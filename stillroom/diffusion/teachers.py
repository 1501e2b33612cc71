"""Settings by name, and the flags that few-step recipes share."""

from __future__ import annotations

from dataclasses import dataclass

from stillroom.core.config import Count, Natural, NonNegative
from stillroom.core.errors import UserError
from stillroom.diffusion import worlds
from stillroom.diffusion.setting import Setting


@dataclass(frozen=True)
class TeacherConfig:
    """Which teacher a recipe distils: its Config inherits these flags."""

    teacher: str = "ring"
    """ring, grid, classes, digits (exact), run:FOLDER (an earlier student of one of these), or diffusers:FOLDER-OR-ID."""
    world_steps: Count = 1500
    """Training steps of the network that starts where an exact teacher is (a pipeline and an earlier student are trained already)."""
    prompts: str = ""
    """Text file with one prompt per line (diffusers only)."""
    images: str = ""
    """Folder of real images, each with its caption in NAME.txt beside it or in metadata.jsonl (diffusers only)."""
    size: Natural = 0
    """Image size in pixels (diffusers only); 0 is the pipeline's own."""
    guidance: NonNegative = 1.0
    """Classifier-free guidance of the teacher (1: none); the input of a network with guidance embedding (FLUX.1-dev)."""
    fid: str = ""
    """Folder of real images, or "teacher": FID of the samples against them (diffusers only; pip install 'stillroom[fid]')."""

    def setting(self) -> Setting:
        """See `load`."""
        return load(self.teacher, self.prompts, self.size, self.guidance, self.fid, self.images, self.world_steps)


@dataclass(frozen=True)
class StudentConfig(TeacherConfig):
    """What recipes share whose student is a copy of the teacher's network."""

    lora_rank: Natural = 0
    """Rank of the student's LoRA; 0 trains all weights."""
    lora_alpha: Natural = 0
    """LoRA counts by alpha / rank; 0 is alpha = rank. Only with a rank."""
    batch: Count = 256
    evaluate: Count = 2000
    """Samples for the metrics."""

    def setting(self) -> Setting:
        """See `load`. UserError too for an alpha without a rank."""
        if self.lora_alpha and not self.lora_rank:
            raise UserError(f"--lora-alpha {self.lora_alpha} scales LoRA, and --lora-rank 0 trains all weights: give a rank.", code=2)
        return super().setting()


def load(
    name: str, prompts: str = "", size: int = 0, guidance: float = 1.0, fid: str = "", images: str = "", world_steps: int = 1500
) -> Setting:
    """The setting called `name`; see `pipelines.load` for `size` and `guidance`, `pipelines.Piped` for `prompts`, `images` and `fid`.

    UserError for an unknown name, for flags of a pipeline with an embedded teacher, and what `pipelines.load` raises.
    """
    if name.startswith("diffusers:"):
        from stillroom.diffusion.pipelines.setting import Piped

        return Piped(name.removeprefix("diffusers:"), prompts, size, guidance, fid, images)
    if fid:
        raise UserError(f"--fid judges the images of a diffusers pipeline; the embedded teacher {name} has its own yardsticks.", code=2)
    for flag, value in (("prompts", prompts), ("images", images), ("size", size)):
        if value:
            raise UserError(f"--{flag} {value} is for a diffusers pipeline; the embedded teacher {name} brings its own data.", code=2)
    if name in worlds.NAMES:
        return worlds.world(name, steps=world_steps)
    if name.startswith("run:"):
        student = worlds.saved(name.removeprefix("run:"))
        if student.world not in worlds.NAMES:
            raise UserError(f"--teacher {name}: its world {student.world!r} was made in Python; give it as `setting` there.", code=2)
        found = worlds.world(student.world)
        found.teacher, found.own_process, found.own_prediction = student.net, student.net.process, student.net.prediction
        return found
    raise UserError(f"--teacher {name!r} is none of {', '.join(worlds.NAMES)}, run:FOLDER, diffusers:FOLDER-OR-ID.", code=2)
