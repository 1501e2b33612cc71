"""Folders that PEFT saved: folded, they answer as PEFT's own; their base is checked as any model is, and nothing else is followed."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from stillroom.core.errors import UserError
from stillroom.lm.teachers import load_causal, save_causal
from stillroom.nets.pretrained import pretrained
from tests.damage import Trap, rewrite, survives

peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
IDS = torch.tensor([[2, 3, 4, 5]])
KINDS = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=16)),
}  # fmt: skip


def words():
    from tokenizers import Tokenizer, models

    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))


def adapted(place: Path, kind: str = "llama", **options) -> torch.Tensor:
    """Saves a base and an adapter of it under `place`; the logits of PEFT's own model."""
    torch.manual_seed(0)
    save_causal(KINDS[kind](), words(), place / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "base", trust_remote_code=False)
    net = peft.get_peft_model(base, peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": "all-linear"} | options))
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    net.save_pretrained(place / "adapter")
    return net.eval()(IDS).logits


@pytest.fixture
def adapter(tmp_path) -> Path:
    adapted(tmp_path)
    return tmp_path / "adapter"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"c_attn": 2, "q_proj": 2}}, {"modules_to_save": ["lm_head"]}]
)
def test_a_folded_adapter_answers_as_pefts_own(kind, options, tmp_path):
    logits = adapted(tmp_path, kind, **options)
    if kind == "gpt2" and "modules_to_save" in options:  # its head is the embedding, which PEFT leaves alone
        with pytest.raises(UserError, match="the embedding shares its weight with the output layer"):
            load_causal(f"hf:{tmp_path}/adapter")
        return
    for spec in ("hf:{}/adapter", "run:{}/adapter"):
        model, tokenizer = load_causal(spec.format(tmp_path))
        torch.testing.assert_close(model.eval()(IDS).logits, logits, rtol=1e-4, atol=1e-5)
        assert not hasattr(model, "peft_config")
        assert tokenizer.get_vocab() == {"a": 0, "?": 1}


def test_an_adapters_own_tokenizer_comes_first(adapter):
    from tokenizers import Tokenizer, models

    transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "own": 1}, unk_token="a"))).save_pretrained(
        adapter
    )
    assert load_causal(f"hf:{adapter}")[1].get_vocab() == {"a": 0, "own": 1}


