"""Token KD: its loss against closed forms, and what each mode's loop learns from, when and how often."""

import json
import math

import pytest
import torch
from torch.nn.functional import log_softmax

from stillroom.catalogue import cards
from stillroom.core.config import override
from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.core.store import Store
from stillroom.lm.output import OutputLayer
from stillroom.lm.signals import Dense, Head, Sampled, TopK
from stillroom.lm.tokenizer import Characters
from stillroom.nets.decoder import Decoder
from stillroom.recipes.language import token_kd as recipe
from stillroom.testing import trace
from tests.recipes.common import assert_resumes, finish

SMALL = {
    "teacher_steps": 3, "teacher_width": 16, "student_width": 8, "steps": 4, "limit": 12, "test_limit": 6, "batch_size": 4, "length": 12
}  # fmt: skip
WATCH = ["token_loss", "continued", "online", "capture", "group_loss", "taken"]


def traced(run, watch=WATCH, **changes):
    return trace(recipe, run, {**SMALL, **changes}, watch=watch)


def a_teacher():
    """A teacher and its tokenizer, far from flat."""
    torch.manual_seed(1)
    net = Decoder(64, 16, 1, 2)
    for p in net.parameters():
        p.data *= 5
    return net, recipe.Config().words()


# -- the loss
def rows():
    torch.manual_seed(0)
    hidden, weight, teacher = torch.randn(5, 3).double(), torch.randn(7, 3).double(), torch.randn(5, 7).double()
    labels = torch.tensor([2, -100, 0, 6, 1])
    kept = labels >= 0
    return hidden, weight, labels, teacher, kept


def test_word_mode_is_weighted_cross_entropy_and_divergence_of_tempered_distributions():
    hidden, weight, labels, teacher, kept = rows()
    cfg = recipe.Config(ce_weight=0.3, kd_weight=0.7, temperature=2.0)
    log_p, log_q = (log_softmax(z[kept] / 2, -1) for z in (teacher, hidden @ weight.T))
    ce = -log_softmax(hidden @ weight.T, -1)[kept, labels[kept]].mean()
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    out = recipe.token_loss(cfg, hidden, OutputLayer(weight), labels, Dense(teacher))
    torch.testing.assert_close(out.loss, 0.3 * ce + 0.7 * kl)
    assert int(out.tokens) == 4
    own = recipe.token_loss(cfg, hidden, weight, labels, Dense(teacher), own_text=True)
    torch.testing.assert_close(own.loss, 0.7 * kl)  # the words that a student wrote are no labels
    squared = recipe.token_loss(override(cfg, {"times_t2": True}), hidden, weight, labels, Dense(teacher), own_text=True)
    torch.testing.assert_close(squared.loss, 4 * 0.7 * kl)
    text = recipe.token_loss(recipe.Config(mode="sequence"), hidden, weight, labels, None)
    torch.testing.assert_close(text.loss, ce)


def test_every_divergence_has_its_own_name_and_beta_is_that_of_jsd():
    hidden, weight, labels, teacher, kept = rows()
    p, q = (z[kept].softmax(-1) for z in (teacher, hidden @ weight.T))
    kl = lambda a, b: (a * (a / b).log()).sum(-1).mean()
    mix = 0.1 * p + 0.9 * q
    want = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": 0.1 * kl(p, mix) + 0.9 * kl(q, mix)}
    for kind, value in want.items():
        out = recipe.token_loss(recipe.Config(kind=kind, beta=0.1), hidden, weight, labels, Dense(teacher))
        torch.testing.assert_close(out.loss, value)


