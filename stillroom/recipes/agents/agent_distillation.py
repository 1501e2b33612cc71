"""Agent distillation: a small model learns to use tools from a teacher's trajectories (Kang et al. 2025, arXiv 2505.17612).

    minimise  - sum_t log p_S(thought_t, code_t | question, history),   observations are context only (eq. 3 and section 3)

against the same questions as chains of thought, with and without the facts in the prompt. Two additions of the paper:
first-thought prefix (the teacher's agent reply is opened with the first thought of its chain of thought) and self-consistent actions
(at test time, of N sampled actions that run, one from the largest group with equal observations).

The laptop's world: entities with a number each, questions like `lumi taken from kefo`, a tool look(name), Python in the sandbox. Tests ask
about entities of the training questions (accuracy), others (unseen), and others with larger numbers (ood). Teachers: a script, or a
language model trained on many chains of thought and few trajectories: it reasons better than it acts, which the prefix is for. The chains
of thought that the agent is held against have three times its steps, and eight votes, so that they are learned. `--questions` with a real
teacher and student: the same program collects, filters, trains (LoRA) and tests.

Exact: formats, masks, filter, prefix, selection, stop strings. Shrunk: models and world. Ours: the world; candidates agree on their final
answers too, and each is tried on a copy of the state; facts are judged by their words, where the paper asks a language model. Left out:
retrieval on real questions (an index of tens of gigabytes), and with it chains with facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from stillroom.catalogue.claims import Claim
from stillroom.catalogue.idle import refuse_unread
from stillroom.core.config import Count, Natural, Positive, Share
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.data.entities import ALPHABET, SYMBOLS, Part, Question, World, make_world
from stillroom.data.sequences import Rows
from stillroom.lm.agent import STOPS, Chat, Episode, Policy, Workbench, read_published, rollout
from stillroom.lm.collect import ask, collect, collect_thoughts, greedy, kept, served, thoughts
from stillroom.lm.generate import generate, reply
from stillroom.lm.sandbox import Limits, Sandbox
from stillroom.lm.teachers import load_causal, save_causal
from stillroom.lm.tokenizer import Characters
from stillroom.lm.traces import Trace, render, tokenize
from stillroom.lm.train import sft
from stillroom.lm.verify import answers, gsm8k, marked
from stillroom.losses.tokens import IGNORE
from stillroom.metrics.cost import parameters
from stillroom.nets.decoder import Decoder


@dataclass(frozen=True)
class Config:
    """Laptop defaults: the world of entities and a two-layer decoder."""

    student_learns: Literal["agent", "cot", "cot+facts"] = "agent"
    """Trajectories, chains of thought, or chains of thought with the facts retrieved into the prompt."""
    teacher: str = "scripted"
    """scripted or learned in the world; for real questions openai:URL#model or hf:ID-or-folder."""
    first_thought: bool = False
    """Open the teacher's trajectories with the first thought of its chain of thought; not for the scripted one, which has but one mind."""
    train_observations: bool = False
    """Control: train on observations too."""
    samples: Count = 1
    """Actions sampled per step at test time, or chains of thought that vote; 1 is greedy. The paper's self-consistent actions take 8."""
    temperature: Positive = 0.4
    top_p: Share = 0.8
    max_steps: Count = 5
    trajectories: Count = 800
    tests: Count = 100
    """Questions of each test set."""
    width: Count = 64
    layers: Count = 2
    steps: Count = 500
    teacher_thoughts: Count = 2000
    """Chains of thought that the learned teacher is trained on."""
    teacher_acts: Count = 60
    """Trajectories that the learned teacher is trained on: few, or it acts as well as it reasons."""
    teacher_width: Count = 96
    teacher_steps: Count = 800
    batch_size: Count = 32
    optimizer: Optimizer = Optimizer("adamw", 3e-3, weight_decay=0.01, schedule="linear", warmup=30, clip=1.0)
    questions: str = ""
    """JSON lines of {"question", "answer"} instead of the world."""
    test_questions: str = ""
    published: str = ""
    """Trajectories of a published data set to train on, instead of collecting them."""
    student: str = ""
    """hf:ID-or-folder, for real questions."""
    max_new_tokens: Natural = 0
    """Longest reply; 0: 64 tokens in the world, 1024 on real questions."""
    length: Natural = 0
    """Longest trajectory trained on, in tokens; 0: 512 in the world, 10,240 on real questions."""
    lora_rank: Natural = 64
    """LoRA rank of a real student, on all linear layers with alpha twice the rank; 0 trains everything."""


