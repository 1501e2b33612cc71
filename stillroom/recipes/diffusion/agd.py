"""AGD: adapters that give the guided prediction in one pass of a frozen network (Perez Jensen and Sadat 2025, arXiv 2503.07274).

Classifier-free guidance asks the network twice per step. Small adapters, told the guidance scale w, are added to a frozen network and
learn to make one conditional call return the guided raw output

    o_w = o_null + w (o_cond - o_null),   w = 1 being no guidance,

from states that *guided* sampling visits (recorded once, w drawn per trajectory), not from noised data, which guided sampling leaves:

    L = mean || net_{with adapters}(x_t, t, c; w) - o_w ||^2 over recorded (trajectory, step).

Adapter of a block: out = block(x) + A. Cross-attention: A = W_o softmax((x W_q)(E W_k)^T / sqrt(h)) (E W_v) over E = [w; t; class; prompt
tokens] plus positions. Offset: A = MLP(w + t + class + mean prompt), the same for every token. Both are zero at the start, so that step 0
is the conditional model (the reference code's flag has this inverted; the intent is implemented).

Exact: target, data, both adapters, their side inputs (time and class are linear maps of the base model's own embeddings), one head, zero
start. Recorded states go to a file in the store, a batch of trajectories at a time (500 trajectories of SDXL are 131 GB).
Shrunk: a 2-D base network of 4 classes, 50 DDIM steps. At this width adapters are as large as the base: the paper's 1-5 % is not claimed.
Ours: gaps are closed in the median, since one trajectory in twenty diverges and carries the mean. Speed is reported in network evaluations:
one per step instead of two. The no-guidance arm is a row of every run.
Left out: the gated variant, learned variances of the original DiT, l1 and cosine losses.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from stillroom.catalogue.claims import Claim
from stillroom.core.config import Count, NonNegative, Positive
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.diffusion.adapters import Adapters, Kind, save
from stillroom.diffusion.denoiser import Denoiser, Guided, Prediction, take
from stillroom.diffusion.objectives import squared
from stillroom.diffusion.sampling import sample
from stillroom.diffusion.setting import Setting
from stillroom.diffusion.teachers import TeacherConfig
from stillroom.metrics.cost import parameters
from stillroom.metrics.generation import energy_distance, gap_closed


@dataclass(frozen=True)
class Config(TeacherConfig):
    """Laptop defaults; `full()` holds the paper's."""

    teacher: str = "classes"
    """classes (a small conditional network, trained first), run:FOLDER (an earlier student of it), or diffusers:FOLDER-OR-ID."""
    adapter: Kind = "cross_attention"
    """Cross-attention is the paper's for text models, offset for DiT."""
    data: Literal["guided", "forward"] = "guided"
    """States to train on: recorded guided trajectories, or noised data with the same targets."""
    train: Literal["adapters", "all"] = "adapters"
    """What learns; "all" also fine-tunes the base (guidance distillation)."""
    low: NonNegative = 1.0
    """Smallest guidance scale."""
    high: Positive = 6.0
    """Largest guidance scale (6 for DiT, 12 for Stable Diffusion)."""
    trajectories: Count = 600
    """Recorded guided trajectories."""
    steps: Count = 50
    """Sampling steps, of the recorded trajectories and of the student."""
    width: Count = 32
    """Width h of the adapters."""
    half: bool = False
    """Keep the recorded states in half precision."""
    scale_w: Positive = 1.0
    """Factor on w before its embedding (1000 for the paper's DiT offsets)."""
    updates: Count = 1200
    batch: Count = 192
    optimizer: Optimizer = Optimizer(lr=2e-3, schedule="cosine", warmup=100)
    evaluate: Count = 500
    """Held-out trajectories for the metrics."""


def full() -> Config:
    """The paper's SDXL run: 500 captions (--prompts), w ~ U[1, 12], h 320, 5000 steps of 64, AdamW 1e-4, 10 % warm-up, cosine."""
    return Config(
        teacher="diffusers:stabilityai/stable-diffusion-xl-base-1.0",
        high=12.0,
        trajectories=500,
        steps=1000,
        width=320,
        half=True,
        updates=5000,
        batch=64,
        optimizer=Optimizer(lr=1e-4, schedule="cosine", warmup=500),
        evaluate=16,
    )


