"""Gated attention: end to end, the sink task's targets, the tools it is measured with, and other libraries' weights."""

import pytest
import torch

from stillroom.catalogue.execute import execute
from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.data.sequences import BackCopy
from stillroom.lm.diagnostics import attention_maps, first_token_share, gate_scores, massive_activation, spikes
from stillroom.lm.teachers import load_causal
from stillroom.nets.decoder import Attention, Decoder, GateOptions, rotary
from stillroom.nets.gated_weights import split_qwen3_next, split_reference
from stillroom.recipes.language import gated_attention as recipe


def test_end_to_end(tmp_path):
    config = recipe.Config(sink_steps=4, steps=4, sweep=(1e-2,))
    with Run(tmp_path, 0) as run:
        metrics = execute("gated-attention", config, run)["metrics"]
    assert {"sink_share", "gate_silent", "ce", "trigger_ce", "first_token_share", "ce_at_0.01"} <= metrics.keys()
    assert (tmp_path / "sink" / "samples" / "gate scores.svg").exists()
    load_causal(f"run:{tmp_path}")


def test_a_text_file_and_a_missing_one(tmp_path):
    (tmp_path / "t.txt").write_text("to be or not to be\n" * 40)
    with Run(tmp_path / "run", 0) as run:
        metrics = recipe.main(recipe.Config(sink_steps=0, steps=2, data=str(tmp_path / "t.txt")), run)
    assert "trigger_ce" not in metrics
    with pytest.raises(UserError, match="no such file"):
        recipe.language(recipe.Config(data="missing.txt"), 0)


def test_sink_targets_are_the_predecessors_of_triggers():
    answers = torch.randn(32, recipe.ANSWER)
    ids, target, asked = recipe.sink_batch(50, answers)
    assert (ids[:, 0] == recipe.BOS).all()
    for b, t in [(0, 0), (0, 1), (3, 7), (11, 20)]:
        trigger = t >= 2 and ids[b, t] <= recipe.TRIGGERS
        assert asked[b, t] == trigger
        torch.testing.assert_close(target[b, t], answers[ids[b, t - 1]] if trigger else torch.zeros(recipe.ANSWER))


def test_back_copy_follows_its_own_rule():
    source = BackCopy()
    ids = source.draw(400, 32, torch.Generator().manual_seed(0))
    after = source.is_trigger(ids[:, 1:-1])
    assert (ids[:, 2:][after] == ids[:, :-2][after]).all()
    assert source.log_probs(ids).isfinite().all()
    free = ~source.is_trigger(ids[:, :-1])
    counts = torch.zeros(64, 64).index_put_((ids[:, :-1][free], ids[:, 1:][free]), torch.tensor(1.0), accumulate=True)
    seen = counts.sum(-1) > 100
    assert (counts / counts.sum(-1, keepdim=True) - source.table())[seen].abs().max() < 0.15


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


def test_diagnostics():
    torch.manual_seed(0)
    net, ids = Decoder(20, 16, 2, 2, gate=GateOptions(granularity="headwise")), torch.randint(20, (3, 9))
    maps = attention_maps(net, ids)
    assert [m.shape for m in maps] == [(3, 2, 9, 9)] * 2
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(3, 2, 9))
    assert [s.shape for s in gate_scores(net, ids)] == [(3, 9, 2, 1)] * 2
    assert massive_activation(net, ids) > 0
    weights = torch.zeros(1, 1, 6, 6)
    weights[..., 4, 0], weights[..., 5, 0] = 0.2, 0.6
    assert first_token_share(weights).item() == pytest.approx(0.4)
    assert first_token_share(weights, torch.tensor([False] * 5 + [True])).item() == pytest.approx(0.6)
    assert spikes([1.0, 1.1, 2.0, 1.0, float("nan")]) == 2