def full() -> Config:
    """The paper's 1.5 B student (2 epochs of about 2,000 trajectories, batch 8) with self-consistent actions."""
    return Config(
        teacher="openai:http://localhost:8000/v1#Qwen/Qwen2.5-32B-Instruct", first_thought=True, samples=8, questions="train.jsonl",
        test_questions="test.jsonl", student="hf:Qwen/Qwen2.5-1.5B-Instruct", tests=500, trajectories=2000, steps=500, batch_size=8,
        optimizer=Optimizer("adamw", 2e-4, schedule="linear"),
    )  # fmt: skip


LONG = {"steps": 1500, "samples": 8}
EARLY = {"steps": 300}
TINY = {"trajectories": 16, "tests": 4, "steps": 4}
ARMS = {
    "cot": {"student_learns": "cot"},
    "cot, 3x steps, 8 votes": {"student_learns": "cot", **LONG},
    "cot+facts, 3x steps, 8 votes": {"student_learns": "cot+facts", **LONG},
    "agent": {},
    "early": EARLY,
    "early, self-consistent": {**EARLY, "samples": 8},
    "early, observations trained": {**EARLY, "train_observations": True},
    "learned teacher": {"teacher": "learned"},
    "learned teacher, first thought": {"teacher": "learned", "first_thought": True},
}
CLAIMS = [
    Claim(
        "an agent's student answers about entities it never saw, chains of thought do not, with three times the steps and eight votes",
        "unseen", "agent", "cot, 3x steps, 8 votes", margin=0.3, paper="7B: 39.9 against 33.5",
    ),
    Claim("nor with the agent's own steps and a single answer", "unseen", "agent", "cot", margin=0.3, paper="7B: 39.9 against 33.5"),
    Claim("although the longer trained have learned to answer about those they saw", "accuracy", "cot, 3x steps, 8 votes", 0.2),
    Claim(
        "retrieved facts help a chain of thought about unseen entities",
        "unseen", "cot+facts, 3x steps, 8 votes", "cot, 3x steps, 8 votes", margin=0.1, paper="1.5B: 21.3 to 24.6, 7B: 33.5 to 32.2",
    ),
    Claim(
        "but do not make up for the tools where the numbers are larger as well",
        "ood", "agent", "cot+facts, 3x steps, 8 votes", margin=0.1, paper="7B: 39.9 against 32.2",
    ),
    Claim(
        "self-consistent actions lower the failed actions of an under-trained student",
        "failed_actions", "early, self-consistent", "early", "lower", paper="parse errors of the 0.5B about halved",
    ),
    Claim("and raise its accuracy", "accuracy", "early, self-consistent", "early", paper="1.5B: 28.1 to 30.3"),
    Claim("with observations masked the student does not invent them", "invented", "early", "early, observations trained", "lower", 0.3),
    Claim(
        "a teacher opened with its first thought solves more questions as an agent",
        "teacher_success", "learned teacher, first thought", "learned teacher", paper="MATH level 5: 58.4 to 67.1",
    ),
    Claim("and its student answers more", "accuracy", "learned teacher, first thought", "learned teacher", paper="7B: 39.9 to 42.3"),
]  # fmt: skip

SYSTEM = (
    "Solve the question in steps. Each step: 'Thought:' with your reasoning, a blank line, then 'Code:' with Python between ```py and ```. "
    "What the code prints comes back as the next message; variables stay. Call final_answer(value) when you know it."
)
THINK, ACT = "think", "act"
"""The learned teacher's two instructions."""
COT_SYSTEM = "Reason step by step. Begin with a short plan, then a blank line. End with a last line '#### ' and the answer."


