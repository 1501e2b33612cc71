"""Agent distillation: a small model learns to use tools from a teacher's trajectories (Kang et al. 2025, arXiv 2505.17612).

    minimise  - sum_t log p_S(thought_t, code_t | question, history),   observations are context only (eq. 3 and section 3)

against the same questions as chains of thought, with and without the facts in the prompt. Two additions of the paper:
first-thought prefix (the teacher's agent reply is opened with the first thought of its chain of thought) and self-consistent actions
(at test time, of N sampled actions that run, one from the largest group with equal observations).

The laptop's world: entities with a number each, questions like `kefo*lumi+17`, a tool look(name), Python in the sandbox. Facts of
questions asked out of domain never occur in training. Exact: formats, masks, filter, prefix, selection. Shrunk: models and world.
With `--questions` and a real teacher and student the same program collects, filters, trains (LoRA) and tests. The first-thought prefix
needs a teacher that reasons better than it acts; none small enough for a laptop did, so it is offered for real teachers and not claimed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from stillroom.claims import Claim
from stillroom.config import Count, Natural, Positive, Share
from stillroom.data.entities import ALPHABET, SYMBOLS, Question, World, make_world
from stillroom.data.sequences import Rows, shuffled
from stillroom.errors import UserError
from stillroom.lm.agent import Chat, Episode, Policy, Workbench, first_thoughts, read_published, rollout
from stillroom.lm.chunked import chunked_loss
from stillroom.lm.generate import generate, reply
from stillroom.lm.sandbox import Limits, Sandbox
from stillroom.lm.server import Server
from stillroom.lm.teachers import load_causal, save_causal
from stillroom.lm.text import chats, head, states
from stillroom.lm.tokenizer import Characters
from stillroom.lm.traces import Trace, render, tokenize, write
from stillroom.lm.verify import after, gsm8k, last_number, numbers
from stillroom.losses.tokens import IGNORE, align
from stillroom.nets.decoder import Decoder
from stillroom.optim import Optimizer
from stillroom.run import Run


@dataclass(frozen=True)
class Config:
    """Laptop defaults: the world of entities and a two-layer decoder."""

    student_learns: Literal["agent", "cot", "cot+facts"] = "agent"
    """Trajectories, chains of thought, or chains of thought with the facts retrieved into the prompt."""
    teacher: str = "scripted"
    """scripted in the world; for real questions openai:URL#model or hf:ID-or-folder."""
    first_thought: bool = False
    """Open a real teacher's trajectories with the first thought of its chain of thought."""
    train_observations: bool = False
    """Control: train on observations too."""
    samples: Count = 1
    """Actions sampled per step at test time; 1 is greedy. The paper's self-consistent actions take 8."""
    temperature: Positive = 0.4
    top_p: Share = 0.8
    max_steps: Count = 5
    trajectories: Count = 800
    tests: Count = 100
    """Questions of each test set."""
    width: Count = 64
    layers: Count = 2
    steps: Count = 400
    batch_size: Count = 32
    optimizer: Optimizer = Optimizer("adamw", 3e-3, weight_decay=0.01, schedule="linear", warmup=30, clip=1.0)
    questions: str = ""
    """JSON lines of {"question", "answer"} instead of the world."""
    test_questions: str = ""
    published: str = ""
    """Trajectories of a published data set to train on, instead of collecting them."""
    student: str = ""
    """hf:ID-or-folder, for real questions."""
    max_new_tokens: Count = 1024
    length: Count = 10_240
    lora_rank: Natural = 64
    """LoRA rank of a real student, on all linear layers with alpha twice the rank; 0 trains everything."""


def full() -> Config:
    """The paper's 1.5 B student (2 epochs of about 2,000 trajectories, batch 8) with self-consistent actions."""
    return Config(
        teacher="openai:http://localhost:8000/v1#Qwen/Qwen2.5-32B-Instruct", first_thought=True, samples=8, questions="train.jsonl",
        test_questions="test.jsonl", student="hf:Qwen/Qwen2.5-1.5B-Instruct", tests=500, trajectories=2000, steps=500, batch_size=8,
        optimizer=Optimizer("adamw", 2e-4, schedule="linear"),
    )  # fmt: skip