# -- the loops
@pytest.mark.parametrize(
    ("signal", "kind"), [("topk", TopK), ("topk-cut", TopK), ("sampled", Sampled), ("states", Head), ("full", Dense), ("online", Head)]
)
def test_word_mode_learns_the_corpus_under_the_teachers_signal(run, signal, kind):
    changes = {**SMALL, "signal": signal, "temperature": 1.0 if signal in ("states", "full", "online") else 2.0}
    seen = trace(recipe, run, changes, watch=WATCH, teacher=a_teacher())
    losses = seen.calls("token_loss")
    assert seen.steps("student") == [0, 1, 2, 3] == [call.step for call in losses]
    assert seen.losses("student") == [float(call.result.loss) for call in losses]
    assert [int(update.count) for update in seen.updates("student")] == [4 * 11] * 4
    assert seen.moved("student")
    assert not seen.moved("frozen 0")
    assert [call.args[0] for call in seen.calls("continued")] == [seen.nets["student"]]  # the metrics' own
    for call, batch in zip(losses, seen.calls("taken")):
        given = call.args[4]
        assert isinstance(given, kind)
        assert not call.keywords["own_text"]
        assert torch.equal(call.args[3], batch.result[1].labels[:, 1:].flatten())
    if kind is TopK:
        assert bool((losses[0].args[4].log_tail == -math.inf).all()) == (signal == "topk-cut")
        assert losses[0].args[4].ids.shape == (44, 8)
    if kind in (TopK, Sampled):
        assert losses[0].args[4].temperature == 2.0
    asked = [call.args[4] for call in seen.calls("capture")]
    assert [what.kind for what in asked] == ["states"] + [signal.removesuffix("-cut")] * (signal != "online")
    # What the teacher said is what it says of this very batch.
    batch, teacher = seen.calls("taken")[0].result[1], seen.nets["frozen 0"]
    logits = teacher(batch.ids).logits[:, :-1].flatten(0, 1)
    if kind in (Head, Dense):
        found = losses[0].args[4].logits
        torch.testing.assert_close(found.softmax(-1), logits.softmax(-1), atol=2e-3, rtol=0)
    elif kind is TopK:
        assert torch.equal(losses[0].args[4].log_probs, (logits / 2).log_softmax(-1).gather(-1, losses[0].args[4].ids).half().float())
    assert {"nll", "perplexity", "kl", "own_kl"} <= seen.metrics.keys()
    assert ("bytes_per_token" in seen.metrics) == (signal != "online")


@pytest.mark.parametrize(("share", "turns"), [(0.0, {False}), (0.5, {True, False}), (1.0, {True})])
def test_on_policy_a_coin_for_the_whole_step_decides_who_wrote_the_text(tmp_path, share, turns):
    with Run(tmp_path / "run", 0, store=Store(tmp_path / "store"), accumulate=2, plots=False) as run:
        changes = {"ce_weight": 0.5} if share < 1 else {}
        seen = traced(run, mode="on-policy", own_text=share, sampling_temperature=0.7, max_new_tokens=5, steps=8, **changes)
    own = {}
    for call in seen.calls("token_loss"):
        own.setdefault(call.step, set()).add(call.keywords["own_text"])
    assert all(len(both) == 1 for both in own.values())  # all chunks of a step take the same turn
    assert set().union(*own.values()) == turns
    written = seen.calls("continued")[:-1]  # the last is the metrics'
    assert [c.step for c in written] == [step for step in own for _ in range(2) if own[step] == {True}]
    for call in written:
        assert call.keywords["temperature"] == 0.7
        assert call.args[2] == [[0]] * 2  # prompts: the text's first word
        assert call.args[0] is seen.nets["student"]
    for call in seen.calls("token_loss"):
        signal = call.args[4]
        if call.keywords["own_text"]:
            assert isinstance(signal, Head)
            assert float(call.result.ce) == 0.0
        else:
            assert isinstance(signal, TopK)
            assert float(call.result.ce) > 0
    # On its own text the teacher answers for that text, at every position.
    steps = [c for c in seen.calls("online") if own.get(c.step) == {True}][: len(written)]
    for asked, text in zip(steps, written):
        assert torch.equal(asked.args[1].ids, text.result.ids)
        assert not asked.result.hidden.requires_grad