TINY = {"trajectories": 64, "steps": 4, "updates": 4, "batch": 64, "evaluate": 64, "world_steps": 2}
ARMS = {
    "agd": {},
    "forward-data": {"data": "forward"},
    "offset": {"adapter": "offset"},
    "fine-tuning": {"train": "all", "adapter": "offset"},
}
CLAIMS = [
    Claim(
        "guided trajectories are better training data than noised data",
        metric="sample_error",
        arm="agd",
        versus="forward-data",
        better="lower",
        paper="decisive ablation; figures not available to us",
    ),
    Claim("the same on the predictions", metric="prediction_error", arm="agd", versus="forward-data", better="lower"),
    Claim("one pass closes more than 80 % of the median gap to guidance", metric="gap_closed", arm="agd", versus=0.8),
    Claim("it closes more than 80 % of the mean gap too", metric="mean_gap_closed", arm="agd", versus=0.8),
    Claim(
        "adapters that look at x beat offsets", metric="prediction_error", arm="agd", versus="offset", better="lower", paper="not compared"
    ),
    Claim(
        "adapters are no worse than fine-tuning everything by 0.02",
        metric="sample_error",
        arm="agd",
        versus="fine-tuning",
        better="lower",
        margin=-0.02,
    ),
]


# -- data --------------------------------------------------------------------------------------------------------------------------
def guided_path(base: Denoiser, null: Any, x: Tensor, w: Tensor, cond: Any, times: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """Guided sampling from x: (input, guided raw output) of every step, then (end, end)."""
    guided = Guided(base, w, null)
    with torch.no_grad():
        for t, s in pairwise(times):
            raw = guided.raw(x, t, cond)
            yield x, raw
            x = base.process.mix(*base.read(raw, x, t), s)
    yield x, x


def noised_path(
    base: Denoiser, null: Any, data: Tensor, noises: Iterable[Tensor], w: Tensor, cond: Any, times: Sequence[float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """As many states with the same targets at noised data: what guidance distillation trains on."""
    guided = Guided(base, w, null)
    with torch.no_grad():
        for t, eps in zip(times[:-1], noises):
            x = base.process.mix(data, eps, t)
            yield x, guided.raw(x, t, cond)


class Drawn(NamedTuple):
    """Unit noise (or data), guidance scale and condition of trajectories."""

    z: Tensor
    w: Tensor
    cond: Any

    def part(self, rows: slice) -> Drawn:
        return Drawn(self.z[rows], self.w[rows], take(self.cond, rows))


def drawn(cfg: Config, run: Run, setting: Setting, n: int, real: bool = False) -> Drawn:
    """n trajectories' noises, or data if `real`."""
    z, cond = setting.samples(n, run.device) if real else (setting.noise(n, run.device), None)
    w = cfg.low + (cfg.high - cfg.low) * torch.rand(n, device=run.device)
    return Drawn(z, w, cond if real else setting.condition(n, run.device))


def record(cfg: Config, run: Run, setting: Setting, base: Denoiser, given: Drawn, times: Sequence[float]) -> Tensor:
    """[trajectories, steps, 2, ...] states and targets in a file of the store, written a batch at a time and mapped rather than read."""
    n, steps, size = len(given.z), len(times) - 1, min(setting.at_once, len(given.z))
    shape, kind = (n, steps, 2, *given.z.shape[1:]), torch.float16 if cfg.half else torch.float32
    decides = (record, cfg.data, cfg.half, base, *given, tuple(times))
    with run.stage("trajectories", shared=decides) as stage:
        mapped = {"filename": str(stage.folder / "states.bin"), "size": math.prod(shape), "dtype": kind}
        bank = torch.from_file(shared=True, **mapped).view(shape) if not stage.rank else None
        for step in stage.steps(-(-n // size)):
            rows = slice(step * size, min(n, (step + 1) * size))
            some = given.part(rows)
            if cfg.data == "guided":
                visited = guided_path(base, setting.null, base.process.start(some.z), some.w, some.cond, times)
            else:
                noises = (setting.noise_like(some.z, some.cond) for _ in range(steps))
                visited = noised_path(base, setting.null, some.z, noises, some.w, some.cond, times)
            for k, (x, raw) in zip(range(steps), visited):
                if bank is not None:
                    bank[rows, k] = torch.stack([x, raw], 1).to("cpu", kind)
        stage.engine.barrier()  # the first process has written
        return torch.from_file(shared=False, **mapped).view(shape)


def one_pass(adapters: Adapters, base: Denoiser, w: Tensor) -> Callable[..., Prediction]:
    """The adapted network as a denoiser of its own process."""
    return lambda x, t, cond, process: base.read(adapters(base, x, t, cond, w), x, t)


def main(cfg: Config, run: Run, *, setting: Setting | None = None) -> dict[str, float]:
    """setting: your own in place of `cfg.teacher`.

    UserError for a teacher without conditions or with a guidance embedding, forward data where there are none, and flags that would do
    nothing.
    """
    check(cfg)
    setting = setting or cfg.setting()
    if setting.embedded is not None:
        raise UserError(
            f"agd distils guidance into one pass, but the teacher {setting.name} has a guidance embedding: it already takes the scale as "
            "an input and runs once per step. Use consistency, dmd2 or phased-dmd for fewer steps.",
            code=2,
        )
    if setting.null is None:
        raise UserError(f"agd distils guidance, but the teacher {setting.name} takes no conditions.", code=2)
    base = setting.start(run)
    times = base.process.grid(cfg.steps)
    teacher = run.frozen(base)
    given = drawn(cfg, run, setting, cfg.trajectories, real=cfg.data == "forward")
    held = drawn(cfg, run, setting, cfg.evaluate)
    bank = record(cfg, run, setting, base, given, times)
    if cfg.train == "all":
        base = copy.deepcopy(base)

    adapters = Adapters(base, cfg.adapter, cfg.width, cfg.scale_w)
    player, adam = run.trainable("adapters", adapters, cfg.optimizer)
    learners = [adam]
    if cfg.train == "all":
        learners.append(run.trainable("base", base.requires_grad_(True), cfg.optimizer)[1])
    clock = torch.tensor(times[:-1], dtype=torch.float64).to(run.device)
    for _ in run.steps(cfg.updates):
        i, j = run.shard((torch.randint(cfg.trajectories, (cfg.batch,)), torch.randint(cfg.steps, (cfg.batch,))))
        x, goal = bank[i.cpu(), j.cpu()].to(run.device, torch.float32).unbind(1)  # from the file, which the host reads
        answer = player(base, x, clock[j], take(given.cond, i), given.w[i])
        run.update(tuple(learners), squared(answer, goal))
    return judge(cfg, run, setting, teacher, base.eval(), adapters.eval(), held, times)


def check(cfg: Config) -> None:
    """UserError for flags that contradict each other or would do nothing."""
    if cfg.high <= cfg.low:
        raise UserError(f"--high {cfg.high:g} must be above --low {cfg.low:g}.", code=2)
    if cfg.guidance != 1:
        raise UserError(f"--guidance {cfg.guidance:g} is one scale; agd learns all from --low to --high.", code=2)
    if cfg.images and cfg.data == "guided":
        raise UserError("--images are data to noise, which --data guided does not use.", code=2)


@torch.no_grad()
def judge(
    cfg: Config, run: Run, setting: Setting, teacher: nn.Module, base: Denoiser, adapters: Adapters, held: Drawn, times: Sequence[float]
) -> dict[str, float]:
    """Errors on held-out guided trajectories, and paired samples from the same noise; nothing but sums and ends is kept."""
    ends, plain, ours, missed = [], [], [], 0.0
    for at in range(0, cfg.evaluate, setting.at_once):
        z, w, cond = held.part(slice(at, at + setting.at_once))
        start = base.process.start(z)
        for t, (x, raw) in zip([*times[:-1], None], guided_path(teacher, setting.null, start, w, cond, times)):  # type: ignore[arg-type]
            if t is not None:
                missed += float(squared(adapters(base, x, t, cond, w), raw).sum()) / cfg.steps
        ends.append(x)
        ours.append(sample(one_pass(adapters, base, w), start, times, cond, process=base.process))  # type: ignore[arg-type]
        plain.append(sample(teacher, start, times, cond))
    goal, without, student = map(torch.cat, (ends, plain, ours))
    adapters.detach()
    errors = {name: float(squared(x, goal).mean()) for name, x in (("student", student), ("without", without))}
    metrics = {
        "prediction_error": missed / cfg.evaluate,
        "sample_error": errors["student"],
        "gap_closed": gap_closed(student, without, goal),
        "mean_gap_closed": 1 - errors["student"] / errors["without"],
        "energy": energy_distance(student, goal),
        "trainable_share": parameters(adapters) / parameters(base),
        "evaluations": float(cfg.steps),
    }
    run.row("guidance, two passes", sample_error=0.0, evaluations=2.0 * cfg.steps)
    run.row("no guidance", sample_error=errors["without"], energy=energy_distance(without, goal), evaluations=float(cfg.steps))
    run.row("student", **metrics)
    setting.show(run, "samples", {"no guidance": without, "guidance, two passes": goal, "adapters, one pass": student})
    run.save_student(adapters, save)
    return metrics
