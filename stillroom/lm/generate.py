"""Batched sampling from any causal model, with groups per prompt, stop strings, an open reply, and token log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.core.errors import UserError
from stillroom.lm.traces import Messages, render
from stillroom.metrics.modes import eval_mode


@dataclass
class Completion:
    """One sampled continuation. `log_probs` are those of the sampling policy: at its temperature, before any top-p cut
    (at temperature 1 for greedy decoding). `tokens` include the end token and those of a stop string; `text` has neither."""

    tokens: list[int]
    log_probs: list[float]
    text: str
    finished: bool
    """False when the token budget ran out: then the last token is no place to learn an end from."""


def left_pad(prompts: Sequence[Sequence[int]], pad: int = 0, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Ids and 0/1 mask (B, n), prompts flush right."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    samples: int = 1,
    stop: Sequence[str] = (),
    context: int | None = None,
    generator: torch.Generator | None = None,
) -> list[list[Completion]]:
    """`samples` completions of every prompt (token ids), as one group per prompt; temperature 0 is greedy.

    The model samples in evaluation mode and is put back as it was. A sequence ends at the tokenizer's end token (or any end token of
    the model's generation config) or when its text contains a `stop` string. `context`: the longest sequence the model reads
    (its config's, if it has one). UserError for a prompt that leaves no room.
    """
    limit = context or getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longest = max(map(len, prompts), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise UserError(
            f"A prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context of {limit}: shorten either."
        )
    if any(len(p) == 0 for p in prompts):
        raise UserError("An empty prompt cannot be continued: begin it with a start token or a chat template.")
    device = next(model.parameters()).device
    ends = _end_tokens(model, tokenizer)
    rows = [list(p) for p in prompts for _ in range(samples)]
    done = [Completion([], [], "", False) for _ in rows]
    with eval_mode(model):
        if rows:
            _sample(model, rows, done, tokenizer, ends, max_new_tokens, temperature, top_p, stop, generator, device)
    for out in done:
        kept = out.tokens[:-1] if out.tokens and out.tokens[-1] in ends else out.tokens
        out.text = _before_stop(tokenizer.decode(kept), stop)
    return [done[i : i + samples] for i in range(0, len(done), samples)]


def _sample(
    model: nn.Module, rows: list[list[int]], done: list[Completion], tokenizer: Any, ends: set[int], budget: int,
    temperature: float, top_p: float, stop: Sequence[str], generator: torch.Generator | None, device: torch.device,
) -> None:  # fmt: skip
    ids, mask = left_pad(rows, device=device)
    alive = list(range(len(rows)))
    past: Any = None
    words_known = len(tokenizer)  # further rows of the head are padding, no words
    for _ in range(budget):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True)
        past = out.past_key_values
        log_probs = (out.logits[:, -1, :words_known].float() / (temperature or 1.0)).log_softmax(-1)
        words = _draw(log_probs, temperature, top_p, generator)
        chosen = log_probs.gather(-1, words[:, None]).squeeze(-1).tolist()
        going = []
        for row, (index, word, log_prob) in enumerate(zip(alive, words.tolist(), chosen)):
            item = done[index]
            item.tokens.append(word)
            item.log_probs.append(log_prob)
            item.finished = word in ends or (bool(stop) and _stopped(tokenizer, item.tokens, stop))
            if not item.finished:
                going.append(row)
        if not going:
            return
        ids, mask = words[:, None], torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
        if len(going) < len(alive):
            keep = torch.tensor(going, device=device)
            ids, mask, alive = ids[keep], mask[keep], [alive[row] for row in going]
            past.batch_select_indices(keep)


def _draw(log_probs: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return log_probs.argmax(-1)
    probs = log_probs.exp()
    if top_p < 1:
        ordered, order = probs.sort(-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)  # the word that crosses the line stays
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


def _end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {e for e in [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])] if e is not None}


def _stopped(tokenizer: Any, tokens: list[int], stop: Sequence[str]) -> bool:
    tail = tokenizer.decode(tokens[-max(len(s.encode()) for s in stop) - 1 :])  # a string of n bytes spans at most n tokens
    return any(s in tail for s in stop)


def _before_stop(text: str, stop: Sequence[str]) -> str:
    return text[: min((text.index(s) for s in stop if s in text), default=len(text))]


def reply(
    model: nn.Module, tokenizer: Any, chats: Sequence[Messages], *, opening: Sequence[str] | None = None, **how: Any
) -> list[list[Completion]]:
    """Assistant replies to chats (lists of role/content messages). `opening[i]` starts the i-th reply: the model continues that very
    message, under the same header, and the returned text begins with it. The rest of the arguments are those of `generate`.
    """
    openings = list(opening) if opening is not None else [""] * len(chats)
    texts = [render(tokenizer, chat, reply=True) + first for chat, first in zip(chats, openings)]
    groups = generate(model, [tokenizer.encode(text, add_special_tokens=False) for text in texts], tokenizer, **how)
    for first, group in zip(openings, groups):
        for out in group:
            out.text = first + out.text
    return groups
