"""Gated attention: the sink task's targets and rates, the language task's loss, and what both loops do."""

import math

import pytest
import torch

from stillroom.catalogue import cards
from stillroom.core.config import override
from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.data.sequences import BackCopy, Rows
from stillroom.lm.diagnostics import attention_maps, gate_scores
from stillroom.lm.teachers import load_causal
from stillroom.nets.decoder import Decoder, GateOptions
from stillroom.recipes.language import gated_attention as recipe
from stillroom.testing import trace
from tests.recipes.common import assert_resumes

SMALL = {"sink_steps": 3, "steps": 3, "width": 16, "hidden": 32, "length": 10, "batch_size": 4, "test_limit": 80}
WATCH = ["sink_ids", "sink_targets", "sink_loss", "language_loss", "pretrain"]


def traced(run, **changes):
    return trace(recipe, run, {**SMALL, **changes}, watch=WATCH)


# -- the sink task
def test_targets_are_the_predecessors_of_triggers_and_silence_elsewhere():
    answers = torch.randn(32, recipe.ANSWER)
    ids = torch.tensor([[0, 3, 6, 9, 1, 7, 6]])
    target, asked = recipe.sink_targets(ids, answers)
    assert asked.tolist() == [[False, False, True, False, True, False, True]]
    want = torch.stack([torch.zeros(16), torch.zeros(16), answers[3], torch.zeros(16), answers[9], torch.zeros(16), answers[7]])
    assert torch.equal(target[0], want)


def test_words_are_uniform_after_the_first():
    torch.manual_seed(0)
    ids = recipe.sink_ids(2000)
    assert ids.shape == (2000, recipe.SINK_LENGTH)
    assert (ids[:, 0] == recipe.BOS).all()
    assert torch.bincount(ids[:, 1:].flatten(), minlength=32).float().div(2000 * 23).sub(1 / 31)[1:].abs().max() < 0.003
    assert int(ids[:, 1:].min()) == 1
    assert int(ids.max()) == 31


def test_the_sink_loss_is_a_mean_over_the_vector_only():
    answered, target = torch.zeros(1, 2, 4), torch.tensor([[[1.0, 1, 1, 3], [0, 0, 0, 2]]])
    assert recipe.sink_loss(answered, target).tolist() == [3.0, 1.0]


def test_an_attention_without_residual_or_bias_is_silent_when_its_gate_is_shut():
    torch.manual_seed(0)
    net = recipe.Sink(GateOptions("output", "headwise"))
    assert not [name for name, _ in net.named_parameters() if name.endswith("bias")]
    for name, weight in net.attention.named_parameters():
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.15), name
    ids = recipe.sink_ids(3)
    assert net(ids).shape == (3, 24, 16)
    net.attention.gate.linear.weight.data.fill_(0.0)
    half = net(ids)
    with torch.no_grad():
        whole = recipe.Sink(None)
        whole.load_state_dict({k: v for k, v in net.state_dict().items() if "gate" not in k})
        torch.testing.assert_close(half, whole(ids) / 2)
    changed = ids.clone()
    changed[:, -1] = 31
    torch.testing.assert_close(net(changed)[:, :-1], half[:, :-1])


def test_some_modules_learn_at_a_multiple_of_the_rate(run):
    net = recipe.Sink(GateOptions())
    held_gate = net.attention.gate
    optimizer = recipe.Faster("adamw", 1e-2, schedule="cosine", warmup=1, weight_decay=0.1, modules=(held_gate,), ratio=10.0)
    held, built = run.trainable("net", net, optimizer)
    fast = [p for group in built.param_groups if group.get("ratio", 1.0) == 10.0 for p in group["params"]]
    assert [id(p) for p in fast] == [id(p) for p in held_gate.parameters()]
    assert sum(len(group["params"]) for group in built.param_groups) == len(list(held.parameters()))
    before = {name: p.detach().clone() for name, p in held.named_parameters()}
    for step in run.steps(2):
        rates = {group.get("ratio", 1.0): group["lr"] for group in built.param_groups}
        assert rates == {1.0: optimizer.rate(step, 2), 10.0: pytest.approx(10 * optimizer.rate(step, 2))}
        assert all(group["weight_decay"] == 0.1 for group in built.param_groups)
        run.update(built, recipe.sink_loss(held(recipe.sink_ids(8)), torch.ones(8, 24, 16)))
        if step == 0:  # Adam's first step has the size of its rate
            moved = {name: float((p - before[name]).abs().max()) for name, p in held.named_parameters()}
    assert moved["attention.gate.linear.weight"] == pytest.approx(10 * moved["attention.o.weight"], rel=0.1)