def test_sequence_mode_learns_what_the_teacher_writes(run, monkeypatch):
    teacher = recipe.Decoder(64, 16, 2, 2)
    words = recipe.Config().words()
    asked = []
    real = recipe.continued

    def continued(net, tokenizer, prompts, **how):
        asked.append((net, prompts, how))
        return real(net, tokenizer, prompts, **how)

    monkeypatch.setattr(recipe, "continued", continued)
    changes = {**SMALL, "mode": "sequence", "writings": 3, "sampling_temperature": 0.5, "max_new_tokens": 4}
    seen = trace(recipe, run, changes, watch=["token_loss", "taken"], teacher=(teacher, words))
    net, prompts, how = asked[0]
    assert net is teacher
    assert prompts == [[0]] * 36
    assert how["temperature"] == 0.5
    assert how["max_new_tokens"] == 4
    batches = [call.result[1] for call in seen.calls("taken")]
    assert all(batch.ids.shape == (4, 5) for batch in batches)
    assert all(
        (batch.labels[:, 0] == -100).all() and (batch.labels[:, 1:] == batch.ids[:, 1:])[batch.mask[:, 1:] == 1].all() for batch in batches
    )
    assert all(call.args[4] is None for call in seen.calls("token_loss"))
    assert "bytes_per_token" not in seen.metrics
    assert asked[-1][0] is seen.nets["student"]  # own_kl: the student's own text


def test_plain_training_asks_no_teacher(run):
    seen = traced(run, kd_weight=0.0, ce_weight=1.0, test_limit=130)
    assert len(seen.calls("continued")[-1].args[2]) == 128  # prompts of the student's own text
    assert all(call.args[4] is None for call in seen.calls("token_loss"))
    assert [call.args[4].kind for call in seen.calls("capture")] == ["states"]


@pytest.mark.parametrize(("changes", "kinds"), [
    ({"signal": "byte-groups"}, ["text", "text"]),
    ({"signal": "uld", "ce_weight": 1.0}, ["states", "text"]),
    ({"kd_weight": 0.0, "ce_weight": 1.0}, ["text"]),
])  # fmt: skip
def test_a_student_with_other_tokens_learns_across_tokenizers(run, changes, kinds):
    seen = traced(run, student="pairs:8", watch=["capture", "token_loss", "group_loss"], **changes)
    assert [call.args[4].kind for call in seen.calls("capture")] == kinds
    assert not seen.calls("token_loss")
    assert seen.steps("student") == [0, 1, 2, 3]
    (made,) = seen.calls("group_loss")
    assert made.args[2:4] == (changes.get("ce_weight", 0.0), changes.get("kd_weight", 1.0))
    assert {"nll", "group_kl"} <= seen.metrics.keys()
    assert "own_kl" not in seen.metrics
    assert seen.nets["student"].spec["vocabulary"] == 72


def test_the_small_teacher_learns_fresh_sentences_once_for_all_runs(tmp_path):
    store = Store(tmp_path / "store")
    for name in ("one", "two"):
        with Run(tmp_path / name, 0, store=store, plots=False) as run:
            seen = traced(run, watch=[], student_width=16 if name == "two" else 8)
        assert seen.steps("teacher", "teacher") == ([0, 1, 2] if name == "one" else [])
        if name == "one":
            read = [call.keywords["input_ids"] for call in seen.calls("teacher", "teacher") if call.training]
            assert len({tuple(ids.flatten().tolist()) for ids in read}) == 3
            assert read[0].shape == (4, 12)
            assert seen.losses("teacher", "ce")[0] == pytest.approx(math.log(64), rel=0.05)
        assert seen.nets["student"].spec["width"] == (16 if name == "two" else 8)


def test_the_small_teacher_of_a_text_learns_all_but_the_last_twentieth(tmp_path, run):
    (tmp_path / "t.txt").write_text("abcdefghijkl" * 50 + "lkjihgfedcba" * 3)
    seen = traced(run, data=str(tmp_path / "t.txt"), teacher_steps=12, watch=["taken"])
    assert len(seen.steps("teacher", "teacher")) == 12
    read = torch.cat([call.keywords["input_ids"] for call in seen.calls("teacher", "teacher") if call.training])
    words = recipe.Config(data=str(tmp_path / "t.txt")).words()
    assert {words.decode(ids) for ids in read.tolist()} == {"abcdefghijkl", "lkjihgfedcba"}  # one of the three reversed ones is trained on
    assert len(read) == 48
    assert seen.nets["teacher"].spec["vocabulary"] == len(words)