# --- the base --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["/etc", "/gone/base", "../base", "a/b/c", "", "\0", "http://host/x", None, 3, ["x"], "~/base"])
def test_a_base_is_an_existing_folder_or_an_id(base, adapter, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty" / "..")
    rewrite(adapter / "adapter_config.json", base_model_name_or_path=base)
    with pytest.raises(UserError, match=r"/etc/config\.json" if base == "/etc" else r"adapter_config\.json: base_model_name_or_path"):
        load_causal(f"hf:{adapter}")


def test_a_name_that_could_be_a_folder_or_an_id_is_neither(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rewrite(adapter / "adapter_config.json", base_model_name_or_path="base")
    with pytest.raises(UserError, match=r"adapter_config\.json: .*write \./base for the folder"):
        load_causal(f"hf:{adapter}")
    rewrite(adapter / "adapter_config.json", base_model_name_or_path="./base")
    load_causal(f"hf:{adapter}")


def test_an_id_is_asked_of_the_hub(adapter, monkeypatch):
    asked = []
    monkeypatch.setattr("transformers.utils.find_adapter_config_file", lambda name: asked.append(name))
    monkeypatch.setattr("transformers.PreTrainedConfig.get_config_dict", lambda name: asked.append(name) or 1 / 0)
    rewrite(adapter / "adapter_config.json", base_model_name_or_path="org/base")
    monkeypatch.setattr("stillroom.lm.teachers.adapter_of", lambda name: adapter / "adapter_config.json")
    with pytest.raises(UserError, match="hf:org/base could not be loaded"):
        load_causal(f"hf:{adapter}")
    assert asked == ["org/base", "org/base"]


def test_a_base_is_checked_as_any_model_is(adapter, tmp_path):
    weights = tmp_path / "base" / "model.safetensors"
    weights.rename(tmp_path / "kept")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"base: pytorch_model\.bin is a pickle"):
        load_causal(f"hf:{adapter}")
    (tmp_path / "kept").rename(weights)
    rewrite(tmp_path / "base" / "config.json", num_hidden_layers=10**9)
    with pytest.raises(UserError, match=r"base/config\.json: num_hidden_layers"):
        load_causal(f"hf:{adapter}")
    assert not Trap.opened


def test_a_base_that_is_an_adapter_is_not_followed(adapter, tmp_path):
    rewrite(adapter / "adapter_config.json", base_model_name_or_path=str(adapter))
    with pytest.raises(UserError, match=r"adapter_config\.json says that .* is a PEFT adapter"):
        load_causal(f"hf:{adapter}")


def test_a_folder_with_model_and_adapter_is_refused_by_every_loader(adapter, tmp_path):
    (tmp_path / "base" / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    for load in (load_causal, lambda spec: pretrained(spec, "AutoModelForMaskedLM")):
        with pytest.raises(UserError, match=r"adapter_config\.json lies beside config\.json"):
            load(f"hf:{tmp_path}/base")


def test_a_students_adapter_names_its_base_wherever_it_is_read(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_causal("hf:base")
    save_causal(peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear")), tokenizer, tmp_path / "run" / "student")
    monkeypatch.chdir("/")
    load_causal(f"run:{tmp_path}/run")


def test_an_adapter_beside_a_gguf_file_is_not_followed(adapter):
    (adapter / "x.gguf").touch()
    with pytest.raises(UserError, match=r"adapter_config\.json lies beside x\.gguf"):
        load_causal(f"gguf:{adapter}/x.gguf")


# --- the adapter -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"), ("peft_type", None), ("use_dora", True), ("bias", "all"), ("alpha_pattern", {"q_proj": 3}),
        ("lora_alpha", "x"), ("lora_alpha", None), ("use_rslora", 3), ("layer_replication", [[0, 10**9]]), ("revision", "old"),
    ],
)  # fmt: skip
def test_what_is_no_plain_lora_is_refused(field, value, adapter):
    rewrite(adapter / "adapter_config.json", **{field: value})
    with pytest.raises(UserError, match=rf"adapter_config\.json.*({field}|adapter cannot be read)"):
        load_causal(f"hf:{adapter}")


def test_what_peft_would_import_or_open_is_not(adapter):
    """Its loader imports megatron_core by name, and opens the pickles that corda_config names."""
    rewrite(
        adapter / "adapter_config.json", megatron_config={}, megatron_core="antigravity", corda_config={"cache_file": "/dev/zero"},
        target_modules="(a+)+$",
    )  # fmt: skip
    load_causal(f"hf:{adapter}")


def test_weights_of_an_adapter_are_safetensors_and_fit(adapter, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = adapter / "adapter_model.safetensors"
    good = load_file(weights)
    first = next(name for name in good if "lora_A" in name)
    for damaged in (
        {k: v for k, v in good.items() if k != first},
        {k: v for k, v in good.items() if k != first.replace("lora_A", "lora_B")},
        good | {first: good[first][:, :-1].clone()},
        good | {first: good[first][:0].clone(), first.replace("lora_A", "lora_B"): torch.zeros(16, 0)},
        good
        | {"base_model.model.nowhere.lora_A.weight": good[first].clone(), "base_model.model.nowhere.lora_B.weight": good[first].clone()},
        good | {"base_model.model.lm_head.weight": torch.zeros(1)},
        good | {"base_model.model.gone.weight": torch.zeros(1)},
        good | {first.replace("lora_A", "lora_embedding_A"): torch.zeros(1)},
    ):
        save_file(damaged, weights)
        with pytest.raises(UserError, match=r"adapter_model\.safetensors could not be folded"):
            load_causal(f"hf:{adapter}")
    weights.unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"adapter_model\.bin is a pickle"):
        load_causal(f"hf:{adapter}")
    save_file(good, adapter / "other.safetensors")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is not a file"):
        load_causal(f"hf:{adapter}")
    os.mkfifo(weights)
    with pytest.raises(UserError, match="neither a file nor a folder"):
        load_causal(f"hf:{adapter}")
    assert not Trap.opened


def test_mutants_of_an_adapters_config_are_refused_or_load(adapter, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no mutant asks the hub
    file = adapter / "adapter_config.json"

    def load():
        try:
            load_causal(f"hf:{adapter}")
        except UserError as error:
            raise UserError(f"{error} {file}") from error  # a hub's ID is all that some can name

    assert 0 < survives(load, file, json.dumps(json.loads(file.read_text())), 40) < 40
