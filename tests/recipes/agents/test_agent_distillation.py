"""Agent distillation: every kind of lesson end to end, the world's own answers, and the path of real models."""

import json

import pytest
import torch

from stillroom.catalogue import cards
from stillroom.core.config import override
from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.core.store import Store
from stillroom.data.entities import ALPHABET, SYMBOLS, by_digits, make_world
from stillroom.lm import collect as collecting
from stillroom.lm.agent import Episode, Workbench, rollout
from stillroom.lm.collect import ask, collect, collect_thoughts
from stillroom.lm.generate import Completion
from stillroom.lm.sandbox import Sandbox
from stillroom.lm.tokenizer import Characters
from stillroom.lm.traces import Trace, tokenize
from stillroom.recipes.agents import agent_distillation as recipe
from stillroom.testing import trace
from tests.recipes.common import assert_resumes


@pytest.fixture(scope="module", autouse=True)
def _isolated():
    try:
        with Sandbox() as box:
            box.run("1")
    except UserError as wrong:
        pytest.skip(str(wrong))


@pytest.mark.parametrize("part", ["known", "unseen", "large"])
def test_scripted_trajectories_are_right_by_pythons_own_arithmetic(part):
    world = make_world(3)
    questions = world.questions(40, "a", part)
    with Sandbox({"look": world.facts.__getitem__, "final_answer": lambda value: value}) as box:
        episodes = rollout(recipe.scripted(questions), [q.text() for q in questions], Workbench(box))
    for question, episode in zip(questions, episodes):
        text, (x, y) = question.text(), (world.facts[question.a], world.facts[question.b])
        reversed_way = any(word in text for word in ("added to", "taken from", "more than", "less than"))
        assert (text.index(question.b) < text.index(question.a)) == reversed_way
        minus = any(word in text for word in ("-", "minus", "taken", "less"))
        assert episode.clean
        assert int(episode.answer) == (x - y if minus else x + y) >= 0
        assert question.thought(world.facts).endswith(f"#### {episode.answer}")
    assert len({(q.way, q.op) for q in questions}) == 8


def test_digits_are_worked_out_as_on_paper():
    assert by_digits(47, "+", 38) == "7+8+0=5 4+3+1=8"
    assert by_digits(42, "-", 38) == "2-8-0=4 4-3-1=0"
    assert by_digits(95, "+", 8) == "5+8+0=3 9+0+1=0"
    for x in range(100):
        for y in range(x + 1):
            for op, value in (("+", x + y), ("-", x - y)):
                digits = [int(column.rpartition("=")[2]) for column in by_digits(x, op, y).split()]
                assert sum(d * 10**i for i, d in enumerate(digits)) == value % 10 ** len(digits)


def test_entities_asked_out_of_domain_never_occur_in_training():
    world = make_world(0)
    names = {part: {name for q in world.questions(800, "x", part) for name in (q.a, q.b)} for part in ("known", "unseen", "large")}
    assert [len(names[part]) for part in names] == [200, 50, 50]
    assert len(set().union(*names.values())) == 300
    assert max(world.facts[n] for n in names["known"] | names["unseen"]) < 50 <= min(world.facts[n] for n in names["large"])


def test_a_prefix_is_made_of_the_tokens_that_a_whole_reply_has():
    tokenizer = Characters(ALPHABET, symbols=SYMBOLS)
    reply = make_world(0).questions(1, "x")[0].replies()[0]
    prefix = reply.partition("\n\n")[0] + "\n\n"
    assert tokenizer.encode(reply)[: len(tokenizer.encode(prefix))] == tokenizer.encode(prefix)


