"""Adapters beside a frozen denoising network: small residual modules with side inputs (a scalar, time, class, prompt), hung on by hooks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stillroom.core.errors import UserError
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.processes import Time, as_time
from stillroom.nets.checked import Fields, fill, is_number, read_object
from stillroom.nets.denoisers import PointNet

Kind = Literal["cross_attention", "offset"]
WIDEST = 2**12
"""No adapter has more channels inside."""


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
    """Every residual block of a `PointNet`, every `attn2` of a U-Net, every `attn` of an SD3 or Flux transformer. UserError for others."""
    if isinstance(net, PointNet):
        label = net.embedding.label
        width = net.features
        return Anatomy([(b, width) for b in net.blocks], (net.embedding.time, width), (label, width) if label else None)
    transformer = ("attn", "joint_attention_dim")
    name, last = {
        "UNet2DConditionModel": ("attn2", "cross_attention_dim"),
        "SD3Transformer2DModel": transformer,
        "FluxTransformer2DModel": transformer,
    }.get(type(net).__name__, ("", ""))
    if not name:
        raise UserError(
            f"no blocks are known to adapt in a {type(net).__name__}: adapters take text-conditional U-Nets, SD3 and Flux transformers."
        )
    blocks = [(m, m.out_dim) for path_, m in net.named_modules() if path_.rpartition(".")[2] == name]
    clock = net.time_embedding if name == "attn2" else net.time_text_embed.timestep_embedder
    return Anatomy(blocks, (clock, clock.linear_2.out_features), text=getattr(net.config, last))


def inner(net: Any) -> nn.Module:
    """The network itself, without what wraps it."""
    while isinstance(getattr(net, "net", None), nn.Module):
        net = net.net
    return net


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
        body = anatomy(inner(net))
        make = CrossAttention if kind == "cross_attention" else Offset
        self.blocks = nn.ModuleList(make(dim, width) for _, dim in body.blocks)
        self.scale, self.time = Scalar(width), nn.Linear(body.time[1], width)
        self.label = nn.Linear(body.label[1], width) if body.label else None
        self.text = nn.Linear(body.text, width) if body.text else None
        self.attach(net)

    def _keep(self, name: str, module: nn.Module, inputs: Any, out: Tensor) -> None:
        self._side[name] = out

    def attach(self, net: nn.Module) -> None:
        net = inner(net)
        body = anatomy(net)
        self.handles = [net.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for name, part in (("time", body.time), ("label", body.label)):
            if part:
                self.handles.append(part[0].register_forward_hook(partial(self._keep, name)))
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
            assert self.w is not None  # else `_residual` asks for none
            w = as_time(self.w, like).to(like.dtype).expand(n)
            parts = [self.scale(w * self.scale_w), self.time(self._side["time"])]
            if self.label is not None:
                parts.append(self.label(self._side["label"]))
            words = self.text(self._side["text"]) if self.text is not None else None
            if self.kind == "offset":
                total = sum(parts[1:], parts[0])
                self._side["tokens"] = total if words is None else total + words.mean(1)
            else:
                tokens = torch.stack(parts, 1) if words is None else torch.cat([torch.stack(parts, 1), words], 1)
                self._side["tokens"] = tokens + positions(tokens.shape[1], self.width, tokens.device, tokens.dtype)
        return self._side["tokens"]

    def forward(self, base: Denoiser, x: Tensor, t: Time, cond: Any, w: Time) -> Tensor:
        self.w = w
        try:
            return base.raw(x, t, cond)
        finally:
            self.w = None


@lru_cache(maxsize=64)
def positions(n: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[n, width] sinusoidal positions. Made once for each device, where they stay."""
    angle = torch.arange(n)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
    return torch.cat([angle.sin(), angle.cos()], 1)[:, :width].to(device, dtype)


def save(adapters: Adapters, folder: Path) -> None:
    """Only the adapters: their tensors (fixed buffers included) and the few numbers that shape them."""
    save_file(adapters.state_dict(), folder / "adapters.safetensors")
    (folder / "adapters.json").write_text(json.dumps({"kind": adapters.kind, "width": adapters.width, "scale_w": adapters.scale_w}))


def load(folder: str | Path, net: nn.Module) -> Adapters:
    """Hang saved adapters on a network (`pipe.unet`, `pipe.transformer`, or a `PointNet`); then set `.w` and use guidance_scale=1.

    UserError, naming the file, for anything that `save` does not write, and for adapters of another network.
    """
    folder = Path(folder)
    file = folder / "adapters.json"
    if not file.is_file():
        raise UserError(f"{folder} holds no adapters (adapters.json and adapters.safetensors of an agd run).")
    fields = Fields(file, read_object(file))
    fields.only("kind", "width", "scale_w")
    kind: Any = fields.choice("kind", get_args(Kind), "cross_attention")
    width, scale_w = fields.whole("width", WIDEST), fields.values.get("scale_w")
    if not is_number(scale_w):
        raise fields.wrong("scale_w", "a number")
    adapters = Adapters(net, kind, width, scale_w)  # type: ignore[arg-type]  # a number, as just checked
    fill(adapters, folder / "adapters.safetensors")
    return adapters.eval().requires_grad_(False)