def main(cfg: Config, run: Run) -> dict[str, float]:
    """The world by default; real questions when `questions` or `published` names a file."""
    check_flags(cfg)
    return real(cfg, run) if cfg.questions or cfg.published else laptop(cfg, run)


def check_flags(cfg: Config) -> None:
    """UserError for what cannot be asked together, and for a flag that the others leave without effect."""
    idle: dict[str, str] = {}
    if cfg.student_learns != "agent":
        idle |= dict.fromkeys(("first_thought", "train_observations", "max_steps"), "only an agent has steps and observations")
    if cfg.samples == 1:
        idle |= dict.fromkeys(("temperature", "top_p"), "--samples is 1, which is greedy")
    if cfg.questions or cfg.published:
        if not cfg.student:
            raise UserError("Real questions need a real student: --student hf:ID-or-folder.")
        if cfg.student_learns == "cot+facts":
            raise UserError("--student-learns cot+facts needs facts to retrieve, which real questions do not bring: give agent or cot.")
        if cfg.published and cfg.student_learns == "cot":
            raise UserError("--published holds an agent's trajectories: chains of thought are collected from --questions.")
        idle |= dict.fromkeys(("width", "layers"), f"{cfg.student} has its own size")
        idle |= dict.fromkeys(("teacher_thoughts", "teacher_acts", "teacher_width", "teacher_steps"), "only the world trains its teacher")
        if cfg.published:
            idle |= dict.fromkeys(("questions", "teacher", "first_thought"), "--published trajectories are not collected again")
        elif cfg.teacher in ("scripted", "learned"):
            raise UserError(f"--teacher {cfg.teacher} knows the world only: real questions need openai:URL#model or hf:ID-or-folder.")
        if not cfg.test_questions:
            idle |= dict.fromkeys(("samples", "tests"), "there are no --test-questions")
    else:
        idle |= dict.fromkeys(("test_questions", "student", "lora_rank"), "it is for real questions (--questions or --published)")
        if cfg.student_learns != "agent":
            idle |= {"teacher": "the world writes its chains of thought"}
        elif cfg.teacher not in ("scripted", "learned"):
            raise UserError(f"--teacher {cfg.teacher} needs real questions (--questions FILE); in the world it is scripted or learned.")
        elif cfg.first_thought and cfg.teacher == "scripted":
            raise UserError("The scripted teacher has no chain of thought of its own to begin with: give --teacher learned.")
        if cfg.teacher != "learned":
            idle |= dict.fromkeys(("teacher_thoughts", "teacher_acts", "teacher_width", "teacher_steps"), "the teacher is not learned")
    refuse_unread(cfg, idle)


# -- the world ---------------------------------------------------------------------------------------------------------------------
def laptop(cfg: Config, run: Run) -> dict[str, float]:
    world = make_world(run.seed)
    tokenizer = Characters(ALPHABET, symbols=SYMBOLS)
    with Sandbox({"look": world.facts.__getitem__, "final_answer": lambda value: value}, limits=Limits(2.0)) as box:
        bench = Workbench(box)
        traces, metrics = lessons(cfg, run, world, tokenizer, bench)
        net, optimizer = run.trainable("student", Decoder(len(tokenizer), cfg.width, cfg.layers, 4), cfg.optimizer)
        sft(run, net, optimizer, to_rows(tokenizer, traces, cfg.train_observations, cfg.length or 512), cfg.steps, cfg.batch_size)
        net = run.unwrap(net)
        parts: dict[str, Part] = {"accuracy": "known", "unseen": "unseen", "ood": "large"}
        tests = {name: world.questions(cfg.tests, "test", part) for name, part in parts.items()}
        episodes: list[Episode] = []
        for name, questions in tests.items():
            metrics[name], found = solve(cfg, world, tokenizer, net, questions, bench)
            episodes += found
        if cfg.student_learns == "agent":
            metrics |= conduct(episodes) | {"invented": invented(tokenizer, net, tests["accuracy"])}
    run.row("student", **metrics, parameters=parameters(net))
    if episodes:
        run.figure("how episodes end", lambda axes: draw_ends(axes, episodes, cfg.max_steps))
    run.save_student(net, lambda whole, folder: save_causal(whole, tokenizer, folder))
    return metrics