@pytest.mark.parametrize("first_thought", [True, False])
def test_a_learned_teacher_goes_on_from_its_first_thought(tmp_path, monkeypatch, first_thought):
    """A teacher that thinks rightly, and as an agent acts rightly only when its own thought opens the reply."""
    world, config = make_world(0), recipe.Config(teacher="learned", first_thought=first_thought, trajectories=6)
    known = {q.text(): q for q in world.questions(6, "train")}

    def taught(net, tokenizer):
        def policy(conversations, openings, samples):
            out = []
            for chat, opening in zip(conversations, openings):
                assert [m["role"] for m in chat[:2]] == ["system", "user"]
                question, step = known[chat[1]["content"]], sum(m["role"] == "assistant" for m in chat)
                if chat[0]["content"] == recipe.THINK:
                    out.append([question.thought(world.facts)])
                elif step == 0 and not opening:
                    out.append(["Thought: who knows\n\nCode:\n```py\nfinal_answer(-1)\n```"])
                else:
                    assert opening == (f"Thought: need {question.formula}\n\n" if step == 0 else "")
                    out.append([question.replies()[step]])
            return out

        return policy

    monkeypatch.setattr(recipe, "learned", lambda *_: None)
    monkeypatch.setattr(recipe, "greedy", taught)
    tools = {"look": world.facts.__getitem__, "final_answer": lambda value: value}
    with Run(tmp_path / "run", 0, store=Store(tmp_path / "store")) as run, Sandbox(tools) as box:
        collect = lambda: recipe.lessons(config, run, world, Characters(ALPHABET, symbols=SYMBOLS), Workbench(box))
        if not first_thought:
            with pytest.raises(UserError, match="solved none of 6"):
                collect()
            return
        traces, metrics = collect()
    assert metrics == {"teacher_cot": 1.0, "teacher_success": 1.0}
    assert [[s.text for s in t.segments if s.trained] for t in traces] == [q.replies() for q in known.values()]
    assert all(t.segments[0].role == "user" for t in traces)  # the student never hears the teacher's instruction


def test_the_learned_teacher_is_trained_once_on_both_instructions(tmp_path, monkeypatch):
    seen = []
    sft = lambda stage, net, optimizer, rows, *_: (seen.append(rows), list(stage.steps(1)))
    monkeypatch.setattr(recipe, "sft", sft)
    world, tokenizer = make_world(0), Characters(ALPHABET, symbols=SYMBOLS)
    config = recipe.Config(teacher_thoughts=5, teacher_acts=2, teacher_width=16)
    with Sandbox({"look": world.facts.__getitem__, "final_answer": lambda value: value}) as box, Run(tmp_path, 0) as run:
        recipe.train_teacher(run, config, world, tokenizer, Workbench(box))
    texts = [tokenizer.decode(ids) for ids in seen[0].lists()]
    assert [text.startswith("<|system|>think<|end|>") for text in texts] == [True] * 5 + [False] * 2
    assert all(text.startswith("<|system|>act<|end|>") for text in texts[5:])


def test_chains_of_thought_vote(monkeypatch):
    world = make_world(0)
    questions = world.questions(2, "x")
    right = [f"#### {q.answer(world.facts)}" for q in questions]
    monkeypatch.setattr(recipe, "policy_of", lambda *_: lambda chats, openings, samples: [["#### 0.5", r, r] for r in right])
    accuracy, _ = recipe.solve(recipe.Config(student_learns="cot", samples=3), world, None, None, questions, None)
    assert accuracy == 1


def test_observations_are_context_unless_the_control_trains_them():
    tokenizer = Characters(ALPHABET, symbols=SYMBOLS)
    question = make_world(0).questions(1, "x")[0]
    first, second, _ = question.replies()
    turns = [("user", question.text()), ("assistant", first), ("user", "482"), ("assistant", second)]
    trace = Trace.of([{"role": role, "content": text} for role, text in turns])
    text = lambda rows: tokenizer.decode([i for i in rows.labels[0].tolist() if i != -100])
    assert text(recipe.to_rows(tokenizer, [trace], False)) == f"{first}<|end|>{second}<|end|>"
    assert "482" in text(recipe.to_rows(tokenizer, [trace], True))
    with pytest.raises(UserError, match="longer than 5 tokens"):
        recipe.to_rows(tokenizer, [trace], False, length=5)
    assert len(tokenize(tokenizer, trace)[0]) < 60