def test_students_by_name():
    words, teacher = recipe.Config().words(), Decoder(64, 16, 2, 2)
    small, own = recipe.find_student(recipe.Config(student_width=8, student_layers=2), teacher, words, 0)
    assert (small.spec["width"], small.spec["layers"], small.spec["vocabulary"]) == (8, 2, 64)
    assert own is words
    pairs, own = recipe.find_student(recipe.Config(student="pairs:5", student_width=8), teacher, words, 0)
    assert len(own) == 69 == pairs.spec["vocabulary"]
    assert recipe.context(teacher, 7) == 7
    with pytest.raises(UserError, match="names no causal model"):
        recipe.find_student(recipe.Config(student="layers:"), teacher, words, 0)


def test_a_student_that_is_its_teacher_diverges_nowhere(run):
    words = recipe.Config().words()
    torch.manual_seed(0)
    net, other = Decoder(64, 16, 1, 2), Decoder(64, 16, 1, 2)
    for p in [*net.parameters(), *other.parameters()]:
        p.data *= 8
    test = recipe.Config(**SMALL).rows(words, 0)[1]
    same, apart = (recipe.own_divergence(recipe.Config(**SMALL), run, net, teacher, words, test) for teacher in (net, other))
    assert same == pytest.approx(0.0, abs=1e-6)
    assert apart > 0.1
    assert recipe.longest(recipe.Config(length=12), test) == 11
    assert recipe.longest(recipe.Config(max_new_tokens=3), test) == 3


def test_texts_longer_than_a_model_reads_are_refused(run):
    teacher = Decoder(64, 16, 1, 2)
    teacher.config = type("Config", (), {"max_position_embeddings": 10})()
    with pytest.raises(UserError, match="12 tokens exceed the teacher's context of 10"):
        trace(recipe, run, SMALL, teacher=(teacher, recipe.Config().words()))


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_given_models_whose_logits_are_no_affine_map_of_their_states_are_refused(run, who):
    net, words = a_teacher()
    net.head.register_forward_hook(lambda module, args, out: out * out)
    with pytest.raises(UserError, match=f"The {who}: the logits"):
        trace(recipe, run, SMALL, **{who: (net, words)})


IDLE = [
    ({"sampling_temperature": 0.5}, "nobody writes"),
    ({"own_text": 0.2}, "--mode on-policy"),
    ({"writings": 2}, "--mode sequence"),
    ({"mode": "sequence", "temperature": 2.0}, "by cross-entropy"),
    ({"mode": "sequence", "ce_weight": 0.5}, "by cross-entropy"),
    ({"mode": "sequence", "kd_weight": 0.5}, "by cross-entropy"),
    ({"mode": "sequence", "kind": "jsd"}, "by cross-entropy"),
    ({"mode": "sequence", "signal": "online"}, "by cross-entropy"),
    ({"mode": "sequence", "signal_size": 9}, "topk, topk-cut and sampled"),
    ({"kd_weight": 0.0, "ce_weight": 1.0, "kind": "jsd"}, "--kd-weight is 0"),
    ({"signal": "byte-groups", "kind": "jsd"}, "divergence of its own"),
    ({"mode": "on-policy", "own_text": 1.0, "ce_weight": 0.1}, "no step reads the corpus"),
    ({"mode": "on-policy", "own_text": 1.0, "signal": "online"}, "no step reads the corpus"),
    ({"signal": "online", "signal_size": 9}, "topk, topk-cut and sampled"),
    ({"beta": 0.1}, "--kind jsd"),
    ({"times_t2": True}, "--temperature is 1"),
    ({"teacher": "hf:x", "teacher_width": 9}, "taken as it is"),
    ({"teacher": "hf:x", "tokenizer": "hf:y"}, "taken as it is"),
    ({"student": "hf:x", "student_layers": 9}, "its own size"),
    ({"kd_weight": 0.0}, "Nothing would be learned"),
    ({"mode": "on-policy", "kd_weight": 0.0, "ce_weight": 1.0}, "Nothing would be learned"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "why"), IDLE)
