import pytest
import torch

from stillroom.lm.tokenizer import Characters
from stillroom.nets.decoder import Decoder


@pytest.fixture
def tokenizer():
    return Characters("abcdefghij0123456789 +=#\n")


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    return Decoder(len(tokenizer), width=16, layers=2, heads=2)


@pytest.fixture
def llama(tokenizer):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer) + 3, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)