def test_published_trajectories_train_a_real_student_with_lora(tmp_path):
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    torch.manual_seed(0)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=270, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(["Thought: Code:"], trainer)
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>",
        chat_template="{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
    )  # fmt: skip
    words.save_pretrained(tmp_path / "model")
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            eos_token_id=0,
            bos_token_id=None,
        )
    ).save_pretrained(tmp_path / "model")
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "Thought: x\n\nCode:\n```py\nfinal_answer(2)\n```"}]
    (tmp_path / "t.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 4)
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "it is\n#### 2"}) + "\n")
    config = recipe.Config(
        published=str(tmp_path / "t.jsonl"), test_questions=str(tmp_path / "q.jsonl"), student=f"hf:{tmp_path / 'model'}", steps=2,
        lora_rank=2, max_new_tokens=4, max_steps=2, length=2048,
    )  # fmt: skip
    with Run(tmp_path / "run", 0, store=Store(tmp_path / "store")) as run:
        metrics = recipe.main(config, run)
    assert metrics["accuracy"] == 0
    assert (tmp_path / "run" / "student" / "adapter_config.json").exists()
    assert ask(str(tmp_path / "q.jsonl")) == [("1+1?", "2")]


def test_real_questions_are_collected_with_first_thoughts_and_filtered(tmp_path):
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"question": f"{i}+1?", "answer": f"#### {i + 1}"}) + "\n" for i in (1, 2)))
    heard = []

    def served():
        def policy(conversations, openings, samples):
            heard.extend(openings)
            thinks = conversations[0][0]["content"] == recipe.COT_SYSTEM
            text = "add one\n\n1+1=2" if thinks else "Code:\n```py\nfinal_answer(2)\n```"
            return [[first + text] for first in openings]

        return policy

    how = {"act": recipe.SYSTEM, "think": recipe.COT_SYSTEM, "system": recipe.SYSTEM, "teacher": "t", "first_thought": True}
    with Sandbox({"final_answer": lambda value: value}) as box:
        traces, success = collect(served(), ask(str(tmp_path / "q.jsonl")), Workbench(box), **how)
    assert success == 0.5
    assert heard == ["", ""] + ["Thought: add one\n\n"] * 2
    assert traces[0].segments[0].text == recipe.SYSTEM
    assert traces[0].segments[-1].text.startswith("Thought: add one\n\nCode:")


# -- the loop
SMALL = {"trajectories": 12, "tests": 3, "steps": 3, "width": 16, "batch_size": 4}


def traced(run, watch=("sft", "to_rows", "solve", "rollout", "invented", "collect"), **changes):
    return trace(recipe, run, {**SMALL, **changes}, watch=watch)


def test_an_agent_learns_the_replies_of_the_scripted_teacher_and_is_tested_on_three_parts(run):
    seen = traced(run)
    assert seen.steps("student") == [0, 1, 2]
    (rows,), world = seen.calls("to_rows"), make_world(0)
    wanted = [q.replies() for q in world.questions(12, "train")]
    assert [[s.text for s in trace.segments if s.trained] for trace in rows.args[1]] == wanted
    assert rows.args[2:] == (False, 512)
    for update, call in zip(seen.updates("student"), seen.calls("student")):
        assert call.args == ()
        assert int(update.count) > 0
    tested = seen.calls("solve")
    parts = ["known", "unseen", "large"]
    assert [call.args[4] for call in tested] == [world.questions(3, "test", part) for part in parts]
    assert [call.keywords["max_steps"] for call in seen.calls("rollout")] == [5] * 3
    assert [seen.metrics[name] for name in ("accuracy", "unseen", "ood")] == [call.result[0] for call in tested]
    assert seen.metrics["teacher_success"] == 1.0
    (made_up,) = seen.calls("invented")
    assert made_up.args[2] == tested[0].args[4]
    assert {"parse_errors", "execution_errors", "failed_actions", "calls", "invented"} <= seen.metrics.keys()
    assert (seen.nets["student"].spec["width"], seen.nets["student"].spec["layers"]) == (16, 2)
    assert (run.folder / "trajectories.jsonl").read_text().count("\n") == 12


