"""From files and models to rows of tokens, and from rows to hidden states: what every language recipe does alike."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.core.errors import UserError
from stillroom.data.sequences import Rows, windows
from stillroom.lm.generate import generate
from stillroom.lm.tokenizer import encode_with_offsets
from stillroom.lm.traces import Trace, read, tokenize


def states(net: nn.Module, rows: Rows) -> Tensor:
    """Last hidden states (B, L, d), through the network's own forward and without its logits."""
    device = next(net.parameters()).device
    out = net(input_ids=rows.ids.to(device), attention_mask=rows.mask.to(device), output_hidden_states=True, logits_to_keep=1)
    return out.hidden_states[-1]


def read_rows(path: str, tokenizer: Any, length: int) -> Rows:
    """A text file in windows of `length` tokens, or JSON lines of chats or of {"question", "answer"} with the assistant's part trained.

    UserError for a missing file, a broken line (named), or when nothing within `length` tokens is trained.
    """
    if not _is_chats(path):
        return Rows.plain(windows(tokenizer.encode(Path(path).read_text(encoding="utf-8"), add_special_tokens=False), length))
    rows = [tokenize(tokenizer, trace) for trace in chats(path)]
    kept = [(ids[:length], labels[:length]) for ids, labels in rows if any(label != -100 for label in labels[1:length])]
    if not kept:
        raise UserError(f"{path}: no conversation has a trained token among its first {length}: raise --length.")
    return Rows.of(kept, length)


def read_texts(path: str, tokenizer: Any, length: int) -> list[str] | list[Trace]:
    """What `read_rows` reads, as text for any tokenizer: a text file in pieces of `length` tokens of this one, or its conversations."""
    if _is_chats(path):
        return chats(path)
    text = Path(path).read_text(encoding="utf-8")
    _, offsets = encode_with_offsets(tokenizer, text)
    cuts = [start for start, _ in offsets[::length]] + [len(text)] * (len(offsets) % length == 0)
    windows(range(len(offsets)), length)  # at least one
    return [text[a:b] for a, b in pairwise(cuts)]


def _is_chats(path: str) -> bool:
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such file; give a text file or a .jsonl file.")
    return path.endswith(".jsonl")


def chats(path: str) -> list[Trace]:
    """Traces of a JSONL file of chats, or of questions and answers (a user's and an assistant's turn)."""
    text = Path(path).read_text(encoding="utf-8")
    if '"question"' not in text.partition("\n")[0]:
        return list(read(path))
    traces = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
            turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        except (json.JSONDecodeError, KeyError, TypeError) as wrong:
            raise UserError(f'{path}, line {number} is not {{"question": ..., "answer": ...}} ({wrong!r}).') from None
        traces.append(Trace.of(turns))
    return traces


def continued(
    net: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    batch: int = 64,
) -> Rows:
    """Prompts with what `net` samples after them; the prompt is context, and an end token is trained where one was drawn."""
    rows = []
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        groups = generate(net, part, tokenizer, max_new_tokens=max_new_tokens, temperature=temperature, generator=generator)
        rows += [([*prompt, *out.tokens], [-100] * len(prompt) + out.tokens) for prompt, (out,) in zip(part, groups)]
    return Rows.of(rows, max(len(ids) for ids, _ in rows))
