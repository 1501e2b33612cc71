"""Gates at every position against attention by hand, and other libraries' attention and weights."""

import pytest
import torch

from stillroom.core.errors import UserError
from stillroom.nets.decoder import Attention, GateOptions, rotary
from stillroom.nets.gated_weights import split_qwen3_next, split_reference

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
TURN = rotary(torch.arange(5).expand(2, 5), 8, 100.0)


def by_hand(net, gate_at):
    """Attention of grouped queries written out per head, with the gate applied by `gate_at(place, y, head)`."""
    out = []
    for h in range(net.heads):
        kv = h // (net.heads // net.kv_heads)
        rows, shared = slice(h * 8, h * 8 + 8), slice(kv * 8, kv * 8 + 8)
        q, k, v = gate_at("query", X @ net.q.weight[rows].T, h), gate_at("key", X @ net.k.weight[shared].T, kv), X @ net.v.weight[shared].T
        v = gate_at("value", v, kv)
        cos, sin = (t[:, 0] for t in TURN)
        half = lambda x: torch.cat([-x[..., 4:], x[..., :4]], -1)
        q, k = q * cos + half(q) * sin, k * cos + half(k) * sin
        scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        out.append(gate_at("output", scores.softmax(-1) @ v, h))
    return gate_at("projected", torch.cat(out, -1) @ net.o.weight.T, 0)


@pytest.mark.parametrize("position", ["output", "value", "key", "query", "projected"])
@pytest.mark.parametrize("granularity", ["elementwise", "headwise"])
def test_every_position_against_attention_by_hand(position, granularity):
    torch.manual_seed(0)
    net = Attention(16, 4, kv_heads=2, channels=8, gate=GateOptions(position, granularity))
    width = (16 if position == "projected" else 8) if granularity == "elementwise" else 1

    def gate_at(place, y, head):
        if place != position:
            return y
        return y * torch.sigmoid(X @ net.gate.linear.weight[head * width : (head + 1) * width].T)

    torch.testing.assert_close(net(X, TURN), by_hand(net, gate_at))


def test_variants_of_the_gate():
    torch.manual_seed(0)
    y = torch.randn(2, 5, 4, 8)
    net = lambda **how: Attention(16, 4, channels=8, gate=GateOptions(**how)).gate
    assert (net(activation="ns_sigmoid").scores(X) > 0.5).all()
    shared = net(granularity="headwise", shared=True)
    torch.testing.assert_close(shared.scores(X), shared.linear(X).sigmoid().mean(-1)[..., None, None])
    torch.testing.assert_close(net(input_dependent=False)(X, y), y / 2)
    added = net(combine="add", activation="silu")
    torch.testing.assert_close(added(X, y), y + torch.nn.functional.silu(added.linear(X).unflatten(-1, (4, 8))))


def test_decoder_is_causal_and_equals_transformers_attention():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        rope_theta=10_000.0, attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval().model.layers[0].self_attn
    ours = Attention(16, 4, kv_heads=2)
    for mine, name in ((ours.q, "q_proj"), (ours.k, "k_proj"), (ours.v, "v_proj"), (ours.o, "o_proj")):
        mine.weight.data = getattr(theirs, name).weight.data
    cos, sin = rotary(torch.arange(5).expand(2, 5), 4, 10_000.0)
    mask = torch.zeros(1, 1, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    want, weights = theirs(X, position_embeddings=(cos[:, 0], sin[:, 0]), attention_mask=mask)
    torch.testing.assert_close(ours(X, (cos, sin)), want)
    torch.testing.assert_close(ours.weights(X, (cos, sin)), weights)


def test_qwen3_next_weights_give_its_own_attention():
    qwen = pytest.importorskip("transformers.models.qwen3_next")
    torch.manual_seed(0)
    config = qwen.Qwen3NextConfig(
        hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=1, attn_implementation="eager"
    )
    theirs = qwen.modeling_qwen3_next.Qwen3NextAttention(config, 0).eval()
    ours = Attention(16, 4, kv_heads=2, channels=8, gate=GateOptions(), qk_norm=True)
    query, gate = split_qwen3_next(theirs.q_proj.weight, 4)
    ours.q.weight.data, ours.gate.linear.weight.data = query.data, gate.data
    for mine, name in ((ours.k, "k_proj"), (ours.v, "v_proj"), (ours.o, "o_proj")):
        mine.weight.data = getattr(theirs, name).weight.data
    cos, sin = TURN
    mask = torch.zeros(1, 1, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    want, _ = theirs(X, position_embeddings=(cos[:, 0], sin[:, 0]), attention_mask=mask)
    torch.testing.assert_close(ours(X, TURN), want)


@pytest.mark.parametrize("granularity", ["elementwise", "headwise"])
def test_the_references_rows_are_ordered_by_group(granularity):
    heads, kv_heads, c = 4, 2, 3
    per = c if granularity == "elementwise" else 1
    label = lambda kind, h, n: [[kind, h, i] for i in range(n)]
    rows = []
    for group in range(kv_heads):
        members = [group * 2, group * 2 + 1]
        rows += [row for h in members for row in label(0, h, c)] + [row for h in members for row in label(1, h, per)]
    query, gate = split_reference(torch.tensor(rows), heads, kv_heads, granularity)
    assert query.tolist() == [row for h in range(heads) for row in label(0, h, c)]
    assert gate.tolist() == [row for h in range(heads) for row in label(1, h, per)]
    with pytest.raises(UserError, match="is no"):
        split_reference(torch.tensor(rows)[:-1], heads, 1, granularity)