def test_the_sink_loop_learns_fresh_words_and_reports_where_heads_look(run):
    seen = traced(run, steps=1)
    drawn = seen.calls("sink_ids", "sink")
    assert seen.steps("net", "sink") == [0, 1, 2]
    assert [call.args for call in drawn] == [(64,)] * 3 + [(256,)]
    assert len({call.result.sum().item() for call in drawn}) == 4
    for call, loss in zip(seen.calls("sink_targets"), seen.calls("sink_loss")):
        assert torch.equal(loss.args[1], call.result[0])
        assert torch.equal(call.args[1], torch.randn(32, 16, generator=torch.Generator().manual_seed(0)))
    assert seen.losses("net", "mse") == [float(call.result.mean()) for call in seen.calls("sink_loss")[:3]]
    # The figures, counted anew.
    net, ids = seen.nets["net"], drawn[-1].result
    asked = (ids >= 1) & (ids <= 6)
    asked[:, :2] = False
    late = torch.zeros_like(asked)
    late[:, 4:] = True
    (weights,), (scores,) = attention_maps(net, ids), gate_scores(net, ids)
    first, level = weights[..., 0].mean(1), scores.mean((-1, -2))
    want = {
        "sink_share": first[~asked & late].mean(), "sink_share_trigger": first[asked & late].mean(),
        "gate_silent": level[~asked & late].mean(),
        "gate_trigger": level[asked & late].mean(), "gate_closed": (scores < 0.1).float().mean(),
        "sink_mse": (net(ids) - seen.calls("sink_targets")[-1].result[0]).square().mean(),
    }  # fmt: skip
    for name, value in want.items():
        assert seen.metrics[name] == pytest.approx(value.item(), rel=1e-4), name
    assert seen.optimizers["net"].param_groups[-1]["ratio"] == 10.0


# -- the language task
def test_language_loss_is_the_next_words_and_counts_the_trained():
    logits, labels = torch.randn(1, 4, 5), torch.tensor([[1, -100, 3, 0]])
    values, count = recipe.language_loss(logits, labels)
    log_q = logits.log_softmax(-1)
    torch.testing.assert_close(values[0], torch.stack([torch.zeros(()), -log_q[0, 1, 3], -log_q[0, 2, 0]]))
    assert int(count) == 2


def test_the_language_loop_learns_fresh_sentences(run):
    seen = traced(run, sink_steps=0)
    assert not seen.calls("sink_ids")
    assert seen.steps("student") == [0, 1, 2]
    read = [call.args[0] for call in seen.calls("student") if call.grad]
    assert [tuple(ids.shape) for ids in read] == [(4, 10)] * 3
    assert len({ids.sum().item() for ids in read}) == 3
    losses = seen.calls("language_loss")
    assert [int(update.count) for update in seen.updates("student")] == [36] * 3
    assert seen.losses("student", "ce") == [float(call.result[0].mean()) for call in losses[:3]]
    assert seen.losses("student", "ce")[0] == pytest.approx(math.log(64), rel=0.05)
    (made,) = seen.calls("pretrain")
    assert made.result[1] == pytest.approx(seen.losses("student", "ce"))
    assert {"ce", "trigger_ce", "first_token_share", "spikes", "massive_activation"} == seen.metrics.keys()


def test_a_limit_or_a_file_gives_the_same_sentences_again(run, tmp_path):
    seen = traced(run, sink_steps=0, limit=4, steps=2)
    read = [call.args[0] for call in seen.calls("student") if call.grad]
    assert sorted(read[0].tolist()) == sorted(read[1].tolist()) == sorted(recipe.Config(**{k: SMALL[k] for k in ("length",)}, limit=4)
                                                                          .rows(None, 0)[0].ids.tolist())  # fmt: skip


def test_a_text_file_is_read_by_characters_and_its_student_loads(tmp_path):
    (tmp_path / "t.txt").write_text("to be or not to be\n" * 40)
    with Run(tmp_path / "run", 0, plots=False) as run:
        seen = traced(run, sink_steps=0, data=str(tmp_path / "t.txt"), kv_heads=1, heads=2)
    assert "trigger_ce" not in seen.metrics
    net, words = load_causal(f"run:{tmp_path / 'run'}")
    assert len(words) == net.spec["vocabulary"] == 13
    assert (net.spec["kv_heads"], net.spec["heads"], net.spec["tied"], net.spec["rope_base"]) == (1, 2, False, 10_000.0)


