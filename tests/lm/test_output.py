"""Output layers: the logits of real families with biases, caps and scales, the loss through them, and what is refused."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from stillroom.core.errors import UserError
from stillroom.data.sequences import Rows
from stillroom.lm.cache import Capture, capture
from stillroom.lm.chunked import chunked_loss, token_log_probs
from stillroom.lm.output import OutputLayer, head, require_head
from stillroom.lm.signals import Head
from stillroom.lm.teachers import load_causal
from stillroom.lm.text import states
from stillroom.losses.tokens import align, divergence

SMALL = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
GPTJ = {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "bos_token_id": None, "eos_token_id": 1}
FAMILIES = {
    "Llama": SMALL,
    "Gemma2": SMALL | {"head_dim": 8, "final_logit_softcapping": 3.0},
    "Granite": SMALL | {"logits_scaling": 4.0},
    "Cohere": SMALL | {"logit_scale": 0.25},
    "Phi": SMALL,
    "GPTJ": GPTJ,
}


def model_of(family, **changes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(FAMILIES[family] | changes))
    net = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    layer = net.get_output_embeddings()
    layer.weight.data *= 30  # far from flat, so that a cap bends
    if layer.bias is not None:
        layer.bias.data.normal_()
    return net


@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_output_layer_give_the_models_own_logits_and_gradients(family):
    net = model_of(family)
    require_head(net)
    rows = Rows.plain(torch.arange(2, 14).view(2, 6))
    logits = net(rows.ids).logits
    torch.testing.assert_close(head(net).logits(states(net, rows)), logits, atol=1e-4, rtol=1e-4)
    labels = rows.ids[:, 1:].flatten()
    want = cross_entropy(logits[:, :-1].flatten(0, 1), labels)
    hidden, _ = align(states(net, rows), rows.labels)
    got = chunked_loss(hidden, head(net), labels, ce_weight=1.0, rows=4)
    parameters = [p for p in net.parameters() if p.requires_grad]
    for ours, theirs in zip(*(torch.autograd.grad(x, parameters) for x in (got.loss, want)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("family", ["Gemma2", "Granite", "Phi"])
def test_a_teacher_of_such_a_family_is_kept_with_its_cap_scale_and_bias(family, tmp_path, tokenizer):
    net, ids = model_of(family, vocab_size=len(tokenizer)), [[2, 3, 4, 5, 6]]
    logits = net(torch.tensor(ids)).logits[0, :-1].detach()
    student = torch.randn_like(logits)
    for kind in ("states", "full"):
        signal = capture(tmp_path, net, tokenizer, ids, Capture(kind), progress=False).signal([0])
        torch.testing.assert_close(signal.divergence(student, "forward_kl", 1.0), divergence(logits, student), atol=2e-2, rtol=1e-2)


def test_heads_that_no_affine_map_with_a_cap_describes_are_refused(tmp_path):
    net = model_of("Llama")
    net.lm_head.register_forward_hook(lambda module, given, out: out + 0.1 * out**2)
    with pytest.raises(UserError, match="the teacher: the logits of LlamaForCausalLM are no affine function"):
        require_head(net, "the teacher")
    with pytest.raises(UserError, match="no output layer"):
        require_head(torch.nn.Linear(2, 2))


def test_a_model_is_compared_when_it_is_loaded(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    words = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    model_of("Gemma2").save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    load_causal(f"hf:{tmp_path}")
    # A library whose Gemma 2 forgot its cap would be another function than the one that its config promises.
    forward = transformers.Gemma2ForCausalLM.forward

    def uncapped(self, *args, **keywords):
        out = forward(self, *args, **keywords)
        out.logits = 3.0 * torch.atanh(out.logits / 3.0)
        return out

    monkeypatch.setattr(transformers.Gemma2ForCausalLM, "forward", uncapped)
    with pytest.raises(UserError, match="no affine function"):
        load_causal(f"hf:{tmp_path}")


def test_a_capped_loss_equals_the_naive_one_in_float64():
    torch.manual_seed(0)
    leaves = [torch.randn(7, 5), torch.randn(9, 5), torch.randn(9)]
    hidden, weight, bias = (x.double().requires_grad_() for x in leaves)
    layer, labels = OutputLayer(weight, bias, 0.5, 2.0), torch.arange(7)
    teacher = OutputLayer(torch.randn(9, 4).double(), None, 3.0, 4.0)
    seen = torch.randn(7, 4).double()
    logits = 2 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 2)
    wanted = 4 * torch.tanh(3 * (seen @ teacher.weight.T) / 4)
    p, log_q = wanted.softmax(-1), logits.log_softmax(-1)
    want = 0.3 * cross_entropy(logits, labels) + 0.7 * (p * (p.log() - log_q)).sum(-1).mean()
    got = chunked_loss(hidden, layer, labels, Head(seen, teacher), ce_weight=0.3, kd_weight=0.7, rows=3).loss
    torch.testing.assert_close(got, want)
    for ours, theirs in zip(*(torch.autograd.grad(x, (hidden, weight, bias)) for x in (got, want))):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(token_log_probs(hidden, layer, labels, rows=3), log_q.gather(-1, labels[:, None]).squeeze(-1))
