"""Agent distillation: every kind of lesson end to end, the world's own answers, and the path of real models."""

import json

import pytest
import torch

from stillroom.catalogue import cards
from stillroom.catalogue.execute import execute
from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.core.store import Store
from stillroom.data.entities import ALPHABET, SYMBOLS, by_digits, make_world
from stillroom.lm.agent import Workbench, rollout
from stillroom.lm.sandbox import Sandbox
from stillroom.lm.tokenizer import Characters
from stillroom.lm.traces import Trace, tokenize
from stillroom.recipes.agents import agent_distillation as recipe


@pytest.fixture(scope="module", autouse=True)
def _isolated():
    try:
        with Sandbox() as box:
            box.run("1")
    except UserError as wrong:
        pytest.skip(str(wrong))


@pytest.mark.parametrize(
    "arm", ["cot, 3x steps, 8 votes", "agent", "cot+facts, 3x steps, 8 votes", "early, observations trained", "early, self-consistent"]
)
def test_arms_end_to_end(tmp_path, arm):
    config = cards.config_of(recipe, arm, recipe.Config(trajectories=20, tests=4, width=16, batch_size=4))
    with Run(tmp_path, 0, store=Store(tmp_path / "store")) as run:
        metrics = execute("agent-distillation", config.__class__(**{**config.__dict__, "steps": 2}), run, arm=arm)["metrics"]
    assert {"accuracy", "unseen", "ood"} <= metrics.keys()


def test_the_worlds_teacher_is_scripted(tmp_path):
    with Run(tmp_path, 0, store=Store(tmp_path / "store")) as run, pytest.raises(UserError, match="needs real questions"):
        recipe.main(recipe.Config(teacher="hf:some/model", trajectories=4), run)


def test_the_scripted_teacher_has_no_first_thought(tmp_path):
    with Run(tmp_path, 0, store=Store(tmp_path / "store")) as run, pytest.raises(UserError, match="--teacher learned"):
        recipe.main(recipe.Config(first_thought=True, trajectories=4), run)


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
    assert recipe.ask(str(tmp_path / "q.jsonl")) == [("1+1?", "2")]


def test_real_questions_are_collected_with_first_thoughts_and_filtered(tmp_path, monkeypatch):
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"question": f"{i}+1?", "answer": f"#### {i + 1}"}) + "\n" for i in (1, 2)))
    heard = []

    def served(cfg, run):
        def policy(conversations, openings, samples):
            heard.extend(openings)
            thinks = conversations[0][0]["content"] == recipe.COT_SYSTEM
            text = "add one\n\n1+1=2" if thinks else "Code:\n```py\nfinal_answer(2)\n```"
            return [[first + text] for first in openings]

        return policy

    monkeypatch.setattr(recipe, "served", served)
    config = recipe.Config(questions=str(tmp_path / "q.jsonl"), teacher="openai:http://localhost/v1#m", first_thought=True, student="hf:x")
    with Run(tmp_path / "run", 0, store=Store(tmp_path / "store")) as run, Sandbox({"final_answer": lambda value: value}) as box:
        asked = recipe.ask(config.questions)
        policy = recipe.served(config, run)
        how = {"act": recipe.SYSTEM, "think": recipe.COT_SYSTEM, "system": recipe.SYSTEM}
        traces, success = recipe.collect(config, policy, asked, Workbench(box), **how)
    assert success == 0.5
    assert heard == ["", ""] + ["Thought: add one\n\n"] * 2
    assert traces[0].segments[0].text == recipe.SYSTEM
    assert traces[0].segments[-1].text.startswith("Thought: add one\n\nCode:")


def test_real_questions_need_a_real_student(tmp_path):
    with Run(tmp_path, 0, store=Store(tmp_path / "store")) as run, pytest.raises(UserError, match="--student"):
        recipe.main(recipe.Config(questions="q.jsonl"), run)
