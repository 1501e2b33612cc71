"""Traces: masks by role under two kinds of template, files that come back as they were, and broken ones named by line."""

import json

import pytest
import torch

from stillroom.core.errors import UserError
from stillroom.lm.traces import Segment, Trace, collate, deduplicate, per_prompt, read, render, tokenize, write
from stillroom.losses.tokens import IGNORE

CHAT = [
    {"role": "system", "content": "be"},
    {"role": "user", "content": "1+1="},
    {"role": "assistant", "content": "dig 1+1"},
    {"role": "user", "content": "2"},
    {"role": "assistant", "content": "2"},
]


def trained_text(tokenizer, labels):
    return tokenizer.decode([i for i in labels if i != IGNORE])


def test_every_assistant_span_with_its_end_is_trained_and_nothing_else(tokenizer):
    ids, labels = tokenize(tokenizer, Trace.of(CHAT))
    assert tokenizer.decode(ids) == render(tokenizer, CHAT)
    assert trained_text(tokenizer, labels) == "dig 1+1<|end|>2<|end|>"
    last_only = [{**m, "trained": i == 4} for i, m in enumerate(CHAT)]
    assert trained_text(tokenizer, tokenize(tokenizer, Trace.of(last_only))[1]) == "2<|end|>"


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETS = "{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}"


@pytest.fixture
def bytes_tokenizer():
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|im_start|>", "<|im_end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(["assistant user system dig 1+1", "naïve über"], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", chat_template=CHATML)


def test_masks_of_a_transformers_chat_template(bytes_tokenizer):
    chat = [*CHAT[:2], {"role": "assistant", "content": "naïve über"}, *CHAT[3:]]
    ids, labels = tokenize(bytes_tokenizer, Trace.of(chat))
    assert bytes_tokenizer.decode(ids) == render(bytes_tokenizer, chat)
    assert trained_text(bytes_tokenizer, labels) == "naïve über<|im_end|>2<|im_end|>"


def test_templates_that_are_missing_or_rewrite_earlier_turns(bytes_tokenizer):
    bytes_tokenizer.chat_template = FORGETS
    with pytest.raises(UserError, match="message 3 differently"):
        tokenize(bytes_tokenizer, Trace.of(CHAT))
    bytes_tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        tokenize(bytes_tokenizer, Trace.of(CHAT))


def test_only_assistants_are_trained(tokenizer):
    with pytest.raises(UserError, match="message 1 is the user"):
        tokenize(tokenizer, Trace((Segment("user", "a", True),)))


def test_files_come_back_and_read_as_plain_chats(tmp_path):
    traces = [Trace.of(CHAT, teacher="big", correct=True), Trace.of([{**CHAT[0], "trained": False}, {**CHAT[2], "trained": False}])]
    write(tmp_path / "t.jsonl", traces)
    assert list(read(tmp_path / "t.jsonl")) == traces
    plain = json.loads((tmp_path / "t.jsonl").read_text().splitlines()[0])["messages"]
    assert [{"role": m["role"], "content": m["content"]} for m in plain] == CHAT == traces[0].messages()
    parts = {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}
    (tmp_path / "agent.jsonl").write_text(json.dumps(parts) + "\n\n")
    assert list(read(tmp_path / "agent.jsonl")) == [Trace((Segment("assistant", "ab", True),))]


@pytest.mark.parametrize(("line", "what"), [("{oops", "is not JSON"), ('{"text": 1}', "not a conversation"), ("[3]", "not a conversation")])
def test_a_broken_line_is_named(tmp_path, line, what):
    (tmp_path / "t.jsonl").write_text(Trace.of(CHAT).line() + "\n" + line + "\n")
    with pytest.raises(UserError, match=f"t.jsonl, line 2 .*{what}"):
        list(read(tmp_path / "t.jsonl"))


def test_datasets_reads_the_file(tmp_path):
    datasets = pytest.importorskip("datasets")
    write(tmp_path / "t.jsonl", [Trace.of(CHAT, teacher="big")])
    row = datasets.load_dataset("json", data_files=str(tmp_path / "t.jsonl"), cache_dir=str(tmp_path / "cache"))["train"][0]
    assert Trace.of(row["messages"], **row["source"]) == Trace.of(CHAT, teacher="big")


def test_selection_keeps_one_of_each_and_does_not_favour_the_first():
    traces = [Trace((Segment("user", "q", False), Segment("assistant", str(i % 10), True))) for i in range(20)]
    unique = deduplicate(traces)
    assert unique == traces[:10]
    first = [per_prompt(unique, 1, lambda t: t.segments[0].text, torch.Generator().manual_seed(s))[0].segments[1].text for s in range(60)]
    assert len(set(first)) == 10


def test_padding_is_masked_by_place_even_when_it_is_the_end_token(tokenizer):
    rows = [tokenize(tokenizer, Trace.of(CHAT[1:3])), tokenize(tokenizer, Trace.of(CHAT))]
    ids, labels, mask = collate(rows, pad=tokenizer.eos_token_id)
    assert trained_text(tokenizer, labels[0].tolist()) == "dig 1+1<|end|>"
    assert mask.sum(-1).tolist() == [len(rows[0][0]), len(rows[1][0])]
    assert ids.shape == labels.shape
    with pytest.raises(UserError, match="context of 5"):
        collate(rows, context=5)