EARLY = {"steps": 200}
ARMS = {
    "cot": {"student_learns": "cot"},
    "agent": {},
    "cot+facts": {"student_learns": "cot+facts"},
    "early": EARLY,
    "early, self-consistent": {**EARLY, "samples": 8},
    "early, observations trained": {**EARLY, "train_observations": True},
}
CLAIMS = [
    Claim("an agent's student answers about entities it never saw", "ood", "agent", "cot", margin=0.3, paper="7B: 39.9 against 33.5"),
    Claim("retrieved facts alone do not make up for the tools", "ood", "agent", "cot+facts", margin=0.1, paper="7B: 39.9 against 32.2"),
    Claim(
        "self-consistent actions lower the failed actions of an under-trained student",
        "failed_actions", "early, self-consistent", "early", "lower", paper="parse errors of the 0.5B about halved",
    ),
    Claim("and raise its accuracy", "accuracy", "early, self-consistent", "early", paper="1.5B: 28.1 to 30.3"),
    Claim("with observations masked the student does not invent them", "invented", "early", "early, observations trained", "lower", 0.3),
]  # fmt: skip

SYSTEM = (
    "Solve the question in steps. Each step: 'Thought:' with your reasoning, a blank line, then 'Code:' with Python between ```py and ```. "
    "What the code prints comes back as the next message; variables stay. Call final_answer(value) when you know it."
)
COT_SYSTEM = "Reason step by step. Begin with a short plan, then a blank line. End with a last line '#### ' and the answer."


def main(cfg: Config, run: Run) -> dict[str, float]:
    """The world by default; real questions when `questions` or `published` names a file."""
    return real(cfg, run) if cfg.questions or cfg.published else laptop(cfg, run)


# -- the world ---------------------------------------------------------------------------------------------------------------------
def laptop(cfg: Config, run: Run) -> dict[str, float]:
    world = make_world(run.seed)
    tokenizer = Characters(ALPHABET, symbols=SYMBOLS)
    with Sandbox({"look": world.facts.__getitem__, "final_answer": lambda value: value}, limits=Limits(2.0)) as box:
        bench = Workbench(box)
        traces = lessons(cfg, run, world, bench)
        net, optimizer = run.trainable("student", Decoder(len(tokenizer), cfg.width, cfg.layers, 4), cfg.optimizer)
        sft(cfg, run, net, optimizer, to_rows(tokenizer, traces, cfg.train_observations))
        net = run.unwrap(net)
        tests = {"accuracy": world.questions(cfg.tests, "test"), "ood": world.questions(cfg.tests, "test", unseen=True)}
        metrics: dict[str, float] = {}
        episodes: list[Episode] = []
        for name, questions in tests.items():
            right, found = solve(cfg, world, tokenizer, net, questions, bench)
            metrics[name] = sum(right) / len(right)
            episodes += found
        if cfg.student_learns == "agent":
            metrics |= conduct(episodes)
            metrics["invented"] = invented(tokenizer, net, tests["accuracy"])
    run.row("student", **metrics, parameters=sum(p.numel() for p in net.parameters()))
    if episodes:
        run.figure("how episodes end", lambda axes: draw_ends(axes, episodes, cfg.max_steps))
    run.save_student(net, lambda whole, folder: save_causal(whole, tokenizer, folder))
    return metrics


def lessons(cfg: Config, run: Run, world: World, bench: Workbench) -> list[Trace]:
    """What the student is trained on: chains of thought, or the teacher's trajectories that pass the filter."""
    questions = world.questions(cfg.trajectories, "train")
    if cfg.student_learns != "agent":
        facts = world.facts if cfg.student_learns == "cot+facts" else None
        return [cot_trace(q, world, facts) for q in questions]
    if cfg.teacher != "scripted":
        raise UserError(f"--teacher {cfg.teacher} needs real questions (--questions FILE); in the world the teacher is scripted.")
    episodes = rollout(scripted(questions), [q.text() for q in questions], bench)
    traces = [e.trace("", teacher="scripted") for q, e in zip(questions, episodes) if correct(q, world, e)]
    write(run.folder / "trajectories.jsonl", traces)
    return traces


def cot_trace(question: Question, world: World, facts: dict[str, int] | None) -> Trace:
    turns = [{"role": "user", "content": question.text(facts)}, {"role": "assistant", "content": question.thought(world.facts)}]
    return Trace.of(turns)


def correct(question: Question, world: World, episode: Episode) -> bool:
    return episode.clean and numbers.accepts(str(episode.answer), str(question.values(world.facts)[1]))


def scripted(questions: Sequence[Question]) -> Policy:
    """The expert that knows the script and reads nothing but its question."""
    known = {q.text(): q.replies() for q in questions}

    def policy(conversations: Sequence[Chat], openings: Sequence[str], samples: int) -> list[list[str]]:
        steps = [sum(m["role"] == "assistant" for m in chat) for chat in conversations]
        return [[known[chat[0]["content"]][step]] * samples for chat, step in zip(conversations, steps)]

    return policy