def lessons(cfg: Config, run: Run, world: World, tokenizer: Characters, bench: Workbench) -> tuple[list[Trace], dict[str, float]]:
    """What the student is trained on: chains of thought, or the teacher's trajectories that pass the filter, and how many did."""
    questions = world.questions(cfg.trajectories, "train")
    if cfg.student_learns != "agent":
        return [cot_trace(q, world, world.facts if cfg.student_learns == "cot+facts" else None) for q in questions], {}
    asked = [(q.text(), str(q.answer(world.facts))) for q in questions]
    # Outside of what is kept: a finished teacher only reloads, and the draws that follow are the same either way.
    policy = greedy(learned(cfg, run, world, tokenizer, bench), tokenizer) if cfg.teacher == "learned" else scripted(questions)

    def build() -> tuple[list[str], dict[str, float]]:
        metrics: dict[str, float] = {}
        if cfg.teacher == "learned":
            texts = thoughts(policy, [question for question, _ in asked], THINK)
            metrics["teacher_cot"] = gsm8k.accuracy(texts, [answer for _, answer in asked])
        traces, success = collect(policy, asked, bench, **how(cfg), act=ACT, think=THINK, system="")
        return [trace.line() for trace in traces], {**metrics, "teacher_success": success}

    return kept(run, build)


def cot_trace(question: Question, world: World, facts: dict[str, int] | None, system: str = "") -> Trace:
    head = [{"role": "system", "content": system}] if system else []
    turns = [{"role": "user", "content": question.text(facts)}, {"role": "assistant", "content": question.thought(world.facts)}]
    return Trace.of([*head, *turns])


def scripted(questions: Sequence[Question]) -> Policy:
    """The expert that knows the script and reads nothing but its question."""
    known = {q.text(): q.replies() for q in questions}

    def policy(conversations: Sequence[Chat], openings: Sequence[str], samples: int) -> list[list[str]]:
        steps = [sum(m["role"] == "assistant" for m in chat) for chat in conversations]
        asked = [next(m["content"] for m in chat if m["role"] == "user") for chat in conversations]
        return [[known[question][step]] * samples for question, step in zip(asked, steps)]

    return policy


def learned(cfg: Config, run: Run, world: World, tokenizer: Characters, bench: Workbench) -> nn.Module:
    """A teacher that reasons better than it acts, once for all runs of this seed."""
    sizes = (cfg.teacher_width, cfg.layers, cfg.teacher_thoughts, cfg.teacher_acts, cfg.teacher_steps, cfg.batch_size, cfg.optimizer)
    with run.stage("teacher", shared=(train_teacher, make_world, sizes)) as stage:
        return train_teacher(stage, cfg, world, tokenizer, bench)


def train_teacher(stage: Run, cfg: Config, world: World, tokenizer: Characters, bench: Workbench) -> nn.Module:
    """Trained on many chains of thought and few trajectories, each under its own instruction."""
    thoughts = [cot_trace(q, world, None, THINK) for q in world.questions(cfg.teacher_thoughts, "teacher thinks")]
    questions = world.questions(cfg.teacher_acts, "teacher acts")
    acts = [e.trace(ACT) for e in rollout(scripted(questions), [q.text() for q in questions], bench)]
    net, optimizer = stage.trainable("teacher", Decoder(len(tokenizer), cfg.teacher_width, cfg.layers, 4), cfg.optimizer)
    sft(stage, net, optimizer, to_rows(tokenizer, thoughts + acts, False), cfg.teacher_steps, cfg.batch_size)
    return stage.unwrap(net)


def solve(
    cfg: Config, world: World, tokenizer: Characters, net: nn.Module, questions: Sequence[Question], bench: Workbench
) -> tuple[float, list[Episode]]:
    """Share of right answers, and an agent's episodes."""
    policy, wanted = policy_of(cfg, net, tokenizer, cfg.max_new_tokens or 64), [str(q.answer(world.facts)) for q in questions]
    if cfg.student_learns == "agent":
        episodes = rollout(policy, [q.text() for q in questions], bench, max_steps=cfg.max_steps, samples=cfg.samples)
        return answers.accuracy([str(e.answer) for e in episodes], wanted), episodes
    facts = world.facts if cfg.student_learns == "cot+facts" else None
    groups = policy([[{"role": "user", "content": q.text(facts)}] for q in questions], [""] * len(questions), cfg.samples)
    return gsm8k.accuracy([group[gsm8k.vote(group) or 0] for group in groups], wanted), []


