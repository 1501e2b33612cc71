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
start. Shrunk: a 2-D base network of 4 classes, 50 DDIM steps. At this width adapters are as large as the base, so the paper's 1-5 % is
not claimed. Speed is reported in network evaluations: one per step instead of two.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stillroom.claims import Claim
from stillroom.config import Count, Natural, NonNegative, Positive
from stillroom.diffusion import settings
from stillroom.diffusion.denoiser import Denoiser, Guided, Prediction, take
from stillroom.diffusion.objectives import squared
from stillroom.diffusion.processes import Time
from stillroom.diffusion.sampling import sample
from stillroom.diffusion.settings import Setting
from stillroom.errors import UserError
from stillroom.metrics.generation import energy_distance
from stillroom.nets.denoisers import PointNet
from stillroom.optim import Optimizer
from stillroom.run import Run

Kind = Literal["cross_attention", "offset"]


@dataclass(frozen=True)
class Config:
    """Laptop defaults; `full()` holds the paper's."""

    teacher: str = "classes"
    """classes (a small conditional network, trained first), or diffusers:FOLDER-OR-ID."""
    prompts: str = ""
    """Text file with one prompt per line (diffusers only)."""
    size: Natural = 0
    """Image size in pixels (diffusers only); 0 is the pipeline's own."""
    adapter: Kind = "cross_attention"
    """Cross-attention is the paper's for text models, offset for DiT."""
    data: Literal["guided", "forward"] = "guided"
    """States to train on: recorded guided trajectories, or noised data with the same targets."""
    train: Literal["adapters", "all", "nothing"] = "adapters"
    """What learns; "all" also fine-tunes the base (guidance distillation), "nothing" is the conditional model without guidance."""
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
    scale_w: Positive = 1.0
    """Factor on w before its embedding (1000 for the paper's DiT offsets)."""
    updates: Count = 1200
    batch: Count = 192
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=2e-3, schedule="cosine", warmup=100))
    evaluate: Count = 500
    """Held-out trajectories for the metrics."""


def full() -> Config:
    """The paper's SDXL run: 500 captions, w ~ U[1, 12], h 320, 5000 steps of 64, AdamW 1e-4, 10 % warm-up, cosine."""
    return Config(
        teacher="diffusers:stabilityai/stable-diffusion-xl-base-1.0",
        high=12.0,
        trajectories=500,
        steps=1000,
        width=320,
        updates=5000,
        batch=64,
        optimizer=Optimizer(lr=1e-4, schedule="cosine", warmup=500),
        evaluate=16,
    )


ARMS = {
    "agd": {},
    "forward-data": {"data": "forward"},
    "offset": {"adapter": "offset"},
    "no-guidance": {"train": "nothing"},
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
    Claim("one pass closes more than 80 % of the gap to guidance", metric="gap_closed", arm="agd", versus=0.8),
    Claim(
        "adapters that look at x beat offsets", metric="prediction_error", arm="agd", versus="offset", better="lower", paper="not compared"
    ),
    Claim(
        "adapters come within 0.02 of fine-tuning everything",
        metric="sample_error",
        arm="agd",
        versus="fine-tuning",
        better="lower",
        margin=-0.02,
    ),
]


# -- adapters ----------------------------------------------------------------------------------------------------------------------
class Scalar(nn.Module):
    """LayerNorm(MLP(cos(2 pi (f s + phi)))), f ~ N(0, 1), phi ~ U[0, 1], both fixed and saved with the adapter."""

    frequency: Tensor
    phase: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("frequency", torch.randn(width))
        self.register_buffer("phase", torch.rand(width))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width), nn.LayerNorm(width))

    def forward(self, s: Tensor) -> Tensor:
        return self.mlp((2 * math.pi * (s[:, None] * self.frequency + self.phase)).cos())