def solve(
    cfg: Config, world: World, tokenizer: Characters, net: nn.Module, questions: Sequence[Question], bench: Workbench
) -> tuple[list[bool], list[Episode]]:
    if cfg.student_learns == "agent":
        policy = policy_of(cfg, net, tokenizer, 64)
        episodes = rollout(policy, [q.text() for q in questions], bench, max_steps=cfg.max_steps, samples=cfg.samples)
        return [numbers.accepts(str(e.answer), str(q.values(world.facts)[1])) for q, e in zip(questions, episodes)], episodes
    facts = world.facts if cfg.student_learns == "cot+facts" else None
    texts = greedy(net, tokenizer)([[{"role": "user", "content": q.text(facts)}] for q in questions], [""] * len(questions), 1)
    return [gsm8k.accepts(text[0], str(q.values(world.facts)[1])) for q, text in zip(questions, texts)], []


def greedy(net: nn.Module, tokenizer: Any, max_new_tokens: int = 64) -> Policy:
    def policy(conversations: Sequence[Chat], openings: Sequence[str], samples: int) -> list[list[str]]:
        groups = reply(net, tokenizer, conversations, opening=openings, max_new_tokens=max_new_tokens, temperature=0)
        return [[out.text for out in group] * samples for group in groups]

    return policy


def policy_of(cfg: Config, net: nn.Module, tokenizer: Any, max_new_tokens: int) -> Policy:
    """The student at test time: greedy, or sampling for self-consistent actions."""
    if cfg.samples == 1:
        return greedy(net, tokenizer, max_new_tokens)

    def policy(conversations: Sequence[Chat], openings: Sequence[str], samples: int) -> list[list[str]]:
        how = {"max_new_tokens": max_new_tokens, "temperature": cfg.temperature, "top_p": cfg.top_p, "samples": samples}
        return [[out.text for out in group] for group in reply(net, tokenizer, conversations, opening=openings, **how)]

    return policy


def conduct(episodes: Sequence[Episode]) -> dict[str, float]:
    """Rates over all steps taken, and tool calls per question."""
    steps = sum(e.steps for e in episodes)
    parse, run = sum(e.parse_errors for e in episodes), sum(e.execution_errors for e in episodes)
    return {
        "parse_errors": parse / steps, "execution_errors": run / steps, "failed_actions": (parse + run) / steps,
        "calls": sum(e.calls for e in episodes) / len(episodes),
    }  # fmt: skip


def invented(tokenizer: Characters, net: nn.Module, questions: Sequence[Question]) -> float:
    """Share of questions after whose first action the student, when nothing stops it, writes an observation itself."""
    first = [[{"role": "user", "content": q.text()}, {"role": "assistant", "content": q.replies()[0]}] for q in questions]
    prompts = [tokenizer.encode(render(tokenizer, chat)) for chat in first]
    texts = [tokenizer.decode(out.tokens) for (out,) in generate(net, prompts, tokenizer, max_new_tokens=5, temperature=0)]
    return sum(text.startswith("<|user|>") and any(c.isdigit() for c in text) for text in texts) / len(texts)


# -- training ----------------------------------------------------------------------------------------------------------------------
def to_rows(tokenizer: Any, traces: Sequence[Trace], everything: bool, length: int = 512) -> Rows:
    """Assistant text and its end tokens trained; with `everything`, all that follows the question."""
    rows = [tokenize(tokenizer, trace) for trace in traces]
    if everything:
        begins = [next(i for i, label in enumerate(labels) if label != IGNORE) for _, labels in rows]
        rows = [(ids, [IGNORE] * first + ids[first:]) for (ids, _), first in zip(rows, begins)]
    long = sum(len(ids) > length for ids, _ in rows)
    if long == len(rows):
        raise UserError(f"All {long} trajectories are longer than {length} tokens: raise --length.")
    return Rows.of([row for row in rows if len(row[0]) <= length], length)


def train_step(run: Run, net: nn.Module, optimizer: torch.optim.Optimizer, batch: Rows) -> None:
    hidden, labels = align(states(net, batch), batch.labels.to(run.device))
    out = chunked_loss(hidden, head(run.unwrap(net)), labels, ce_weight=1.0)
    count = out.tokens.clamp(min=1)
    run.update(optimizer, ce=(out.loss * count)[None], count=count)


def sft(cfg: Config, run: Run, net: nn.Module, optimizer: torch.optim.Optimizer, rows: Rows) -> None:
    for step in run.steps(cfg.steps):
        train_step(run, net, optimizer, rows.take(run.shard(shuffled(len(rows), cfg.batch_size, run.seed, step)).cpu()))


