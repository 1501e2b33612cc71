"""Low-rank adapters (Hu et al. 2021) on linear and convolutional layers of any network: W x + scale factor U (D x), U zero at first.

    net = lora.add(copy.deepcopy(base), rank=4)         # only the adapters learn
    with torch.no_grad(), lora.off(net):                # the base, with the same weights in memory
        teacher = net(x)
    lora.save(net, folder)                              # the adapters alone; `lora.load(net, folder)`, or `lora.merge(net)`

A diffusers network gets peft's layers by the same calls, so that diffusers loads what is saved. The scale is a number of the layers, read
at their forward pass: a backward pass that recomputes it (gradient checkpointing) must run at the scale that the forward pass had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stillroom.core.errors import UserError, needs
from stillroom.nets.hooks import matching, swap

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""What is adapted in a diffusers network: the projections of all attention layers."""
FILE = "lora.safetensors"
PEFT = "default"
"""peft's own name for a network's first adapter."""


class Lora(nn.Module):
    """A layer with a low-rank path beside it. down ~ N(0, 1 / rank^2), up = 0; `factor` is alpha / rank, `scale` 1 unless turned."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, factor: float = 1.0):
        super().__init__()
        self.layer, self.rank, self.factor, self.scale = layer, rank, factor, 1.0
        if isinstance(layer, nn.Conv2d):
            shape: dict[str, Any] = {"kernel_size": layer.kernel_size, "stride": layer.stride, "padding": layer.padding,
                                     "dilation": layer.dilation, "groups": layer.groups, "bias": False}  # fmt: skip
            self.down: Any = nn.Conv2d(layer.in_channels, rank * layer.groups, **shape)
            self.up: Any = nn.Conv2d(rank * layer.groups, layer.out_channels, 1, groups=layer.groups, bias=False)
        else:
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)
        self.to(layer.weight.device, layer.weight.dtype)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, factor={self.factor:g}"

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        return out if self.scale == 0 else out + (self.scale * self.factor) * self.up(self.down(x))

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The layer alone, with the low-rank path added to its weights at the present scale."""
        up, down, weight = (m.weight for m in (self.up, self.down, self.layer))
        if isinstance(self.layer, nn.Conv2d):
            groups = self.layer.groups
            product = torch.einsum("gor,grikl->goikl", up.reshape(groups, -1, self.rank), down.reshape(groups, self.rank, *down.shape[1:]))
        else:
            product = up @ down
        weight.add_(product.reshape(weight.shape), alpha=self.scale * self.factor)
        return self.layer


def add(net: nn.Module, rank: int, alpha: int | None = None, targets: Sequence[str] = ()) -> nn.Module:
    """Hang adapters on `net`, in place, and leave only them to learn; returns the network.

    alpha: the factor is alpha / rank (default 1). targets: patterns of layer paths (`hooks.matching`), by default the network's own
    `hidden` ones, or every linear and convolutional layer; for a diffusers network suffixes of names, by default its attention.
    ValueError if no such layer is found.
    """
    alpha = rank if alpha is None else alpha
    net.requires_grad_(False)
    if (model := _diffusers(net)) is not None:
        needs("peft", "diffusers")
        from peft import LoraConfig

        kept = list(targets or ATTENTION)
        model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=kept, init_lora_weights="gaussian"))
        return net
    inner = next((m for m in net.modules() if hasattr(m, "hidden")), net)
    patterns = targets or getattr(inner, "hidden", None)
    paths = [path for pattern in patterns for path in matching(inner, pattern)] if patterns else [p for p, _ in inner.named_modules()]
    found = [path for path in dict.fromkeys(paths) if type(inner.get_submodule(path)) in (nn.Linear, nn.Conv2d)]
    if not found:
        raise ValueError(f"{type(inner).__name__} has no linear or convolutional layer at {patterns}")
    for path in found:
        swap(inner, path, Lora(inner.get_submodule(path), rank, alpha / rank))  # type: ignore[arg-type]  # chosen as a layer of weights
    return net


@contextmanager
def scaled(net: nn.Module, scale: float) -> Iterator[None]:
    """While the block runs, the adapters count `scale` times: 1 is the trained network, 0 the base, between them a slide."""
    before = [(layer, _scale(layer)) for layer in _layers(net)]
    for layer, _ in before:
        _scale(layer, scale)
    try:
        yield
    finally:
        for layer, old in before:
            _scale(layer, old)


def off(net: nn.Module) -> Any:
    """While the block runs, the network is its base."""
    return scaled(net, 0.0)


def merge(net: nn.Module) -> nn.Module:
    """Fold the adapters into the weights, in place, at their present scale; returns the network, plain again."""
    if (model := _diffusers(net)) is not None:
        model.fuse_lora()
        model.unload_lora()
        return net
    for path, layer in list(net.named_modules()):
        if isinstance(layer, Lora):
            swap(net, path, layer.merged())
    return net


def state(net: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors by name, for `transfer` to another network of the same form."""
    own = {f"{path}.{part}.weight" for path, layer in net.named_modules() if isinstance(layer, Lora) for part in ("down", "up")}
    return {name: value for name, value in net.state_dict().items() if name in own or ".lora_A." in name or ".lora_B." in name}


def transfer(net: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors of `state` into a network with adapters. ValueError if they do not fit."""
    own = state(net)
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in tensors.items()}:
        raise ValueError("these adapters belong to another network, rank or choice of layers")
    net.load_state_dict(dict(tensors), strict=False)


def save(net: nn.Module, folder: Path) -> None:
    """The adapters alone."""
    save_file({name: value.contiguous() for name, value in state(net).items()}, folder / FILE)


def load(net: nn.Module, folder: str | Path) -> nn.Module:
    """Fill a network with adapters from `save`. UserError if there are none, others, or damaged ones."""
    if not (Path(folder) / FILE).is_file():
        raise UserError(f"{folder} holds no adapters ({FILE}).")
    try:
        transfer(net, load_file(Path(folder) / FILE))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{Path(folder) / FILE}: {error}.") from None
    return net


def _diffusers(net: nn.Module) -> Any:
    """diffusers' model inside of wrappers, if there is one."""
    return next((m for m in net.modules() if hasattr(m, "add_adapter") and hasattr(m, "from_pretrained")), None)


def _layers(net: nn.Module) -> list[Any]:
    return [m for m in net.modules() if isinstance(m, Lora) or (hasattr(m, "lora_A") and PEFT in getattr(m, "scaling", {}))]


def _scale(layer: Any, scale: float | None = None) -> float:
    """Its scale, which is set first if given. peft keeps scale and factor in one number."""
    if isinstance(layer, Lora):
        layer.scale = layer.scale if scale is None else scale
        return layer.scale
    factor = layer.lora_alpha[PEFT] / layer.r[PEFT]
    if scale is not None:
        layer.scaling[PEFT] = scale * factor
    return layer.scaling[PEFT] / factor