def test_measure_is_the_mean_over_all_words_and_over_those_after_triggers():
    torch.manual_seed(0)
    net, test = Decoder(64, 16, 1, 1), Rows.plain(BackCopy().draw(70, 10, torch.Generator().manual_seed(0)))
    values = -net(test.ids).logits[:, :-1].log_softmax(-1).gather(-1, test.ids[:, 1:, None]).squeeze(-1)
    found = recipe.measure(recipe.Config(), net, test)
    assert found["ce"] == pytest.approx(values.mean().item(), rel=1e-5)
    after = [values[i, t] for i in range(70) for t in range(1, 9) if 1 <= test.ids[i, t] <= 4]
    assert found["trigger_ce"] == pytest.approx(torch.stack(after).mean().item(), rel=1e-5)
    assert recipe.measure(recipe.Config(data="t.txt"), net, test).keys() == {"ce"}


def test_a_gated_student_gives_up_feed_forward_width_for_its_gate(run, tmp_path):
    seen = traced(run, sink_steps=0, gate="value", heads=4, kv_heads=2, steps=1)
    spec = seen.nets["student"].spec
    assert spec["hidden"] == 32 - 4  # 2 heads of 4 channels cost 8 rows, of which a unit saves two
    assert spec["gate"]["position"] == "value"
    with Run(tmp_path / "none", 0, plots=False) as other:
        assert traced(other, sink_steps=0, gate="none", steps=1).nets["student"].spec["hidden"] == 32


def test_a_sweep_trains_every_rate_alike_and_finds_the_best(run):
    seen = traced(run, sink_steps=0, sweep=(1e-5, 2e-3), steps=2)
    assert {f"ce_at_{rate:g}" for rate in (1e-5, 2e-3, 5e-3)} <= seen.metrics.keys()
    assert seen.metrics["ce_at_0.005"] == seen.metrics["ce"]
    assert [call.args[2].lr for call in seen.calls("pretrain")] == [5e-3, 1e-5, 2e-3]
    assert all(call.args[2].clip == 1.0 for call in seen.calls("pretrain"))
    found = {rate: seen.metrics[f"ce_at_{rate:g}"] for rate in (1e-5, 2e-3, 5e-3)}
    assert seen.metrics["log_best_rate"] == math.log10(min(found, key=found.get))
    assert seen.steps("student", "rate 1e-05") == [0, 1]
    assert seen.metrics["ce_at_1e-05"] == pytest.approx(math.log(64), rel=0.02)


@pytest.mark.parametrize(("changes", "why"), [
    ({"gate": "none", "shared": True}, "--gate is none"),
    ({"gate": "none", "granularity": "headwise"}, "--gate is none"),
    ({"gate": "none", "activation": "silu"}, "--gate is none"),
    ({"gate": "none", "combine": "add"}, "--gate is none"),
    ({"gate": "none", "input_dependent": False}, "--gate is none"),
    ({"gate": "none", "sink_gate_rate": 1.0}, "--gate is none"),
    ({"sink_steps": 0, "sink_gate_rate": 1.0}, "--sink-steps is 0"),
    ({"sink_steps": 0, "sink_optimizer.lr": 1.0}, "--sink-steps is 0"),
    ({"gate": "projected", "shared": True}, "knows no heads"),
])  # fmt: skip
def test_a_flag_without_effect_is_refused(changes, why):
    with pytest.raises(UserError, match=why):
        recipe.check_flags(override(recipe.Config(), changes))


@pytest.mark.parametrize("arm", recipe.ARMS)
def test_arms_use_all_their_flags_and_say_what_gate_they_mean(arm):
    cfg = cards.config_of(recipe, arm)
    recipe.check_flags(cfg)
    gate = recipe.options(cfg)
    assert (gate is None) == (cfg.gate == "none")
    if gate:
        assert (gate.position, gate.granularity, gate.shared, gate.activation, gate.combine, gate.input_dependent) == (
            cfg.gate, cfg.granularity, cfg.shared, cfg.activation, cfg.combine, cfg.input_dependent
        )  # fmt: skip


def test_a_killed_run_goes_on_bitwise(tmp_path):
    assert_resumes("gated-attention", tmp_path, 4, SMALL)
