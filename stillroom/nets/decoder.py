"""A small pre-norm transformer (RMSNorm, RoPE, grouped queries, GELU), causal or not, with gated attention as an option.

It answers to the names of transformers' causal models (`base_model`, `get_output_embeddings`, `logits`, `past_key_values`), so that the
language floor handles it and a real one alike. Gate after Qiu et al. 2025 (arXiv 2505.06708): Y' = Y * sigmoid(X W), where X is
the pre-normed input that also feeds queries, keys and values, and Y one of five places of the layer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from stillroom.core.errors import UserError
from stillroom.nets.checked import LARGEST, LAYERS, Fields, check_parameters, is_number

Position = Literal["output", "value", "key", "query", "projected"]


class States(NamedTuple):
    """Normed states (B, n, width), keys and values if asked for, and the states of all layers if asked for, else the normed ones alone.

    All states are the embeddings, what every block but the last returns, and the normed states. A tuple, so that FSDP2 finds the tensors.
    """

    last_hidden_state: Tensor
    past_key_values: Any
    hidden_states: tuple[Tensor, ...]


class Predicted(NamedTuple):
    """Logits (B, n, V), and the states, keys and values of `States`."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...]
    past_key_values: Any


@dataclass(frozen=True)
class GateOptions:
    """Where and how attention is gated; the default is the paper's best, elementwise after attention (G1)."""

    position: Position = "output"
    """The paper's G1 (attention output per head), G2 (value), G3 (key), G4 (query), G5 (after the output projection)."""
    granularity: Literal["elementwise", "headwise"] = "elementwise"
    shared: bool = False
    """Average the scores over heads (whether before or after the sigmoid is unconfirmed; after it here)."""
    activation: Literal["sigmoid", "ns_sigmoid", "silu", "identity"] = "sigmoid"
    """ns_sigmoid is 1/2 + sigmoid/2: as non-linear, but never sparse."""
    combine: Literal["mul", "add"] = "mul"
    input_dependent: bool = True
    """False: one learned score per head and channel, starting at zero."""


class Gate(nn.Module):
    """Scores from x (B, n, d) for y (B, n, H, c): one per head, or one per head and channel."""

    def __init__(self, options: GateOptions, width: int, heads: int, channels: int):
        super().__init__()
        self.options, self.heads = options, heads
        per_head = channels if options.granularity == "elementwise" else 1
        if options.input_dependent:
            self.linear = nn.Linear(width, heads * per_head, bias=False)
        else:
            self.logits = nn.Parameter(torch.zeros(heads, per_head))

    def scores(self, x: Tensor) -> Tensor:
        """Activated scores, (B, n, H, c) or (B, n, H, 1), or without the leading two when they do not depend on x."""
        raw = self.linear(x).unflatten(-1, (self.heads, -1)) if self.options.input_dependent else self.logits
        match self.options.activation:
            case "sigmoid":
                score = raw.sigmoid()
            case "ns_sigmoid":
                score = 0.5 + 0.5 * raw.sigmoid()
            case "silu":
                score = silu(raw)
            case _:
                score = raw
        return score.mean(-2, keepdim=True) if self.options.shared else score

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.scores(x) if self.options.combine == "mul" else y + self.scores(x)


