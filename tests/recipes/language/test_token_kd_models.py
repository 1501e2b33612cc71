"""Token KD with models, tokenizers and files as a hub gives them, and the mistakes that users make."""

import json

import pytest
import torch

from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.core.store import Store
from stillroom.data.sequences import windows
from stillroom.lm.crosstok import Read
from stillroom.lm.teachers import load_causal
from stillroom.lm.text import chats, read_rows, read_texts
from stillroom.recipes.language import token_kd as recipe

SMALL = {"teacher_steps": 3, "steps": 3, "limit": 12, "test_limit": 6, "batch_size": 4, "length": 12}


@pytest.fixture
def real(tmp_path):
    """A four-layer Llama and its tokenizer in a folder, as a hub would give them."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    torch.manual_seed(0)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(["how many apples are two and two"], trainer)
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>",
        chat_template="{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
    )  # fmt: skip
    config = transformers.LlamaConfig(
        vocab_size=len(words) + 8, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64, eos_token_id=0, bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "teacher")
    words.save_pretrained(tmp_path / "teacher")
    rows = [{"question": f"{i} and {i}?", "answer": f"it is {2 * i}"} for i in range(30)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("mode", ["word", "sequence", "on-policy"])
def test_a_transformers_teacher_gives_a_shallower_student_that_transformers_loads(real, mode):
    from transformers import AutoModelForCausalLM

    config = recipe.Config(
        **{**SMALL, "length": 40}, data=str(real / "qa.jsonl"), teacher=f"hf:{real / 'teacher'}", student="layers:2", mode=mode,
        max_new_tokens=4, **({"own_text": 1.0} if mode == "on-policy" else {"ce_weight": 0.5} if mode == "word" else {}),
    )  # fmt: skip
    with Run(real / "run", 0, store=Store(real / "store")) as run:
        metrics = recipe.main(config, run)
    assert metrics["kl"] > 0
    student = AutoModelForCausalLM.from_pretrained(real / "run" / "student")
    assert student.config.num_hidden_layers == 2
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_bad_data_is_explained(tmp_path, real, tokenizer):
    broken = tmp_path / "b.jsonl"
    broken.write_text('{"question": "a", "answer": "b"}\n{"question": "a"}\n')
    with pytest.raises(UserError, match=r"b.jsonl, line 2 is not"):
        chats(str(broken))
    with pytest.raises(UserError, match="no such file"):
        read_rows(str(tmp_path / "none.txt"), tokenizer, 8)
    with pytest.raises(UserError, match="fewer than one window"):
        windows([1, 2], 8)
    _, words = load_causal(f"hf:{real / 'teacher'}")
    with pytest.raises(UserError, match="no conversation has a trained token"):
        read_rows(str(real / "qa.jsonl"), words, 4)
    with Run(tmp_path / "run", 0, store=Store(tmp_path / "store")) as run:
        config = recipe.Config(**{**SMALL, "length": 100}, data=str(real / "teacher" / "tokenizer.json"), teacher=f"hf:{real / 'teacher'}")
        with pytest.raises(UserError, match="exceed the teacher's context of 64"):
            recipe.main(config, run)


@pytest.fixture
def foreign(real):
    """A two-layer Llama whose tokenizer has other merges, other special words and another chat template."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    torch.manual_seed(1)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(["it is it is 12 and 14 and", "it is"], trainer)
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", bos_token="<s>",
        chat_template="<s>{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )  # fmt: skip
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=96, eos_token_id=1, bos_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(real / "foreign")
    words.save_pretrained(real / "foreign")
    (real / "text.txt").write_text("it is naïve, and 日本 is über 🙂 done. " * 20, encoding="utf-8")
    return real


@pytest.mark.parametrize("data", ["qa.jsonl", "text.txt"])
@pytest.mark.parametrize(("signal", "ce_weight"), [("byte-groups", 0.0), ("uld", 1.0)])
def test_two_saved_models_with_different_tokenizers(foreign, data, signal, ce_weight, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = {name: load_causal(f"hf:{foreign / name}")[1] for name in ("teacher", "foreign")}
    fed = {"teacher": [], "foreign": []}  # the texts that each model was given

    def watched(spec, **kwargs):
        net, own = load_causal(spec, **kwargs)
        name = spec.rpartition("/")[2]
        net.register_forward_pre_hook(lambda _, __, given: fed[name].extend(given["input_ids"].tolist()), with_kwargs=True)
        net.model.register_forward_pre_hook(lambda _, __, given: fed[name].extend(given["input_ids"].tolist()), with_kwargs=True)
        return net, own

    monkeypatch.setattr(recipe, "load_causal", watched)
    config = recipe.Config(
        **{**SMALL, "length": 40}, data=str(foreign / data), teacher=f"hf:{foreign / 'teacher'}", student=f"hf:{foreign / 'foreign'}",
        signal=signal, ce_weight=ce_weight,
    )  # fmt: skip
    with Run(foreign / "run", 0, store=Store(foreign / "store")) as run:
        metrics = recipe.main(config, run)
    assert metrics["group_kl"] > 0
    texts = read_texts(str(foreign / data), words["foreign"], 40)
    for name, rows in fed.items():
        own = [Read.of(words[name], text).ids[: {"teacher": 64, "foreign": 40}[name]] for text in texts]
        assert rows
        for row in rows:
            assert any(row == ids + [0] * (len(row) - len(ids)) for ids in own)
    student, own = (kind.from_pretrained(foreign / "run" / "student") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert student.config.vocab_size == len(own)


def test_pieces_of_a_text_are_whole_characters_and_lose_only_the_ragged_end(foreign):
    own, text = load_causal(f"hf:{foreign / 'foreign'}")[1], (foreign / "text.txt").read_text(encoding="utf-8")
    pieces = read_texts(str(foreign / "text.txt"), own, 7)
    assert text.startswith("".join(pieces))
    assert len(own.encode(text[len("".join(pieces)) :], add_special_tokens=False)) <= 8
    assert read_texts(str(foreign / "qa.jsonl"), own, 7)[0].segments[1].text == "it is 0"
