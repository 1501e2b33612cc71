"""Teachers by name: what is saved loads again, by Stillroom and by transformers, and what cannot be loaded is explained."""

import pytest
import torch

from stillroom.core.errors import UserError
from stillroom.lm.teachers import load_causal, save_causal
from stillroom.nets.decoder import Decoder, GateOptions

IDS = torch.tensor([[2, 3, 4, 5]])


@pytest.mark.parametrize("tied", [True, False])
def test_a_small_decoder_comes_back(tmp_path, tokenizer, tied):
    net = Decoder(len(tokenizer), 16, 2, 2, tied=tied, gate=GateOptions(granularity="headwise"))
    save_causal(net, tokenizer, tmp_path)
    again, words = load_causal(f"run:{tmp_path}")
    torch.testing.assert_close(again(IDS).logits, net(IDS).logits)
    assert words.words == tokenizer.words


def test_a_transformers_student_loads_without_stillroom(tmp_path, llama):
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    save_causal(llama, words, tmp_path)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, llama(IDS).logits)
    for spec in (f"hf:{tmp_path}", f"run:{tmp_path}"):
        again, tokenizer = load_causal(spec)
        torch.testing.assert_close(again(IDS).logits, llama(IDS).logits)
        assert tokenizer.get_vocab() == {"a": 0, "b": 1}


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("smollm", "names no causal model"),
        ("gguf:no_such_package", "neither a file nor"),
        ("run:nowhere", "no student"),
        ("hf:{tmp}/nowhere", "could not be loaded"),
    ],
)
def test_what_cannot_be_loaded_is_explained(tmp_path, spec, what):
    with pytest.raises(UserError, match=what):
        load_causal(spec.format(tmp=tmp_path))