class CrossAttention(nn.Module):
    """One head from the block's input to the side tokens."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(d, width, bias=False) for d in (dim, width, width))
        self.out = nn.Linear(width, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        q = self.q(x if x.ndim == 3 else x[:, None])
        attended = nn.functional.scaled_dot_product_attention(q, self.k(tokens), self.v(tokens))
        return self.out(attended).reshape(x.shape)


class Offset(nn.Module):
    """The same vector for every token, from the summed side inputs; it does not look at x."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        out = nn.Linear(width, dim)
        nn.init.zeros_(out.weight)
        nn.init.zeros_(out.bias)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width), out)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        out = self.mlp(tokens)
        return out if x.ndim == 2 else out[:, None]


@dataclass
class Anatomy:
    """Where a network is tapped: the adapted blocks, its time and class embeddings, the width of its text tokens. (module, width) each."""

    blocks: list[tuple[nn.Module, int]]
    time: tuple[nn.Module, int]
    label: tuple[nn.Module, int] | None = None
    text: int = 0


def anatomy(net: Any) -> Anatomy:
    """Every residual block of a `PointNet`, every `attn2` of a U-Net, every `attn` of an SD3 transformer. UserError for others."""
    if isinstance(net, PointNet):
        label = net.embedding.label
        width = net.features
        return Anatomy([(b, width) for b in net.blocks], (net.embedding.time, width), (label, width) if label else None)
    name, last = {"UNet2DConditionModel": ("attn2", "cross_attention_dim"), "SD3Transformer2DModel": ("attn", "joint_attention_dim")}.get(
        type(net).__name__, ("", "")
    )
    if not name:
        raise UserError(f"agd knows no blocks to adapt in a {type(net).__name__}: it takes text-conditional U-Nets and SD3 transformers.")
    blocks = [(m, m.to_out[0].out_features) for path_, m in net.named_modules() if path_.rpartition(".")[2] == name]
    clock = net.time_embedding if name == "attn2" else net.time_text_embed.timestep_embedder
    return Anatomy(blocks, (clock, clock.linear_2.out_features), text=getattr(net.config, last))


