"""Agent distillation: every kind of lesson end to end, the world's own answers, and the path of real models."""

import json

import pytest
import torch

from stillroom import catalogue
from stillroom.data.entities import ALPHABET, SYMBOLS, make_world
from stillroom.errors import UserError
from stillroom.lm.agent import Workbench, rollout
from stillroom.lm.sandbox import Sandbox
from stillroom.lm.tokenizer import Characters
from stillroom.lm.traces import Trace, tokenize
from stillroom.recipes.agents import agent_distillation as recipe
from stillroom.run import Run
from stillroom.store import Store


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
    config = catalogue.config_of(recipe, arm, recipe.Config(trajectories=20, tests=4, width=16, batch_size=4))
    with Run(tmp_path, 0, store=Store(tmp_path / "store")) as run:
        metrics = catalogue.execute("agent-distillation", config.__class__(**{**config.__dict__, "steps": 2}), run, arm=arm)["metrics"]
    assert {"accuracy", "unseen", "ood"} <= metrics.keys()


def test_the_worlds_teacher_is_scripted(tmp_path):
    with Run(tmp_path, 0, store=Store(tmp_path / "store")) as run, pytest.raises(UserError, match="needs real questions"):
        recipe.main(recipe.Config(teacher="hf:some/model", trajectories=4), run)


def test_scripted_trajectories_are_right_by_pythons_own_arithmetic():
    world = make_world(3)
    questions = [*world.questions(30, "a"), *world.questions(30, "a", unseen=True)]
    with Sandbox({"look": world.facts.__getitem__, "final_answer": lambda value: value}) as box:
        episodes = rollout(recipe.scripted(questions), [q.text() for q in questions], Workbench(box))
    for question, episode in zip(questions, episodes):
        x, y = world.facts[question.a], world.facts[question.b]
        assert int(episode.answer) == eval(f"{x}{question.op}{y}{question.op2}{question.constant}")
        assert question.thought(world.facts).endswith(f"#### {episode.answer}")
        assert recipe.correct(question, world, episode)


def test_entities_asked_out_of_domain_never_occur_in_training():
    world = make_world(0)
    train = {name for q in world.questions(3000, "train") for name in (q.a, q.b)}
    unseen = {name for q in world.questions(500, "test", unseen=True) for name in (q.a, q.b)}
    assert len(unseen) > 100
    assert not train & unseen


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
        traces, metrics = recipe.collect(config, run, Workbench(box))
    assert metrics == {"teacher_success": 0.5}
    assert heard == ["", ""] + ["Thought: add one\n\n"] * 2
    assert traces[0].segments[0].text == recipe.SYSTEM
    assert traces[0].segments[-1].text.startswith("Thought: add one\n\nCode:")


def test_real_questions_need_a_real_student(tmp_path):
    with Run(tmp_path, 0, store=Store(tmp_path / "store")) as run, pytest.raises(UserError, match="--student"):
        recipe.main(recipe.Config(questions="q.jsonl"), run)
