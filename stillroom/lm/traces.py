"""Traces: conversations whose every segment says whether it is trained, with provenance, as JSONL in the chat format of TRL.

One line is {"messages": [{"role", "content", "trained"}], "source": {...}}: `datasets` and TRL read it as it is (the extra keys are
ignored by chat templates), and their files load here, with assistant messages trained and everything else context.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.core.errors import UserError
from stillroom.core.store import write_atomic
from stillroom.lm.tokenizer import encode_with_offsets
from stillroom.losses.tokens import IGNORE
from stillroom.nets.checked import loading

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Segment:
    """What one role said. A trained segment includes its end-of-turn token; an untrained one is context only."""

    role: str
    text: str
    trained: bool


@dataclass(frozen=True)
class Trace:
    """Segments in order, and where they came from (teacher, prompt, verdict, seed, ...)."""

    segments: tuple[Segment, ...]
    source: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, messages: Messages, *, trained: Iterable[str] = ("assistant",), **source: Any) -> Trace:
        """From chat messages. A message's own "trained" wins over its role; observations belong to an untrained role whoever sent them."""
        roles = set(trained)
        return cls(tuple(Segment(m["role"], _text(m["content"]), bool(m.get("trained", m["role"] in roles))) for m in messages), source)

    def messages(self) -> list[dict[str, str]]:
        """In plain chat format."""
        return [{"role": s.role, "content": s.text} for s in self.segments]

    def line(self) -> str:
        messages = [{"role": s.role, "content": s.text, "trained": s.trained} for s in self.segments]
        return json.dumps({"messages": messages, "source": self.source}, ensure_ascii=False)


def _text(content: Any) -> str:
    """Content as a string; agents' libraries write a list of {"type": "text", "text": ...} parts."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def write(path: Path | str, traces: Iterable[Trace]) -> None:
    """One trace per line, all or nothing."""
    write_atomic(Path(path), "".join(trace.line() + "\n" for trace in traces))


def read(path: Path | str, *, trained: Iterable[str] = ("assistant",)) -> Iterator[Trace]:
    """Traces of a JSONL file in this or the plain chat format. UserError names the file and line that is broken."""
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                    yield Trace.of(row["messages"], trained=trained, **row.get("source", {}))
                except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as wrong:
                    what = "is not JSON" if isinstance(wrong, json.JSONDecodeError) else f"is not a conversation ({wrong!r})"
                    raise UserError(
                        f'{path}, line {number} {what}: expected {{"messages": [{{"role": ..., "content": ...}}, ...]}}.'
                    ) from None


def deduplicate(traces: Iterable[Trace], key: Callable[[Trace], Any] = lambda t: t.segments) -> list[Trace]:
    """The first trace of every key, in order."""
    return list({key(trace): trace for trace in reversed(list(traces))}.values())[::-1]


def per_prompt(traces: Iterable[Trace], limit: int, prompt: Callable[[Trace], Any], generator: torch.Generator) -> list[Trace]:
    """At most `limit` traces of each prompt, drawn at random: taking the first accepted ones would favour short and easy ones."""
    groups: dict[Any, list[Trace]] = {}
    for trace in traces:
        groups.setdefault(prompt(trace), []).append(trace)
    picks = ((group, torch.randperm(len(group), generator=generator)[:limit].sort().values.tolist()) for group in groups.values())
    return [group[i] for group, chosen in picks for i in chosen]


def render(tokenizer: Any, messages: Messages, *, reply: bool = False) -> str:
    """The conversation as text by the tokenizer's chat template, ending with the open header of a reply if asked. UserError for
    a tokenizer without a template, or whose template fails."""
    if getattr(tokenizer, "chat_template", "") is None:
        raise UserError(
            f"The tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template: set tokenizer.chat_template, "
            "or use the instruction-tuned model's tokenizer."
        )
    with loading(f"The chat template of the tokenizer {getattr(tokenizer, 'name_or_path', '')!r}"):
        return tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=reply)


def rendered(tokenizer: Any, trace: Trace) -> tuple[str, list[tuple[int, int]]]:
    """A trace as text under any chat template, and the characters (start, stop) of its trained messages.

    They run from after a message's header through its end of turn. Both places are found by rendering the conversation up to each message,
    so a template that rewrites earlier turns is refused rather than masked wrongly.
    """
    messages = trace.messages()
    text = render(tokenizer, messages)
    spans = []
    for i, segment in enumerate(trace.segments):
        if segment.trained:
            header, through = render(tokenizer, messages[:i], reply=True), render(tokenizer, messages[: i + 1])
            if segment.role != "assistant":
                raise UserError(f"Only an assistant's message can be trained, message {i + 1} is the {segment.role}'s.")
            if not (text.startswith(header) and text.startswith(through)):
                raise UserError(
                    f"This chat template renders message {i + 1} differently once the conversation goes on, so its tokens cannot be told: "
                    "use a template that only appends, or one trace per reply."
                )
            spans.append((len(header), len(through.rstrip())))
    return text, spans


def tokenize(tokenizer: Any, trace: Trace) -> tuple[list[int], list[int]]:
    """Ids and labels (unshifted; -100 on context) of a trace: see `rendered`."""
    text, spans = rendered(tokenizer, trace)
    ids, offsets = encode_with_offsets(tokenizer, text)
    return ids, labels_within(ids, offsets, spans)


def labels_within(ids: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """The ids whose characters lie inside a span, -100 elsewhere."""
    inside = [any(start <= a and b <= stop and b > a for start, stop in spans) for a, b in offsets]
    return [token if kept else IGNORE for token, kept in zip(ids, inside)]


def collate(rows: Sequence[tuple[list[int], list[int]]], *, pad: int = 0, context: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and attention mask (B, L), padded right; padding is masked by place, never by id. UserError past the context."""
    width = max(len(ids) for ids, _ in rows)
    if context is not None and width > context:
        raise UserError(f"A trace of {width} tokens exceeds the context of {context}: filter or truncate the traces first.")
    ids = torch.full((len(rows), width), pad)
    labels, mask = torch.full_like(ids, IGNORE), torch.zeros_like(ids)
    for i, (row, wanted) in enumerate(rows):
        ids[i, : len(row)], labels[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), torch.tensor(wanted), 1
    return ids, labels, mask