class KeyValues:
    """Keys and values of every layer so far, each (B, K, n, c); a row can be dropped from the batch once it has ended."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def update(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if index < len(self.layers):
            past_key, past_value = self.layers[index]
            key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
            self.layers[index] = (key, value)
        else:
            self.layers.append((key, value))
        return key, value

    def get_seq_length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def batch_select_indices(self, indices: Tensor) -> None:
        self.layers = [(key[indices], value[indices]) for key, value in self.layers]


def rotary(positions: Tensor, channels: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, n, c) of the rotation at positions (B, n), halves layout as in transformers."""
    rates = base ** (-torch.arange(0, channels, 2, device=positions.device) / channels)
    angles = positions[:, None, :, None] * rates
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on x (B, H, n, c)."""
    left, right = x.chunk(2, -1)
    return x * turn[0] + torch.cat([-right, left], -1) * turn[1]


class Attention(nn.Module):
    """Attention of `heads` query and `kv_heads` key-value heads, optionally gated and with per-head RMSNorm on q and k. Without a mask
    it is causal, or with `causal=False` looks everywhere."""

    def __init__(
        self, width: int, heads: int, *, kv_heads: int | None = None, channels: int | None = None, out: int | None = None,
        gate: GateOptions | None = None, qk_norm: bool = False, causal: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.causal = causal
        self.heads, self.kv_heads, self.channels = heads, kv_heads or heads, channels or width // heads
        if self.heads % self.kv_heads or self.channels % 2:
            raise UserError(
                f"{heads} heads need key-value heads that divide them and an even width each, got {self.kv_heads} and {self.channels}."
            )
        self.q = nn.Linear(width, self.heads * self.channels, bias=False)
        self.k = nn.Linear(width, self.kv_heads * self.channels, bias=False)
        self.v = nn.Linear(width, self.kv_heads * self.channels, bias=False)
        self.o = nn.Linear(self.heads * self.channels, out or width, bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(self.channels, eps=1e-6) if qk_norm else nn.Identity() for _ in range(2))
        self.position = gate.position if gate else None
        if gate is not None:
            heads = {"output": self.heads, "query": self.heads, "projected": 1}.get(gate.position, self.kv_heads)
            self.gate = Gate(gate, width, heads, (out or width) if gate.position == "projected" else self.channels)

    def heads_of(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, n, c), keys and values (B, K, n, c), gated where the gate sits there. Norm and rotation never touch the gate."""
        parts = []
        for name, linear in (("query", self.q), ("key", self.k), ("value", self.v)):
            part = linear(x).unflatten(-1, (-1, self.channels))
            parts.append(self.gate(x, part) if self.position == name else part)
        query, key, value = parts
        return rotate(self.q_norm(query).transpose(1, 2), turn), rotate(self.k_norm(key).transpose(1, 2), turn), value.transpose(1, 2)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None = None, cache: KeyValues | None = None, index: int = 0
    ) -> Tensor:
        """x (B, n, d) -> (B, n, out); mask (B, 1, n, total) is True where a query may look; None: all, or those before."""
        query, key, value = self.heads_of(x, turn)
        if cache is not None:
            key, value = cache.update(index, key, value)
        mixed = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=self.causal and mask is None, enable_gqa=self.heads != self.kv_heads
        ).transpose(1, 2)
        if self.position == "output":
            mixed = self.gate(x, mixed)
        out = self.o(mixed.flatten(2))
        return self.gate(x, out.unsqueeze(2)).squeeze(2) if self.position == "projected" else out

    def weights(self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None = None, *context: Any) -> Tensor:
        """Attention probabilities (B, H, n, n) without a cache, recomputed because the fused kernel keeps none."""
        query, key, _ = self.heads_of(x, turn)
        key = key.repeat_interleave(self.heads // self.kv_heads, 1)
        scores = query @ key.transpose(-1, -2) / self.channels**0.5
        if mask is None and self.causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).tril()
        return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)


class Block(nn.Module):
    def __init__(self, width: int, hidden: int, **attention: Any):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, **attention)
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        x = x + self.attention(self.norm1(x), *context)
        return x + self.down(gelu(self.up(self.norm2(x))))


