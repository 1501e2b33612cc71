"""What a teacher shows of its work: its trajectories and chains of thought, those that end rightly, collected once for a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.lm.agent import Chat, Policy, Workbench, first_thoughts, rollout
from stillroom.lm.generate import reply
from stillroom.lm.server import Server
from stillroom.lm.text import chats
from stillroom.lm.traces import Trace, write
from stillroom.lm.verify import answers, marked


def ask(path: str) -> list[tuple[str, str]]:
    """(question, answer): what stands after the last "####" of an answer, or else all of it."""
    return [(t.segments[0].text, t.segments[1].text.rpartition("####")[2].strip()) for t in chats(path)]


def greedy(net: nn.Module, tokenizer: Any, max_new_tokens: int = 64, stop: Sequence[str] = ()) -> Policy:
    """The likeliest replies of a model."""

    def policy(conversations: Sequence[Chat], openings: Sequence[str], samples: int) -> list[list[str]]:
        groups = reply(net, tokenizer, conversations, opening=openings, max_new_tokens=max_new_tokens, temperature=0, stop=stop)
        return [[out.text for out in group] * samples for group in groups]

    return policy


def served(teacher: str, run: Run, max_new_tokens: int, stop: Sequence[str] = ()) -> Policy:
    """Greedy replies of a server, each kept in the run's folder."""
    server = Server(teacher, run.folder / "answers.jsonl")

    def policy(conversations: Sequence[Chat], openings: Sequence[str], samples: int) -> list[list[str]]:
        groups = server.reply(
            conversations, opening=openings, samples=samples, temperature=0.0, max_new_tokens=max_new_tokens, stop=list(stop)
        )
        return [[answer.text for answer in group] for group in groups]

    return policy


def thoughts(policy: Policy, questions: Sequence[str], system: str, samples: int = 1) -> list[str]:
    """A chain of thought for each question, of several the one that the most agree with."""
    opened = [[{"role": "system", "content": system}, {"role": "user", "content": question}] for question in questions]
    return [group[marked.vote(group) or 0] for group in policy(opened, [""] * len(opened), samples)]


def collect(
    policy: Policy, asked: Sequence[tuple[str, str]], bench: Workbench, *, teacher: str, act: str, think: str, system: str,
    first_thought: bool = False, max_steps: int = 5,
) -> tuple[list[Trace], float]:  # fmt: skip
    """The teacher's trajectories, one per (question, answer), that are right and parsed, with the student's `system` prompt, and their
    share. `act` and `think` tell the teacher which of the two to do. UserError when none is left."""
    questions = [question for question, _ in asked]
    openings = first_thoughts(policy, questions, think) if first_thought else None
    episodes = rollout(policy, questions, bench, system=act, max_steps=max_steps, openings=openings)
    kept = [e for e, (_, answer) in zip(episodes, asked) if e.clean and answers.accepts(str(e.answer), answer)]
    if not kept:
        raise UserError(f"The teacher {teacher} solved none of {len(asked)} questions as an agent: nothing is left to train on.")
    return [e.trace(system, teacher=teacher) for e in kept], len(kept) / len(asked)


def collect_thoughts(policy: Policy, asked: Sequence[tuple[str, str]], *, teacher: str, think: str) -> tuple[list[Trace], float]:
    """The teacher's chains of thought that end with the right answer, and their share. UserError when none does."""
    texts = thoughts(policy, [question for question, _ in asked], think)
    turns = [
        [{"role": "system", "content": think}, {"role": "user", "content": question}, {"role": "assistant", "content": text}]
        for text, (question, answer) in zip(texts, asked)
        if marked.accepts(text, answer)
    ]
    if not turns:
        raise UserError(f"The teacher {teacher} reasoned rightly about none of {len(asked)} questions: nothing is left to train on.")
    return [Trace.of(turn, teacher=teacher) for turn in turns], len(turns) / len(asked)


def kept(run: Run, build: Callable[[], tuple[list[str], dict[str, float]]]) -> tuple[list[Trace], dict[str, float]]:
    """Trajectories (as lines) and what was measured on them: collected once, read again by a resumed run."""
    lines, metrics = run.kept("trajectories", build)
    traces = [Trace.of(row["messages"], **row["source"]) for row in map(json.loads, lines)]
    write(run.folder / "trajectories.jsonl", traces)
    return traces, metrics