@pytest.mark.parametrize("facts", [False, True])
def test_a_chain_of_thought_is_learned_with_or_without_its_facts(run, facts):
    seen = traced(run, student_learns="cot+facts" if facts else "cot", samples=2)
    (rows,) = seen.calls("to_rows")
    world = make_world(0)
    for trace_, question in zip(rows.args[1], world.questions(12, "train"), strict=True):
        assert [s.text for s in trace_.segments] == [question.text(world.facts if facts else None), question.thought(world.facts)]
    assert not seen.calls("rollout")
    assert not seen.calls("collect")
    assert seen.metrics.keys() == {"accuracy", "unseen", "ood"}


def test_the_control_trains_on_observations_and_samples_are_asked_for(run):
    seen = traced(run, train_observations=True, samples=3)
    assert seen.calls("to_rows")[0].args[2] is True
    assert all(call.keywords["samples"] == 3 for call in seen.calls("rollout"))


def test_a_learned_teacher_reports_how_it_thinks_and_acts(run, monkeypatch):
    asked = []

    def policy(chats, openings, samples):
        asked.append([chat[0]["content"] for chat in chats])
        questions = {q.text(): q for q in make_world(0).questions(12, "train")}
        if chats[0][0]["content"] == recipe.THINK:
            return [["#### 0"]] * len(chats)
        return [[questions[chat[1]["content"]].replies()[sum(m["role"] == "assistant" for m in chat)]] for chat in chats]

    monkeypatch.setattr(recipe, "learned", lambda *_: (None, None))
    monkeypatch.setattr(recipe, "greedy", lambda *_: policy)
    monkeypatch.setattr(recipe, "solve", lambda *_: (0.0, [Episode([], steps=1)]))
    seen = traced(run, watch=(), teacher="learned")
    assert set(asked[0]) == {"think"}
    assert all(set(systems) == {"act"} for systems in asked[1:])
    assert seen.metrics["teacher_success"] == 1.0
    assert seen.metrics["teacher_cot"] < 0.5


def test_conduct_is_over_all_steps():
    episodes = [Episode([], "1", 1, 2, 3, 4), Episode([], None, 0, 1, 2, 6)]
    want = {"parse_errors": 0.1, "execution_errors": 0.3, "failed_actions": 0.4, "calls": 2.5}
    assert recipe.conduct(episodes) == pytest.approx(want)


def test_invented_observations_are_those_with_a_digit_after_a_users_mark(monkeypatch):
    tokenizer, questions = Characters(ALPHABET, symbols=SYMBOLS), make_world(0).questions(4, "x")
    given = []

    def generate(net, prompts, tokenizer, **how):
        given.extend(prompts)
        texts = ["<|user|>12", "<|user|>ab", "12", "<|user|>9"]
        return [[Completion(tokenizer.encode(text), [], "", True)] for text in texts]

    monkeypatch.setattr(recipe, "generate", generate)
    assert recipe.invented(tokenizer, None, questions) == 0.5
    assert [tokenizer.decode(p) for p in given] == [f"<|user|>{q.text()}<|end|><|assistant|>{q.replies()[0]}<|end|>" for q in questions]