class Backbone(nn.Module):
    """Token ids (B, n), or embeddings (B, n, d) in their place -> states of `width` d."""

    def __init__(self, vocabulary: int, width: int, layers: int, hidden: int, rope_base: float, *, causal: bool = True, **attention: Any):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, hidden, causal=causal, **attention) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.rope_base, self.causal = rope_base, causal

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: KeyValues | None = None, use_cache: bool = False, *, inputs_embeds: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> States:  # fmt: skip
        """attention_mask (B, past + n): 1 on tokens, 0 on padding, on either side; positions count the tokens, unless position_ids (B, n)
        say otherwise. ValueError for both or neither of ids and embeddings, and for keys and values of a network that is not causal."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        if not self.causal and (use_cache or past_key_values is not None):
            raise ValueError("a network that is not causal has no keys and values to keep: later tokens change them")
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        past, count = past_key_values.get_seq_length() if past_key_values is not None else 0, x.shape[1]
        cache = past_key_values if past_key_values is not None else KeyValues() if use_cache else None
        rows, columns = torch.arange(past, past + count, device=x.device), torch.arange(past + count, device=x.device)
        if position_ids is None:
            position_ids = rows.expand(len(x), -1) if attention_mask is None else (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
        mask = None
        if attention_mask is not None or past:
            mask = (columns <= rows[:, None] if self.causal else torch.ones(count, count, dtype=torch.bool, device=x.device))[None, None]
            if attention_mask is not None:  # a padding query still sees itself, or its row would be NaN
                mask = (mask & attention_mask[:, None, None, :].bool()) | (columns == rows[:, None])
        turn = rotary(position_ids, self.blocks[0].attention.channels, self.rope_base)  # type: ignore[union-attr, arg-type]
        seen = [x]
        for index, block in enumerate(self.blocks):
            x = block(x, turn, mask, cache, index)
            seen.append(x)
        last = self.norm(x)
        return States(last, cache, (*seen[:-1], last) if output_hidden_states else (last,))


class Decoder(nn.Module):
    """A language model over `vocabulary` words, causal unless told otherwise; the head is tied to the embedding unless `tied` is False.
    `channels`: width of a head, by default width / heads.

    All matrices start at N(0, 0.02^2), as in transformers' models.
    """

    def __init__(
        self, vocabulary: int, width: int = 96, layers: int = 3, heads: int = 4, *, kv_heads: int | None = None, hidden: int | None = None,
        channels: int | None = None, rope_base: float = 10_000.0, tied: bool = True, gate: GateOptions | None = None,
        qk_norm: bool = False, causal: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.spec = {
            "vocabulary": vocabulary, "width": width, "layers": layers, "heads": heads, "kv_heads": kv_heads, "hidden": hidden,
            "channels": channels, "rope_base": rope_base, "tied": tied, "qk_norm": qk_norm, "causal": causal,
            "gate": asdict(gate) if gate else None,
        }  # fmt: skip
        self.base_model = Backbone(
            vocabulary, width, layers, hidden or 4 * width, rope_base, heads=heads, kv_heads=kv_heads, channels=channels, gate=gate,
            qk_norm=qk_norm, causal=causal,
        )  # fmt: skip
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        if tied:
            self.head.weight = self.base_model.embedding.weight

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, input_ids: Tensor | None = None, *, logits_to_keep: int = 0, **context: Any) -> Predicted:
        """Logits (B, n, V), or of the last `logits_to_keep` positions, states, the normed ones last, and with use_cache
        `past_key_values`; the context is that of `Backbone.forward`."""
        out = self.base_model(input_ids, **context)
        return Predicted(self.head(out.last_hidden_state[:, -logits_to_keep:]), out.hidden_states, out.past_key_values)


def rebuild(spec: Any, file: Path, most: int) -> Decoder:
    """A freshly initialised decoder of the `spec` that a JSON file holds as `stillroom.decoder`, of at most `most` parameters. UserError
    naming the file and the field."""
    fields = Fields(file, spec, "stillroom.decoder")
    sizes = {"vocabulary": LARGEST, "width": LARGEST, "layers": LAYERS, "heads": LARGEST}
    made: dict[str, Any] = {field: fields.whole(field, largest) for field, largest in sizes.items()}
    absent = {field: None for field in ("kv_heads", "hidden", "channels") if fields.values.get(field) is None}
    made |= absent | {field: fields.whole(field, LARGEST) for field in ("kv_heads", "hidden", "channels") if field not in absent}
    made |= {field: fields.flag(field, default) for field, default in (("tied", True), ("qk_norm", False), ("causal", True))}
    if not is_number(fields.values.get("rope_base"), positive=True):
        raise fields.wrong("rope_base", "a positive number")
    fields.only(*made, "rope_base", "gate")
    made |= {"rope_base": fields.values["rope_base"], "gate": _gate(fields)}
    try:
        check_parameters(lambda: Decoder(**made), most, f"{file}: stillroom.decoder")
    except (UserError, RuntimeError) as error:  # RuntimeError: numbers that are sizes of no tensor
        raise UserError(f"{file}: stillroom.decoder: {error}") from error
    return Decoder(**made)


def _gate(decoder: Fields) -> GateOptions | None:
    """The gate of a decoder's spec, null or absent for none."""
    if decoder.values.get("gate") is None:
        return None
    fields, hints = Fields(decoder.file, decoder.values["gate"], f"{decoder.inside}.gate"), get_type_hints(GateOptions)
    fields.only(*hints)
    made: dict[str, Any] = {
        field: fields.flag(field, getattr(GateOptions, field)) if kind is bool
        else fields.choice(field, get_args(kind), getattr(GateOptions, field))
        for field, kind in hints.items()
    }  # fmt: skip
    return GateOptions(**made)


def gated_hidden(width: int, hidden: int, heads: int, gate: GateOptions, kv_heads: int | None = None, channels: int | None = None) -> int:
    """Feed-forward width at which a gated block has the parameters of an ungated one of `hidden`, as nearly as whole units go (each has
    2 width weights). UserError when the gate costs more than the feed-forward net has."""
    rows = (kv_heads or heads) if gate.position in ("key", "value") else heads
    each = channels or width // heads
    if gate.position == "projected":
        rows, each = 1, width
    scores = rows * (each if gate.granularity == "elementwise" else 1)
    left = hidden - round(scores * (width if gate.input_dependent else 1) / (2 * width))
    if left < 1:
        raise UserError(f"A gate of {scores} scores costs more than a feed-forward width of {hidden} can give up: raise --hidden.")
    return left