def test_a_flag_without_effect_is_refused(changes, why):
    with pytest.raises(UserError, match=why):
        recipe.check_flags(override(recipe.Config(), changes))


def test_flags_with_effect_are_taken():
    for changes in ({"kind": "jsd", "beta": 0.1}, {"kind": "reverse_kl"}, {"temperature": 2.0, "times_t2": True},
                    {"mode": "sequence", "sampling_temperature": 0.5, "writings": 2}):  # fmt: skip
        recipe.check_flags(override(recipe.Config(), changes))


def test_batches_of_unequal_rows_find_the_teachers_words_at_their_place(run, tmp_path):
    lines = [{"question": "q" * (i % 3 + 1), "answer": "a" * (i % 5 + 1)} for i in range(40)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen = traced(run, data=str(tmp_path / "qa.jsonl"), length=20, signal="full", batch_size=2, limit=0, steps=8)
    for call, batch in zip(seen.calls("token_loss"), seen.calls("taken")[-8:], strict=True):
        rows, labels, logits = batch.result[1], call.args[3], call.args[4].logits
        assert len(logits) == len(labels)
        want = seen.nets["teacher"](rows.ids, attention_mask=rows.mask).logits[:, :-1].flatten(0, 1).softmax(-1)
        kept = labels != -100
        assert 0 < int(kept.sum()) == int(call.result.tokens)
        torch.testing.assert_close(logits.softmax(-1)[kept], want[kept], atol=2e-3, rtol=0)
    assert len(seen.calls("continued")[-1].args[2]) == 2  # all of the few test prompts


def test_few_prompts_of_a_file_are_enough_for_the_own_text(run, tmp_path):
    (tmp_path / "t.txt").write_text("abcdefghijkl" * 200)
    seen = traced(run, data=str(tmp_path / "t.txt"))
    assert len(seen.calls("continued")[-1].args[2]) == 4


def test_teachers_by_name_come_from_the_runs_store(run, monkeypatch):
    asked = []
    monkeypatch.setattr(recipe, "load_causal", lambda spec, **how: asked.append((spec, how)) or (None, None))
    recipe.find_teacher(recipe.Config(teacher="gguf:x"), run)
    assert asked == [("gguf:x", {"store": run.store})]


@pytest.mark.parametrize("arm", recipe.ARMS)
def test_arms_use_all_their_flags(arm):
    recipe.check_flags(cards.config_of(recipe, arm))


def test_what_cannot_be_asked_across_tokenizers_is_explained():
    own, theirs = Characters("abc"), Characters("abcd")
    ask = lambda own=own, **flags: recipe.crosses(recipe.Config(**flags), own, theirs)
    for flags, why in (
        ({}, r"--signal byte-groups .* or --signal uld"),
        ({"mode": "on-policy", "kd_weight": 0.0}, "different tokenizers"),
        ({"mode": "sequence", "signal": "uld"}, "different tokenizers"),
        ({"signal": "byte-groups", "temperature": 2.0}, "no temperature"),
        ({"signal": "uld"}, "--ce-weight"),
    ):
        with pytest.raises(UserError, match=why):
            ask(**flags)
    with pytest.raises(UserError, match="--mode word"):
        ask(theirs, mode="sequence", signal="byte-groups")
    assert ask(kd_weight=0.0, ce_weight=1.0)
    assert ask(signal="byte-groups")
    assert ask(theirs, signal="byte-groups")
    assert not ask(theirs)
    assert ask(signal="uld", ce_weight=1.0)


def test_a_killed_run_goes_on_bitwise(tmp_path):
    small = {k: v for k, v in SMALL.items() if k != "steps"}
    assert_resumes("token-kd", tmp_path, 5, {**small, "mode": "on-policy", "steps": 5})
    assert (tmp_path / "killed" / "student" / "config.json").exists()


def test_the_report_names_teacher_and_student(tmp_path):
    result = finish("token-kd", tmp_path / "run", SMALL)
    assert [row["name"] for row in result["rows"]] == ["teacher", "student"]
    assert result["rows"][1]["parameters"] == sum(p.numel() for p in Decoder(64, 8, 1, 2).parameters())
