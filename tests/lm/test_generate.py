"""Sampling: batched equals one by one, log-probabilities are the sampling policy's, and what ends a sequence ends it."""

import pytest
import torch

from stillroom.core.errors import UserError
from stillroom.lm.generate import generate, reply

PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10, 11]]


@pytest.mark.parametrize("which", ["model", "llama"])
def test_greedy_batch_equals_decoding_by_full_forward(tokenizer, which, request):
    model = request.getfixturevalue(which)
    model.train()
    out = generate(model, PROMPTS, tokenizer, max_new_tokens=12, temperature=0)
    assert model.training
    model.eval()
    for prompt, (completion,) in zip(PROMPTS, out):
        ids = list(prompt)
        for word, log_prob in zip(completion.tokens, completion.log_probs):
            log_probs = model(torch.tensor([ids])).logits[0, -1, : len(tokenizer)].log_softmax(-1)
            assert word == log_probs.argmax()
            assert log_prob == pytest.approx(log_probs.max().item(), abs=1e-4)
            ids.append(word)
        assert completion.finished == (completion.tokens[-1] == tokenizer.eos_token_id)
        assert completion.finished or len(completion.tokens) == 12


def test_log_probs_are_at_the_sampling_temperature(model, tokenizer):
    groups = generate(model, PROMPTS, tokenizer, max_new_tokens=3, temperature=2.0, samples=4, generator=torch.Generator().manual_seed(0))
    assert [len(g) for g in groups] == [4, 4, 4]
    for prompt, group in zip(PROMPTS, groups):
        for out in group:
            ids = torch.tensor([prompt + out.tokens])
            log_probs = (model(ids).logits / 2).log_softmax(-1)[0, len(prompt) - 1 : -1]
            want = log_probs.gather(-1, torch.tensor(out.tokens)[:, None]).squeeze(-1)
            torch.testing.assert_close(torch.tensor(out.log_probs), want.detach(), atol=1e-4, rtol=0)


def test_top_p_draws_from_the_nucleus_only(model, tokenizer):
    model.head.weight.data *= 4
    probs = model(torch.tensor([[3]])).logits[0, -1].softmax(-1).sort(descending=True)
    nucleus = set(probs.indices[: int((probs.values.cumsum(-1) < 0.6).sum()) + 1].tolist())
    drawn = generate(model, [[3]], tokenizer, max_new_tokens=1, top_p=0.6, samples=300, generator=torch.Generator().manual_seed(0))[0]
    assert {out.tokens[0] for out in drawn} == nucleus


class Scripted(torch.nn.Module):
    """Says one fixed text whatever it is asked."""

    def __init__(self, tokenizer, text):
        super().__init__()
        self.ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
        self.words, self.said = len(tokenizer), torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, attention_mask, position_ids, past_key_values, use_cache):
        step = past_key_values.step if past_key_values else 0
        logits = torch.nn.functional.one_hot(torch.full(input_ids.shape, self.ids[step]), self.words).float() * 50
        return type("Out", (), {"logits": logits, "past_key_values": type("Past", (), {"step": step + 1})()})


def test_stop_strings_end_the_text_and_openings_begin_it(tokenizer):
    model = Scripted(tokenizer, "abc\n#d")
    (out,) = generate(model, [[3]], tokenizer, max_new_tokens=20, stop=["\n#"])[0]
    assert (out.text, out.finished, len(out.tokens)) == ("abc", True, 5)
    chat = [{"role": "user", "content": "a"}]
    (out,) = reply(model, tokenizer, [chat], opening=["hij"], max_new_tokens=20)[0]
    assert out.text == "hijabc\n#d"
    assert out.tokens[-1] == tokenizer.eos_token_id


def test_a_prompt_without_room_is_refused(llama, tokenizer):
    with pytest.raises(UserError, match="context of 64"):
        generate(llama, [[3] * 60], tokenizer, max_new_tokens=10)
    with pytest.raises(UserError, match="empty prompt"):
        generate(llama, [[]], tokenizer, max_new_tokens=10)
