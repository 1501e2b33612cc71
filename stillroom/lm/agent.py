"""Agents that think, write code and observe (CodeAct), for any source of replies: rollouts, first-thought prefix, self-consistent actions.

One step is "Thought: ...", a blank line, "Code:", fenced Python; the printed output comes back as the next user message, and
`final_answer(value)` ends the episode. The interpreter's state lasts over the steps and is a value: a candidate is tried on a copy.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillroom.core.errors import UserError
from stillroom.lm.sandbox import Outcome, Sandbox
from stillroom.lm.traces import Trace

Chat = list[dict[str, str]]
Policy = Callable[[Sequence[Chat], Sequence[str], int], Sequence[Sequence[str]]]
"""(chats, openings, samples) -> replies, `samples` per chat, each beginning with its opening."""

STOPS = ("Observation:", "Calling tools:")
"""What an agent must not write itself: generation ends there."""
FENCE = re.compile(r"Code:\s*```(?:py|python)?\n(.*?)\n?```", re.DOTALL)
ANSWER = "final_answer"


@dataclass
class Episode:
    """One question's conversation, its final answer (None: none was given), and what went wrong on the way."""

    chat: Chat
    answer: str | None = None
    parse_errors: int = 0
    execution_errors: int = 0
    calls: int = 0
    steps: int = 0
    opening: str = ""

    def trace(self, system: str, **source: Any) -> Trace:
        """For training: under the given short system prompt, ending with the last assistant message, observations context only. A reply
        ends with the code that was run: what follows it was made up before anything was observed."""
        last = max(i for i, message in enumerate(self.chat) if message["role"] == "assistant")
        head = [{"role": "system", "content": system}] if system else []
        body = [m | {"content": _through_code(m["content"])} if m["role"] == "assistant" else m for m in self.chat[: last + 1]]
        body = [m for m in body if m["role"] != "system"]
        return Trace.of([*head, *body], answer=self.answer, **source)

    @property
    def clean(self) -> bool:
        """It ended with an answer and every message parsed; failed executions are kept, for they teach recovery."""
        return self.answer is not None and not self.parse_errors


def code_of(text: str) -> str | None:
    """The fenced code of a reply, or None."""
    found = FENCE.search(text)
    return found[1] if found else None


def _through_code(text: str) -> str:
    found = FENCE.search(text)
    return text[: found.end()] if found else text


def observation(outcome: Outcome) -> str:
    """What the model is told: printed text, then the error if there was one."""
    return (outcome.output.rstrip("\n") + (f"\n{outcome.error}" if outcome.error else "")).strip("\n")


def final(outcome: Outcome) -> str | None:
    return next((str(args[0]) for name, args, _, _ in outcome.calls if name == ANSWER and args), None)


def vote_key(outcome: Outcome) -> tuple[str, str | None]:
    """Candidates agree when they print the same and answer the same (the answer is our addition: a final call prints nothing)."""
    return re.sub(r"0x[0-9a-f]+", "0x", outcome.output.strip()), final(outcome)


def select(outcomes: Sequence[Outcome | None]) -> int:
    """Self-consistent action: index of the first candidate of the largest group with equal observations, among those that ran (None or
    an error: it did not). None ran: the first. All differ: the first that ran."""
    ran = [i for i, outcome in enumerate(outcomes) if outcome is not None and outcome.error is None]
    if not ran:
        return 0
    keys = {i: vote_key(outcomes[i]) for i in ran}  # type: ignore[arg-type]
    counts = Counter(keys.values())
    return max(ran, key=lambda i: (counts[keys[i]], -i))


@dataclass
class Workbench:
    """A sandbox whose results are remembered by (state, code), for candidates often repeat each other; tools must not have side effects."""

    box: Sandbox
    known: dict[tuple[str, str], Outcome] = field(default_factory=dict)

    def run(self, code: str, state: str) -> Outcome:
        if (state, code) not in self.known:
            self.known[state, code] = self.box.run(code, state)
        return self.known[state, code]


def rollout(
    policy: Policy, questions: Sequence[str], bench: Workbench, *, system: str = "", max_steps: int = 5, samples: int = 1,
    openings: Sequence[str] | None = None,
) -> list[Episode]:  # fmt: skip
    """Episodes of all questions in lockstep. samples > 1 picks each action by self-consistency. `openings[i]` begins the first reply to the
    i-th question and stays in the stored message."""
    head = [{"role": "system", "content": system}] if system else []
    episodes = [Episode([*head, {"role": "user", "content": question}]) for question in questions]
    states = [""] * len(questions)
    going = list(range(len(questions)))
    for step in range(max_steps):
        if not going:
            break
        firsts = [openings[i] if openings and not step else "" for i in going]
        groups = policy([episodes[i].chat for i in going], firsts, samples)
        for i, group in zip(going, groups):
            codes = [code_of(text) for text in group]
            tried = [None if code is None else bench.run(code, states[i]) for code in codes]
            chosen = select(tried) if samples > 1 else 0
            episode, outcome = episodes[i], tried[chosen]
            episode.steps += 1
            episode.chat.append({"role": "assistant", "content": group[chosen]})
            if outcome is None:
                episode.parse_errors += 1
                seen = "Error: no code found. Write Thought:, a blank line, then Code: with fenced Python."
            else:
                states[i] = outcome.state
                episode.calls += sum(name != ANSWER for name, *_ in outcome.calls)
                episode.execution_errors += outcome.error is not None
                episode.answer = final(outcome)
                seen = observation(outcome)
            if episode.answer is None:
                episode.chat.append({"role": "user", "content": seen})
        going = [i for i in going if episodes[i].answer is None]
    return episodes


def first_thoughts(policy: Policy, questions: Sequence[str], system: str = "") -> list[str]:
    """First-thought prefixes: what the policy writes up to its first blank line when asked to reason, to open an agent's reply with."""
    head = [{"role": "system", "content": system}] if system else []
    texts = policy([[*head, {"role": "user", "content": question}] for question in questions], [""] * len(questions), 1)
    return [f"Thought: {group[0].partition(chr(10) * 2)[0].strip()}\n\n" for group in texts]


def read_published(path: Path | str, system: str) -> Iterator[Trace]:
    """Trajectories as smolagents logs and the published data sets hold them: JSON lines with messages, or log_data.messages, whose content
    is a list of parts and whose roles include tool-call and tool-response.

    A tool-call repeats the code of the assistant's message before it and is dropped; a tool-response becomes an untrained user message;
    the long system prompt is replaced by `system`. UserError names a broken line.
    """
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                messages = row["log_data"]["messages"] if "log_data" in row else row["messages"]
                yield Trace.of([*([{"role": "system", "content": system}] if system else []), *_merged(messages)])
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as wrong:
                raise UserError(f"{path}, line {number} holds no trajectory ({wrong!r}): expected messages or log_data.messages.") from None


def _merged(messages: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Roles of a chat template only, ending with an assistant's message."""
    roles = {"tool-response": "user", "user": "user", "assistant": "assistant"}
    kept = [{"role": roles[m["role"]], "content": m["content"]} for m in messages if m["role"] in roles]
    while kept and kept[-1]["role"] != "assistant":
        kept.pop()
    yield from kept
