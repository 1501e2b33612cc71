"""Folders of language models that are damaged or mean harm: a message that names the file, or a model, and nothing else."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from stillroom.core.errors import UserError
from stillroom.lm.generate import generate
from stillroom.lm.teachers import load_causal, save_causal
from stillroom.lm.tokenizer import pretrained_tokenizer
from stillroom.lm.traces import render
from stillroom.nets.checked import INDEX
from stillroom.nets.decoder import Decoder, GateOptions
from tests.damage import Trap, rewrite, survives

IDS = torch.tensor([[2, 3, 4, 5]])


@pytest.fixture
def own(tmp_path, tokenizer) -> Path:
    net = Decoder(len(tokenizer), 16, 2, 2, kv_heads=1, gate=GateOptions())
    (tmp_path / "own").mkdir()
    save_causal(net, tokenizer, tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture
def words():
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?", eos_token="b")


@pytest.fixture
def theirs(tmp_path, llama, words) -> Path:
    save_causal(llama, words, tmp_path / "theirs")
    return tmp_path / "theirs"


def spec_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["stillroom"]


def pipe_in_place_of(file: Path) -> None:
    """Whoever opens it to read waits for ever."""
    file.unlink(missing_ok=True)
    os.mkfifo(file)


# --- our own ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocabulary", 0), ("vocabulary", "26"), ("width", 2**31), ("width", None), ("layers", 10**9), ("layers", True), ("heads", -1),
        ("kv_heads", 0), ("kv_heads", 1.5), ("hidden", "x"), ("hidden", 2**24), ("channels", [8]), ("rope_base", 0), ("rope_base", None),
        ("rope_base", float("nan")), ("tied", 1), ("qk_norm", "no"), ("causal", []), ("gate", 3), ("gate", {"position": "nowhere"}),
        ("gate", {"position": ["key"]}), ("gate", {"shared": "x"}), ("gate", {"more": 1}), ("more", 1),
    ],
)  # fmt: skip
def test_a_field_of_a_decoder_is_named(field, value, own):
    spec = spec_of(own)
    rewrite(own / "config.json", stillroom=spec | {"decoder": spec["decoder"] | {field: value}})
    with pytest.raises(UserError, match=rf"config\.json: stillroom\.decoder.*{'parameters' if value == 2**24 else field}"):
        load_causal(f"run:{own}")


@pytest.mark.parametrize("changes", [{"heads": 3}, {"heads": 16}, {"kv_heads": 3}, {"width": 2**20, "vocabulary": 2**20}])
def test_sizes_that_fit_no_decoder_are_refused(changes, own):
    spec = spec_of(own)
    rewrite(own / "config.json", stillroom=spec | {"decoder": spec["decoder"] | changes})
    with pytest.raises(UserError, match=r"config\.json: stillroom\.decoder|model\.safetensors could not be read"):
        load_causal(f"run:{own}")


@pytest.mark.parametrize(
    ("words", "what"),
    [(3, "list of texts"), (["a", "a"], "list of texts"), (["a", ""], "texts"), (["a"], "has 1"), (list(map(str, range(99))), "has 99")],
)
def test_words_are_texts_and_no_more_than_the_vocabulary_has(words, what, own):
    rewrite(own / "config.json", stillroom=spec_of(own) | {"words": words})
    with pytest.raises(UserError, match=rf"config\.json: stillroom\.words.*{what}"):
        load_causal(f"run:{own}")


def test_what_else_a_config_may_hold(own):
    for stillroom in (3, None, [], {}, {"decoder": 1}, {"name": "mlp-8", "classes": 10}):
        rewrite(own / "config.json", stillroom=stillroom)
        with pytest.raises(UserError, match=r"config\.json: stillroom"):
            load_causal(f"run:{own}")
    for text in ("", "{", "[]", "\x00"):
        (own / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json"):
            load_causal(f"run:{own}")


def test_weights_of_a_decoder_are_whole(own, tokenizer):
    from safetensors.torch import load_file, save_file

    weights = own / "model.safetensors"
    good = load_file(weights)
    for name in ("base_model.embedding.weight", "base_model.blocks.0.up.weight"):
        save_file({k: v for k, v in good.items() if k != name}, weights)
        with pytest.raises(UserError, match=r"model\.safetensors could not be read"):
            load_causal(f"run:{own}")
    weights.write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match=r"model\.safetensors could not be read"):
        load_causal(f"run:{own}")
    weights.rename(own / "other.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors is not a file"):
        load_causal(f"run:{own}")
    (own / "other.safetensors").unlink()
    (own / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle"):
        load_causal(f"run:{own}")
    assert not Trap.opened


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer"])
def test_a_pipe_in_our_own_folder_keeps_nobody_waiting(name, own):
    rewrite(own / "config.json", stillroom=spec_of(own) | {"words": None})
    pipe_in_place_of(own / name)
    with pytest.raises(UserError, match="no student" if name == "config.json" else name):
        load_causal(f"run:{own}")


def test_mutants_of_our_own_config_are_refused_or_load(own):
    file = own / "config.json"
    load = lambda: load_causal(f"run:{own}")[0](IDS)
    assert survives(load, file, file.read_text(), 50) > 25
    flat = {"stillroom": spec_of(own)["decoder"]}  # its fields at a depth that mutants reach
    seen = file.read_text()

    def nested():
        inner = json.loads(file.read_text()).get("stillroom")
        file.write_text(json.dumps({"stillroom": {"decoder": inner, "words": json.loads(seen)["stillroom"]["words"]}}))
        load()

    assert survives(nested, file, json.dumps(flat), 80) > 40


# --- transformers' ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "x"), ("num_hidden_layers", 10**9), ("num_attention_heads", 0), ("vocab_size", 10**12), ("rms_norm_eps", None),
        ("hidden_act", 3), ("transformers_weights", "../a.safetensors"), ("transformers_weights", "adapter_model.bin"),
        ("attn_implementation", "somebody/kernel"),
    ],
)  # fmt: skip
def test_a_field_of_a_config_is_named(field, value, theirs):
    rewrite(theirs / "config.json", **{field: value})
    for kind in ("hf", "run"):
        with pytest.raises(UserError, match=rf"(?s)config\.json.*{field}"):
            load_causal(f"{kind}:{theirs}")


def test_gpt2s_own_name_for_layers_is_a_number_of_layers_too(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1000000000}')
    with pytest.raises(UserError, match=r"config\.json: n_layer is 1000000000"):
        load_causal(f"hf:{tmp_path}")


def test_a_model_larger_than_its_weights_is_refused_before_it_is_made(theirs):
    rewrite(theirs / "config.json", intermediate_size=2**20)
    with pytest.raises(UserError, match=r"config\.json describes a network of \d\.\de\+\d+ parameters"):
        load_causal(f"hf:{theirs}")


def test_weights_that_lack_a_layer_are_refused(theirs):
    rewrite(theirs / "config.json", num_hidden_layers=3)
    with pytest.raises(UserError, match=r"its weights lack model\.layers\.2"):
        load_causal(f"hf:{theirs}")


@pytest.mark.parametrize("name", ["../outside.safetensors", "weights.bin", "gone.safetensors", 3])
def test_an_index_names_only_safetensors_of_its_own_folder(name, theirs, llama):
    (theirs / "model.safetensors").rename(theirs.parent / "outside.safetensors")
    llama.save_pretrained(theirs, max_shard_size="4KB")
    load_causal(f"hf:{theirs}")
    (theirs / "weights.bin").write_bytes(pickle.dumps(Trap()))
    index = theirs / f"model{INDEX}"
    rewrite(index, weight_map=json.loads(index.read_text())["weight_map"] | {"lm_head.weight": name})
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: weight_map\.lm_head\.weight"):
        load_causal(f"hf:{theirs}")
    assert not Trap.opened


def test_pickles_stay_closed(theirs):
    (theirs / "model.safetensors").unlink()
    (theirs / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle"):
        load_causal(f"hf:{theirs}")
    assert not Trap.opened


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_pipe_or_a_missing_file_is_named(name, theirs):
    pipe_in_place_of(theirs / name)
    with pytest.raises(UserError, match=name if name != "model.safetensors" else "neither a file nor a folder"):
        load_causal(f"hf:{theirs}")
    (theirs / name).unlink()
    if name not in ("generation_config.json", "tokenizer_config.json"):
        with pytest.raises(UserError, match=f"{theirs}"):
            load_causal(f"hf:{theirs}")


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00", "[" * 5000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_files_that_hold_no_object_are_named(name, content, theirs):
    (theirs / name).write_text(content)
    with pytest.raises(UserError, match=name):
        load_causal(f"hf:{theirs}")


@pytest.mark.parametrize(("name", "cases"), [("config.json", 60), ("generation_config.json", 20)])
def test_mutants_of_a_models_files_are_refused_or_generate(name, cases, theirs):
    file = theirs / name

    def load():
        model, words = load_causal(f"hf:{theirs}")
        generate(model, [[0, 1]], words, max_new_tokens=2)

    assert survives(load, file, file.read_text(), cases) > 0


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_mutants_of_a_tokenizers_files_are_refused_or_load(name, theirs):
    file = theirs / name
    assert survives(lambda: pretrained_tokenizer(theirs), file, file.read_text(), 100) > 0


def test_a_chat_template_that_fails_is_said(words):
    words.chat_template = "{% for"
    with pytest.raises(UserError, match="chat template of the tokenizer"):
        render(words, [{"role": "user", "content": "a"}])
