"""Gated attention weights of other implementations: the query projection there holds the gate's rows too, in two different orders."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from stillroom.core.errors import UserError


def split_reference(rows: Tensor, heads: int, kv_heads: int, granularity: Literal["elementwise", "headwise"]) -> tuple[Tensor, Tensor]:
    """(queries, gate) of qiuzh20/gated_attention's q_proj.weight: within each key-value group first all query rows, then all gate rows.

    rows (H c + H, d) headwise or (2 H c, d) elementwise -> (H c, d) and (H, d) or (H c, d), heads in order.
    """
    group = heads // kv_heads
    gated = group if granularity == "headwise" else rows.shape[0] // kv_heads // 2
    per_group = rows.unflatten(0, (kv_heads, -1))
    queries = per_group.shape[1] - gated
    if queries % group or (granularity == "elementwise" and queries != gated):
        raise UserError(f"A q_proj of {rows.shape[0]} rows is no {granularity} gated one of {heads} heads in {kv_heads} groups.")
    return per_group[:, :queries].flatten(0, 1), per_group[:, queries:].flatten(0, 1)


def split_qwen3_next(rows: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """(queries, gate), each (H c, d), of a Qwen3-Next q_proj.weight (2 H c, d): per head its query rows, then its gate rows."""
    if rows.shape[0] % (2 * heads):
        raise UserError(f"A q_proj of {rows.shape[0]} rows is no Qwen3-Next one of {heads} heads: it has 2 x head width rows per head.")
    query, gate = rows.unflatten(0, (heads, 2, -1)).unbind(1)
    return query.flatten(0, 1), gate.flatten(0, 1)