def policy_of(cfg: Config, net: nn.Module, tokenizer: Any, max_new_tokens: int, stop: Sequence[str] = ()) -> Policy:
    """The student at test time: greedy, or sampling for self-consistent actions."""
    if cfg.samples == 1:
        return greedy(net, tokenizer, max_new_tokens, stop)
    options = {"max_new_tokens": max_new_tokens, "temperature": cfg.temperature, "top_p": cfg.top_p, "stop": stop}

    def policy(conversations: Sequence[Chat], openings: Sequence[str], samples: int) -> list[list[str]]:
        groups = reply(net, tokenizer, conversations, opening=openings, samples=samples, **options)
        return [[out.text for out in group] for group in groups]

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


# -- real questions ----------------------------------------------------------------------------------------------------------------
def real(cfg: Config, run: Run) -> dict[str, float]:
    """Collect (or read) trajectories, or chains of thought, train the student, let it answer the test questions."""
    net, tokenizer = load_causal(cfg.student, store=run.store)
    if cfg.lora_rank:
        net = with_lora(net, cfg.lora_rank)
    budget, agent = cfg.max_new_tokens or 1024, cfg.student_learns == "agent"
    stop = STOPS if agent else ()
    with Sandbox({"final_answer": lambda value: value}, imports=("math", "statistics", "fractions", "itertools", "re")) as box:
        bench, metrics = Workbench(box), dict[str, float]()
        if cfg.published:
            traces = list(read_published(cfg.published, SYSTEM))[: cfg.trajectories]
        else:
            asked = ask(cfg.questions)[: cfg.trajectories]

            def build() -> tuple[list[str], dict[str, float]]:
                here = not cfg.teacher.startswith("openai:")
                policy = greedy(*taught(cfg, run), budget, stop) if here else served(cfg.teacher, run, budget, stop)
                if agent:
                    found, success = collect(policy, asked, bench, **how(cfg), act=SYSTEM, think=COT_SYSTEM, system=SYSTEM)
                else:
                    found, success = collect_thoughts(policy, asked, teacher=cfg.teacher, think=COT_SYSTEM)
                return [trace.line() for trace in found], {"teacher_success": success}

            traces, metrics = kept(run, build)
        student, optimizer = run.trainable("student", net, cfg.optimizer)
        rows = to_rows(tokenizer, traces, cfg.train_observations, cfg.length or 10_240)
        sft(run, student, optimizer, rows, cfg.steps, cfg.batch_size)
        student = run.unwrap(student)
        if cfg.test_questions:
            asked = ask(cfg.test_questions)[: cfg.tests]
            policy, wanted = policy_of(cfg, student, tokenizer, budget, stop), [answer for _, answer in asked]
            if agent:
                episodes = rollout(policy, [q for q, _ in asked], bench, system=SYSTEM, max_steps=cfg.max_steps, samples=cfg.samples)
                metrics |= {"accuracy": answers.accuracy([str(e.answer) for e in episodes], wanted), **conduct(episodes)}
            else:
                metrics["accuracy"] = marked.accuracy(thoughts(policy, [q for q, _ in asked], COT_SYSTEM, cfg.samples), wanted)
    run.row("student", **metrics)
    run.save_student(student, lambda whole, folder: save_causal(whole, tokenizer, folder))
    return metrics


def how(cfg: Config) -> dict[str, Any]:
    return {"teacher": cfg.teacher, "first_thought": cfg.first_thought, "max_steps": cfg.max_steps}


def taught(cfg: Config, run: Run) -> tuple[nn.Module, Any]:
    model, tokenizer = load_causal(cfg.teacher, store=run.store)
    return run.frozen(model), tokenizer


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
