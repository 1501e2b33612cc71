"""A network's weights as packed codes in one small safetensors file.

Tensors: `codes`, all parameters' codes one after the other at their number of bits, lowest bit first; `scales` (2, buckets), the factor
and offset of every bucket; `levels`, the values in [0, 1] (or about) that the codes stand for; `rest`, everything that is not coded
(buffers, parameters left out) as it is. Metadata holds the layout: [bits, bucket size, levels] per parameter, in order, null for what
is not coded. Names and shapes are the network's own: it must be built first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stillroom.core.errors import UserError

FILE = "packed.safetensors"


@dataclass(frozen=True)
class Coded:
    """A parameter: codes (n,) into `levels`, and per bucket of `bucket` elements (0: one for all) the factor and offset."""

    codes: Tensor
    levels: Tensor
    alpha: Tensor
    beta: Tensor
    bucket: int

    def values(self) -> Tensor:
        """(n,) float: alpha level + beta."""
        size = self.bucket or len(self.codes)
        place = torch.arange(len(self.codes)) // size
        return self.alpha.flatten()[place] * self.levels[self.codes] + self.beta.flatten()[place]

    @property
    def bits(self) -> int:
        return max(1, (len(self.levels) - 1).bit_length())


def pack(codes: Tensor, bits: int) -> Tensor:
    """(n,) int64 below 2^bits to ceil(n bits / 8) bytes, uint8: lowest bit first."""
    stream = (codes[:, None] >> torch.arange(bits)) & 1
    stream = stream.reshape(-1)
    stream = torch.cat([stream, stream.new_zeros(-len(stream) % 8)]).view(-1, 8)
    return (stream << torch.arange(8)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """What `pack` packed, (count,) int64."""
    stream = ((packed.long()[:, None] >> torch.arange(8)) & 1).reshape(-1)[: count * bits].view(count, bits)
    return (stream << torch.arange(bits)).sum(1)


def save_packed(net: nn.Module, coded: Mapping[str, Coded], file: Path) -> None:
    """Write the net, those of its parameters that `coded` names as codes, the others and all buffers as they are."""
    layout: list[list[int] | None] = []
    codes, scales, levels, rest = [], [], [], []
    for name, tensor in _tensors(net):
        if (item := coded.get(name)) is None:
            layout.append(None)
            rest.append(tensor.detach().cpu().flatten().view(torch.uint8))
            continue
        layout.append([item.bits, item.bucket, len(item.levels)])
        codes.append(pack(item.codes.cpu(), item.bits))
        scales.append(torch.stack([item.alpha.flatten(), item.beta.flatten()]).float().cpu())
        levels.append(item.levels.float().cpu())
    empty = torch.empty(0, dtype=torch.uint8)
    tensors = {"codes": torch.cat(codes), "scales": torch.cat(scales, 1), "levels": torch.cat(levels), "rest": torch.cat([*rest, empty])}
    save_file(tensors, file, metadata={"layout": json.dumps(layout, separators=(",", ":"))})


def load_packed(net: nn.Module, file: Path) -> None:
    """Fill a net of the same shape from a file. UserError when the file is damaged or is another net's."""
    try:
        with safe_open(file, "pt") as opened:
            layout = json.loads((opened.metadata() or {})["layout"])
            parts = {key: opened.get_tensor(key) for key in ("codes", "scales", "levels", "rest")}
        if [parts[key].dtype for key in parts] != [torch.uint8, torch.float32, torch.float32, torch.uint8] or parts["scales"].ndim != 2:
            raise ValueError("its tensors are of other types")
        state = {}
        for (name, tensor), form in zip(_tensors(net), layout, strict=True):
            count = tensor.numel()
            if form is None:
                raw = _take(parts, "rest", count * tensor.element_size())
                state[name] = raw.clone().view(tensor.dtype).view(tensor.shape)
                continue
            bits, bucket, levels = form
            if not (isinstance(bits, int) and isinstance(bucket, int) and 1 <= bits <= 32 and bucket >= 0):
                raise ValueError(f"its layout says {form} of {name}")
            codes = unpack(_take(parts, "codes", -(-count * bits // 8)), bits, count)
            size = bucket or count
            alpha, beta = _take(parts, "scales", -(-count // size)).unbind(0)
            state[name] = Coded(codes, _take(parts, "levels", levels), alpha, beta, bucket).values().to(tensor.dtype).view(tensor.shape)
        if left := [key for key, part in parts.items() if part.shape[-1]]:
            raise ValueError(f"{left[0]} holds more than this net takes")
        net.load_state_dict(state)
    except (OSError, KeyError, IndexError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{file} could not be read into {type(net).__name__} ({error}). It may be damaged, or another net's.") from error


def _take(parts: dict[str, Tensor], key: str, count: int) -> Tensor:
    """The first `count` columns of what is left of a part."""
    part = parts[key]
    if part.shape[-1] < count:
        raise ValueError(f"{key} ends early")
    parts[key] = part[..., count:]
    return part[..., :count]


def _tensors(net: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters in order, then what else the state holds."""
    named = dict(net.named_parameters())
    return [*named.items(), *((name, tensor) for name, tensor in net.state_dict().items() if name not in named)]
