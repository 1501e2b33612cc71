"""Weights on a few levels: bucketed linear scaling, uniform and learned quantization points (Polino, Pascanu & Alistarh 2018,
arXiv 1802.05668), and what the codes cost.

A tensor is flattened row by row and cut into buckets; bucket b holds w = alpha_b v + beta_b with v in [0, 1], beta its minimum and
alpha its range. A code is the number of v's level; levels are the 2^bits points k / (2^bits - 1), or given points that all buckets of the
tensor share. `nets/packed.py` writes codes to a file.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

Backward = Literal["straight-through", "truncated", "exact"]


class Scaled(NamedTuple):
    """A tensor of n elements in (buckets, size) rows: w = alpha v + beta."""

    v: Tensor
    alpha: Tensor
    """(buckets, 1)."""
    beta: Tensor
    """(buckets, 1)."""


def buckets(w: Tensor, size: int) -> Tensor:
    """(buckets, size): the flattened tensor, its last row filled up with copies of the last element (zeros would move that bucket's
    range). A tensor of at most `size` elements is one bucket of its own length; size 0: one bucket always."""
    flat = w.reshape(-1)
    if not size or len(flat) <= size:
        return flat[None]
    return torch.cat([flat, flat[-1:].expand(-len(flat) % size)]).view(-1, size)


def scale(w: Tensor, size: int = 0) -> Scaled:
    """Linear scaling of each bucket to [0, 1]; a range below 1e-10 counts as 1. Differentiable through one largest and one smallest
    element of each bucket."""
    rows = buckets(w, size)
    beta, high = rows.min(1, keepdim=True).values, rows.max(1, keepdim=True).values
    alpha = torch.where(high - beta < 1e-10, torch.ones_like(beta), high - beta)
    return Scaled((rows - beta) / alpha, alpha, beta)


def unscale(rows: Tensor, like: Tensor) -> Tensor:
    """Bucket rows as a tensor of the shape of `like`; padding is dropped."""
    return rows.reshape(-1)[: like.numel()].view_as(like)


def codes(w: Tensor, bits: int, size: int = 0, *, stochastic: bool = False) -> Tensor:
    """(n,) int64 numbers of levels 0..2^bits - 1: the nearest one (halves go to even), or a random one of the two neighbours, unbiased."""
    position = scale(w.detach(), size).v * (2**bits - 1)
    level = (position + torch.rand_like(position)).floor().clamp_max(2**bits - 1) if stochastic else position.round()
    return level.reshape(-1)[: w.numel()].long()


def uniform(w: Tensor, bits: int, size: int = 0, *, backward: Backward = "straight-through", stochastic: bool = False) -> Tensor:
    """Q(w) on 2^bits levels in each bucket, of which minimum and maximum are two. Its gradient reaches w

    straight-through: as if Q were the identity; alpha and beta are constants.
    truncated: w is clamped to [-1, 1] first, and gets no gradient outside.
    exact: also through alpha, sum_bucket g (qv - v) to its largest element and minus that to its smallest. (beta's part cancels:
    alpha v + beta = w.)
    """
    if backward == "truncated":
        w = w.clamp(-1, 1)
    scaled = scale(w, size)
    level = codes(w, bits, size, stochastic=stochastic).to(w.dtype) / (2**bits - 1)
    rows = pad(level, (0, scaled.v.numel() - len(level))).view_as(scaled.v)
    value = (scaled.alpha * rows + scaled.beta).detach()
    # What carries the gradients is zero in value, so that the levels are exact.
    if backward == "exact":
        value = value + (scaled.alpha - scaled.alpha.detach()) * (rows - scaled.v.detach())
    return unscale(value, w) + (w - w.detach())


def nearest(v: Tensor, points: Tensor) -> Tensor:
    """Numbers of the nearest of the ascending `points` (k,), of the lower one at equal distance; any shape."""
    return torch.bucketize(v, (points[1:] + points[:-1]) / 2)


def learned(scaled: Scaled, points: Tensor, like: Tensor) -> Tensor:
    """alpha p[nearest] + beta, in the shape of `like`. dL/dp_j = sum of alpha g over the elements that point j holds; the assignment has no
    gradient."""
    chosen = nearest(scaled.v, points.detach())
    return unscale(scaled.alpha * points[chosen] + scaled.beta, like)


def initial_points(scaled: Scaled, count: int, init: Literal["quantiles", "uniform"], like: Tensor) -> Tensor:
    """(count,) ascending: quantiles of v at equal steps (linear interpolation), or equal steps in [0, 1]."""
    steps = torch.linspace(0, 1, count, dtype=scaled.v.dtype, device=scaled.v.device)
    if init == "uniform":
        return steps
    v = scaled.v.reshape(-1)[: like.numel()].sort().values
    place = steps * (len(v) - 1)  # torch.quantile refuses tensors beyond 2^24 elements
    low = place.floor().long().clamp_max(max(len(v) - 2, 0))
    return torch.lerp(v[low], v[(low + 1).clamp_max(len(v) - 1)], place - low)


def allocate(counts: Sequence[int], sizes: Sequence[int], norms: Sequence[float]) -> list[int]:
    """Points per tensor by the size of its gradient, their total unchanged: each keeps half of its own (rounded down), the rest is dealt
    in proportion to `norms`, rounded. Excess of rounding comes from the largest tensor that can give, a lack goes to the smallest."""
    kept = [count // 2 for count in counts]
    spare, total = sum(counts) - sum(kept), sum(norms)
    dealt = [keep + round(spare * norm / total) if total else count for keep, norm, count in zip(kept, norms, counts, strict=True)]
    by_size = sorted(range(len(sizes)), key=lambda i: sizes[i])
    while (excess := sum(dealt) - sum(counts)) > 0:
        giver = next(i for i in reversed(by_size) if dealt[i] > 1)
        dealt[giver] -= min(excess, dealt[giver] - 1)
    dealt[by_size[0]] -= excess
    return dealt


def allocate_bits(bits: int, sizes: Sequence[int], norms: Sequence[float], most: int = 8) -> list[int]:
    """Whole bits of a code per tensor by the size of its gradient, in no more room than `bits` for each takes. A tensor of n weights costs
    n bits per bit of its code, and its 2^bits points 32 bits each. All start at one bit; the next one goes to the tensor whose norm 2^-bits
    is largest for what the bit costs there, among those that fit, up to `most`."""
    dealt = [1] * len(sizes)
    room = sum(point_bits(bits, n) - point_bits(1, n) for n in sizes)
    while True:
        prices = [point_bits(b + 1, n) - point_bits(b, n) for b, n in zip(dealt, sizes, strict=True)]
        fit = [i for i, price in enumerate(prices) if price <= room and dealt[i] < most and norms[i]]
        if not fit:
            return dealt
        best = max(fit, key=lambda i: norms[i] * 0.5 ** dealt[i] / prices[i])
        dealt[best] += 1
        room -= prices[best]


def point_bits(bits: int, size: int) -> int:
    """What the codes of `size` weights and their 2^bits float32 points take, in bits."""
    return size * bits + 32 * 2**bits


def entropy_coded_bits(histogram: Sequence[int]) -> float:
    """Mean length in bits of a Huffman code for symbols of these counts; 0 for a single one."""
    heap = [count for count in histogram if count]
    heapq.heapify(heap)
    total, length = sum(heap), 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        length += merged
        heapq.heappush(heap, merged)
    return length / total if total else math.nan