class Adapters(nn.Module):
    """All adapters of one network, hung on it by hooks; the network itself is neither changed nor held.

    forward(base, x, t, cond, w) is the base's raw output under guidance scale w [B]. `w` may also be set once as an attribute, after which
    any caller of the network (a diffusers pipeline with guidance_scale=1, say) gets guided outputs. `detach` removes everything.
    """

    def __init__(self, net: nn.Module, kind: Kind, width: int, scale_w: float = 1.0):
        super().__init__()
        self.kind, self.width, self.scale_w = kind, width, scale_w
        self.w: Time | None = None
        self._side: dict[str, Tensor] = {}
        self.handles: list[Any] = []
        body = anatomy(net)
        make = CrossAttention if kind == "cross_attention" else Offset
        self.blocks = nn.ModuleList(make(dim, width) for _, dim in body.blocks)
        self.scale, self.time = Scalar(width), nn.Linear(body.time[1], width)
        self.label = nn.Linear(body.label[1], width) if body.label else None
        self.text = nn.Linear(body.text, width) if body.text else None
        self.attach(net)

    def attach(self, net: nn.Module) -> None:
        body = anatomy(net)
        self.handles = [net.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for name, part in (("time", body.time), ("label", body.label)):
            if part:
                self.handles.append(part[0].register_forward_hook(lambda m, i, out, name=name: self._side.__setitem__(name, out)))  # type: ignore[misc]
        for adapter, (block, _) in zip(self.blocks, body.blocks, strict=True):
            self.handles.append(block.register_forward_hook(self._residual(adapter), with_kwargs=True))

    def detach(self) -> None:
        """Give the base network back exactly as it was."""
        while self.handles:
            self.handles.pop().remove()

    def _begin(self, net: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._side = {"text": kwargs["encoder_hidden_states"]} if self.text else {}

    def _residual(self, adapter: nn.Module) -> Callable[..., Any]:
        def add(block: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> Any:
            if self.w is None:
                return out
            x = args[0] if args else kwargs["hidden_states"]
            extra = adapter(x, self._tokens(len(x), x))
            return (out[0] + extra, *out[1:]) if isinstance(out, tuple) else out + extra

        return add

    def _tokens(self, n: int, like: Tensor) -> Tensor:
        """[B, N, h] tokens with positions, or [B, h] their sum; made once per call of the network."""
        if "tokens" not in self._side:
            w = torch.as_tensor(self.w, dtype=like.dtype, device=like.device).expand(n)
            parts = [self.scale(w * self.scale_w), self.time(self._side["time"])]
            if self.label is not None:
                parts.append(self.label(self._side["label"]))
            words = self.text(self._side["text"]) if self.text is not None else None
            if self.kind == "offset":
                total = sum(parts[1:], parts[0])
                self._side["tokens"] = total if words is None else total + words.mean(1)
            else:
                tokens = torch.stack(parts, 1) if words is None else torch.cat([torch.stack(parts, 1), words], 1)
                self._side["tokens"] = tokens + positions(tokens.shape[1], self.width).to(tokens)
        return self._side["tokens"]

    def forward(self, base: Denoiser, x: Tensor, t: Time, cond: Any, w: Time) -> Tensor:
        self.w = w
        try:
            return base.raw(x, t, cond)
        finally:
            self.w = None


def positions(n: int, width: int) -> Tensor:
    """[n, width] sinusoidal positions."""
    angle = torch.arange(n)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
    return torch.cat([angle.sin(), angle.cos()], 1)[:, :width]


def save(folder: Path, adapters: Adapters) -> None:
    """Only the adapters: their tensors (fixed buffers included) and the few numbers that shape them."""
    save_file(adapters.state_dict(), folder / "adapters.safetensors")
    (folder / "adapters.json").write_text(json.dumps({"kind": adapters.kind, "width": adapters.width, "scale_w": adapters.scale_w}))


def load(folder: str | Path, net: nn.Module) -> Adapters:
    """Hang saved adapters on a network (`pipe.unet`, `pipe.transformer`, or a `PointNet`); then set `.w` and use guidance_scale=1."""
    folder = Path(folder)
    if not (folder / "adapters.json").is_file():
        raise UserError(f"{folder} holds no adapters (adapters.json and adapters.safetensors of an agd run).")
    adapters = Adapters(net, **json.loads((folder / "adapters.json").read_text()))
    adapters.load_state_dict(load_file(folder / "adapters.safetensors"))
    return adapters.eval().requires_grad_(False)


# -- data --------------------------------------------------------------------------------------------------------------------------
def record(base: Denoiser, null: Any, noise: Tensor, w: Tensor, cond: Any, times: Sequence[float]) -> dict[str, Tensor]:
    """Guided sampling of every trajectory: inputs x and guided raw outputs o [N, steps, ...], and the endpoints."""
    guided = Guided(base, w, null)
    x, states, outputs = base.process.start(noise), [], []
    with torch.no_grad():
        for t, s in pairwise(times):
            raw = guided.raw(x, t, cond)
            states.append(x)
            outputs.append(raw)
            x = base.process.mix(*base.read(raw, x, t), s)
    return {"x": torch.stack(states, 1), "o": torch.stack(outputs, 1), "end": x}


def noised(base: Denoiser, null: Any, data: Tensor, w: Tensor, cond: Any, times: Sequence[float]) -> dict[str, Tensor]:
    """The same number of states and targets, but at noised data: what guidance distillation trains on."""
    guided = Guided(base, w, null)
    with torch.no_grad():
        states = [base.process.mix(data, torch.randn_like(data), t) for t in times[:-1]]
        outputs = [guided.raw(x, t, cond) for x, t in zip(states, times[:-1], strict=True)]
    return {"x": torch.stack(states, 1), "o": torch.stack(outputs, 1)}


def one_pass(adapters: Adapters, base: Denoiser, w: Tensor) -> Callable[..., Prediction]:
    """The adapted network as a denoiser of its own process."""
    return lambda x, t, cond, process: base.read(adapters(base, x, t, cond, w), x, t)


def main(cfg: Config, run: Run, *, setting: Setting | None = None) -> dict[str, float]:
    """setting: your own in place of `cfg.teacher`. UserError for a teacher without conditions, or forward data where there are none."""
    if cfg.high <= cfg.low:
        raise UserError(f"--high {cfg.high:g} must be above --low {cfg.low:g}.", code=2)
    setting = setting or settings.load(cfg.teacher, cfg.prompts, cfg.size)
    if setting.null is None:
        raise UserError(f"agd distils guidance, but the teacher {setting.name} takes no conditions.", code=2)
    base = setting.student(run)
    times, null = base.process.grid(cfg.steps), settings.placed(setting.null, run.device)

    def drawn(n: int) -> tuple[Tensor, Tensor, Any]:
        return (
            setting.noise(n, run.device),
            cfg.low + (cfg.high - cfg.low) * torch.rand(n, device=run.device),
            settings.placed(setting.condition(n), run.device),
        )

    run.frozen(base)
    z, w, cond = drawn(cfg.trajectories)
    test_z, test_w, test_cond = drawn(cfg.evaluate)
    if cfg.data == "guided":
        bank = run.cached("trajectories", record, base, null, z, w, cond, times)
    elif setting.truth is None:
        raise UserError("--data forward needs real data, and a diffusers teacher brings none; use guided.", code=2)
    else:
        bank = run.cached("noised", noised, base, null, setting.truth(cfg.trajectories, cond), w, cond, times)
    held = record(base, null, test_z, test_w, test_cond, times)

    unguided = sample(base, base.process.start(test_z), times, test_cond)

    net: Any = base.net.net if setting.pipeline else base.net
    adapters = Adapters(net, cfg.adapter, cfg.width, cfg.scale_w)
    if cfg.train != "nothing":
        player, adam = run.trainable("adapters", adapters, cfg.optimizer)
        learners = [adam]
        if cfg.train == "all":
            learners.append(run.trainable("base", base.requires_grad_(True), cfg.optimizer)[1])
        clock = torch.tensor(times[:-1], dtype=torch.float64, device=run.device)
        for _ in run.steps(cfg.updates):
            i, j = run.shard((torch.randint(cfg.trajectories, (cfg.batch,)), torch.randint(cfg.steps, (cfg.batch,))))
            said = player(base, bank["x"][i, j], clock[j], take(cond, i), w[i])
            run.update(tuple(learners), squared(said, bank["o"][i, j]))
    adapters.to(run.device).eval()
    return judge(cfg, run, setting, base.eval(), adapters, held | {"unguided": unguided}, (test_z, test_w, test_cond))


@torch.no_grad()
def judge(
    cfg: Config,
    run: Run,
    setting: Setting,
    base: Denoiser,
    adapters: Adapters,
    held: dict[str, Tensor],
    drawn: tuple[Tensor, Tensor, Any],
) -> dict[str, float]:
    """Errors on held-out guided trajectories, and paired samples from the same noise."""
    z, w, cond = drawn
    times, unguided = base.process.grid(cfg.steps), held["unguided"]
    error = [squared(adapters(base, held["x"][:, k], t, cond, w), held["o"][:, k]).mean() for k, t in enumerate(times[:-1])]
    mine = sample(one_pass(adapters, base, w), base.process.start(z), times, cond, process=base.process)  # type: ignore[arg-type]
    adapters.detach()
    missed, missed_without = (float(squared(x, held["end"]).mean()) for x in (mine, unguided))
    trained = sum(p.numel() for p in adapters.parameters())
    metrics = {
        "prediction_error": float(torch.stack(error).mean()),
        "sample_error": missed,
        "gap_closed": 1 - missed / missed_without,
        "energy": energy_distance(mine, held["end"]),
        "trainable_share": trained / sum(p.numel() for p in base.parameters()),
        "evaluations": float(cfg.steps),
    }
    run.row("guidance, two passes", sample_error=0.0, evaluations=2.0 * cfg.steps)
    run.row("no guidance", sample_error=missed_without, energy=energy_distance(unguided, held["end"]), evaluations=float(cfg.steps))
    run.row("student", **metrics)
    setting.show(run, "samples", {"no guidance": unguided, "guidance, two passes": held["end"], "adapters, one pass": mine})
    run.save_student(lambda folder: save(folder, adapters))
    return metrics
