"""The small decoder: padding on either side, keys and values, all hidden states, embeddings for ids, and looking both ways."""

import pytest
import torch

from stillroom.core.errors import UserError
from stillroom.nets.decoder import Attention, Decoder, GateOptions, gated_hidden, rotary

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])


def decoder(**how):
    torch.manual_seed(0)
    net = Decoder(20, 16, 2, 2, **how).eval()
    for p in net.parameters():
        p.data *= 5  # far from flat
    return net


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_on_either_side_changes_nothing(side, causal):
    net = decoder(kv_heads=1, gate=GateOptions(), qk_norm=True, channels=4, causal=causal)
    empty, mask = torch.zeros(1, 3, dtype=torch.long), torch.tensor([[0] * 3 + [1] * 7])
    ids, inside = torch.cat([empty, IDS], 1), slice(3, None)
    if side == "right":
        ids, mask, inside = torch.cat([IDS, empty], 1), mask.flip(1), slice(0, 7)
    torch.testing.assert_close(net(ids, attention_mask=mask).logits[:, inside], net(IDS).logits)


def test_keys_and_values_of_left_padded_input_go_on_as_the_whole_would():
    net = decoder(kv_heads=1)
    ids, mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS], 1), torch.tensor([[0] * 3 + [1] * 7])
    first = net(ids[:, :6], attention_mask=mask[:, :6], use_cache=True)
    rest = net(ids[:, 6:], attention_mask=mask, past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits[:, 3:], rest], 1), net(IDS).logits)
    assert net(IDS, logits_to_keep=2).logits.shape == (1, 2, 20)


def test_causal_or_not():
    other = IDS.clone()
    other[0, -1] = 7
    for causal in (True, False):
        net = decoder(causal=causal)
        moved = (net(IDS).logits - net(other).logits).abs().amax(-1)[0, :-1]
        assert bool((moved == 0).all()) == causal
    with pytest.raises(ValueError, match="not causal"):
        decoder(causal=False)(IDS, use_cache=True)


def test_weights_are_the_attention_that_is_used():
    torch.manual_seed(0)
    x, turn = torch.randn(2, 5, 16), rotary(torch.arange(5).expand(2, 5), 4, 100.0)
    mask = torch.rand(2, 1, 5, 5) < 0.5
    mask |= torch.eye(5, dtype=torch.bool)
    for causal, given in ((True, None), (False, None), (True, mask)):
        net = Attention(16, 4, causal=causal)
        values = net.heads_of(x, turn)[2]
        mixed = net.weights(x, turn, given) @ values
        torch.testing.assert_close(net(x, turn, given), net.o(mixed.transpose(1, 2).flatten(2)))


def test_all_hidden_states_and_embeddings_in_place_of_ids():
    net = decoder()
    out = net(IDS, output_hidden_states=True)
    embedded = net.base_model.embedding(IDS)
    assert len(out.hidden_states) == 3
    torch.testing.assert_close(out.hidden_states[0], embedded)
    torch.testing.assert_close(net.head(out.hidden_states[-1]), out.logits)
    middle = net.base_model.blocks[0](embedded, rotary(torch.arange(7)[None], 8, 10_000.0))
    torch.testing.assert_close(out.hidden_states[1], middle)
    torch.testing.assert_close(net(inputs_embeds=embedded).logits, out.logits)
    assert len(net(IDS).hidden_states) == 1
    for wrong in ({}, {"input_ids": IDS, "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="one of them"):
            net(**wrong)


@pytest.mark.parametrize("position", ["output", "value", "key", "query", "projected"])
@pytest.mark.parametrize("granularity", ["elementwise", "headwise"])
@pytest.mark.parametrize("shape", [{}, {"kv_heads": 2}, {"kv_heads": 1, "channels": 8}])
def test_a_gated_net_has_the_parameters_of_an_ungated_one(position, granularity, shape):
    gate = GateOptions(position, granularity)
    count = lambda net: sum(p.numel() for p in net.parameters())
    hidden = gated_hidden(64, 256, 4, gate, **shape)
    gap = count(Decoder(50, 64, 2, 4, hidden=hidden, gate=gate, **shape)) - count(Decoder(50, 64, 2, 4, hidden=256, **shape))
    assert abs(gap) <= 2 * 64  # half a hidden unit of each block
    assert gap == 0 or granularity == "headwise"


def test_a_gate_that_sees_nothing_costs_a_few_numbers_and_one_that_is_too_dear_is_refused():
    assert gated_hidden(64, 256, 4, GateOptions(input_dependent=False)) == 256
    with pytest.raises(UserError, match="raise --hidden"):
        gated_hidden(64, 32, 4, GateOptions())