# -- real questions ----------------------------------------------------------------------------------------------------------------
def real(cfg: Config, run: Run) -> dict[str, float]:
    """Collect (or read) trajectories, train the student, let it answer the test questions."""
    if not cfg.student:
        raise UserError("Real questions need a real student: --student hf:ID-or-folder.")
    net, tokenizer = load_causal(cfg.student, store=run.store)
    with Sandbox({"final_answer": lambda value: value}, imports=("math", "statistics", "fractions", "itertools", "re")) as box:
        bench, metrics = Workbench(box), dict[str, float]()
        if cfg.published:
            traces = list(read_published(cfg.published, SYSTEM))[: cfg.trajectories]
        else:
            traces, metrics = collect(cfg, run, bench)
            write(run.folder / "trajectories.jsonl", traces)
        if cfg.lora_rank:
            net = with_lora(net, cfg.lora_rank)
        student, optimizer = run.trainable("student", net, cfg.optimizer)
        sft(cfg, run, student, optimizer, to_rows(tokenizer, traces, cfg.train_observations, cfg.length))
        student = run.unwrap(student)
        if cfg.test_questions:
            asked = ask(cfg.test_questions)[: cfg.tests]
            policy = policy_of(cfg, student, tokenizer, cfg.max_new_tokens)
            episodes = rollout(policy, [q for q, _ in asked], bench, system=SYSTEM, max_steps=cfg.max_steps, samples=cfg.samples)
            metrics["accuracy"] = numbers.accuracy([str(e.answer) for e in episodes], [a for _, a in asked])
            metrics |= conduct(episodes)
    run.row("student", **metrics)
    run.save_student(student, lambda whole, folder: save_causal(whole, tokenizer, folder))
    return metrics


def ask(path: str) -> list[tuple[str, str]]:
    """(question, answer in canonical form): the number after the last "####", or else the last one."""
    pairs = [(t.segments[0].text, t.segments[1].text) for t in chats(path)]
    return [(q, (after("####")(a) if "####" in a else last_number(a)) or a) for q, a in pairs]


def served(cfg: Config, run: Run) -> Policy:
    server = Server(cfg.teacher, run.folder / "answers.jsonl")

    def policy(conversations: Sequence[Chat], openings: Sequence[str], samples: int) -> list[list[str]]:
        groups = server.reply(
            conversations, opening=openings, samples=samples, temperature=0.0, max_new_tokens=cfg.max_new_tokens,
            stop=["Observation:", "Calling tools:"],
        )  # fmt: skip
        return [[answer.text for answer in group] for group in groups]

    return policy


def taught(cfg: Config, run: Run) -> tuple[nn.Module, Any]:
    model, tokenizer = load_causal(cfg.teacher, store=run.store)
    return run.frozen(model), tokenizer


def collect(cfg: Config, run: Run, bench: Workbench) -> tuple[list[Trace], dict[str, float]]:
    """The teacher's trajectories on the training questions that are right and parsed, one per question."""
    asked = ask(cfg.questions)[: cfg.trajectories]
    policy = served(cfg, run) if cfg.teacher.startswith("openai:") else greedy(*taught(cfg, run), cfg.max_new_tokens)
    questions = [q for q, _ in asked]
    opening = first_thoughts(policy, questions, COT_SYSTEM) if cfg.first_thought else None
    episodes = rollout(policy, questions, bench, system=SYSTEM, max_steps=cfg.max_steps, openings=opening)
    kept = [e for e, (_, answer) in zip(episodes, asked) if e.clean and numbers.accepts(str(e.answer), answer)]
    if not kept:
        raise UserError(f"The teacher solved none of {len(asked)} questions as an agent; see answers.jsonl in {run.folder}.")
    return [e.trace(SYSTEM, teacher=cfg.teacher) for e in kept], {"teacher_success": len(kept) / len(asked)}


def with_lora(net: nn.Module, rank: int) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("LoRA needs peft: pip install peft, or pass --lora-rank 0.") from None
    return get_peft_model(net, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.05, target_modules="all-linear"))  # type: ignore[arg-type, return-value]


def draw_ends(axes: Any, episodes: Sequence[Episode], max_steps: int) -> None:
    """How many steps the episodes took, by whether they ended with an answer."""
    spots = list(range(1, max_steps + 1))
    for ended, label in ((True, "answered"), (False, "gave up")):
        counts = [sum(e.steps == n and (e.answer is not None) == ended for e in episodes) for n in spots]
        axes.bar([n + (-0.2 if ended else 0.2) for n in spots], counts, 0.4, label=label)
    axes.set(xlabel="steps", ylabel="episodes", title="how test episodes end")
    axes.legend()