def test_sampling_and_greedy_students_stop_where_they_are_told(monkeypatch):
    heard = []

    def reply(net, tokenizer, chats, *, opening, **how):
        heard.append(how)
        return [[Completion([], [], first + "x", True)] * how.get("samples", 1) for first in opening]

    monkeypatch.setattr(recipe, "reply", reply)
    monkeypatch.setattr(collecting, "reply", reply)
    sampling = recipe.policy_of(recipe.Config(samples=2), None, None, 7, ("S",))
    assert sampling([[]], ["o"], 2) == [["ox", "ox"]]
    assert heard[-1] == {"max_new_tokens": 7, "temperature": 0.4, "top_p": 0.8, "stop": ("S",), "samples": 2}
    assert recipe.policy_of(recipe.Config(), None, None, 7, ("S",))([[]], ["o"], 1) == [["ox"]]
    assert heard[-1] == {"max_new_tokens": 7, "temperature": 0, "stop": ("S",)}


REAL = {"questions": "q.jsonl", "student": "hf:x", "teacher": "hf:y"}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"teacher": "hf:some/model"}, "needs real questions"),
        ({"first_thought": True}, "--teacher learned"),
        ({"questions": "q.jsonl"}, "--student"),
        ({**REAL, "teacher": "scripted"}, "knows the world only"),
        ({**REAL, "student_learns": "cot+facts"}, "facts to retrieve"),
        ({"published": "t.jsonl", "student": "hf:x", "student_learns": "cot"}, "an agent's trajectories"),
        ({"published": "t.jsonl", "student": "hf:x", "teacher": "hf:y"}, "not collected again"),
        ({**REAL, "samples": 2}, "no --test-questions"),
        ({**REAL, "width": 3}, "its own size"),
        ({**REAL, "teacher_acts": 3}, "only the world"),
        ({"student_learns": "cot", "train_observations": True}, "only an agent"),
        ({"student_learns": "cot", "max_steps": 3}, "only an agent"),
        ({"student_learns": "cot", "teacher": "learned"}, "the world writes"),
        ({"temperature": 0.5}, "which is greedy"),
        ({"top_p": 0.5}, "which is greedy"),
        ({"student": "hf:x"}, "for real questions"),
        ({"lora_rank": 3}, "for real questions"),
        ({"teacher_steps": 3}, "not learned"),
    ],
)
def test_what_cannot_be_asked_or_would_do_nothing_is_refused(changes, why):
    with pytest.raises(UserError, match=why):
        recipe.check_flags(override(recipe.Config(), changes))


@pytest.mark.parametrize("arm", recipe.ARMS)
def test_arms_use_all_their_flags(arm):
    recipe.check_flags(cards.config_of(recipe, arm))


def test_chains_of_thought_on_real_questions_are_filtered_by_their_answer(tmp_path):
    rows = [{"question": "capital of France?", "answer": "Paris"}, {"question": "1+1?", "answer": "two steps\n#### 2"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ask(str(tmp_path / "q.jsonl"))
    assert asked == [("capital of France?", "Paris"), ("1+1?", "2")]
    says = lambda *texts: lambda chats, openings, samples: [[text] * samples for text in texts]
    traces, share = collect_thoughts(says("it is\n#### Paris.", "#### 3"), asked, teacher="t", think="T")
    assert share == 0.5
    assert [(s.role, s.text) for s in traces[0].segments] == [
        ("system", "T"), ("user", "capital of France?"), ("assistant", "it is\n#### Paris.")
    ]  # fmt: skip
    with pytest.raises(UserError, match="none of 2"):
        collect_thoughts(says("Paris", "2"), asked, teacher="t", think="T")


def test_a_resumed_run_collects_nothing_again_and_ends_bitwise(tmp_path, monkeypatch):
    calls, real = [], recipe.collect
    monkeypatch.setattr(recipe, "collect", lambda *args, **how: calls.append(1) or real(*args, **how))
    assert_resumes("agent-distillation", tmp_path, 2, SMALL)
    assert len(calls) == 2  # once for the straight run, once for the killed one
