"""Rows of tokens, their states, what a model writes after them, students of fewer layers, and the step that they all take."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from stillroom.catalogue.idle import refuse_unread
from stillroom.core.config import override
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.data.sequences import Rows, shuffled
from stillroom.lm.output import head
from stillroom.lm.settings import Corpus
from stillroom.lm.teachers import fewer_layers, load_causal, save_causal
from stillroom.lm.text import continued, states
from stillroom.lm.train import predicting, sft
from stillroom.testing import recording


def test_layers_are_spread_and_copied(llama):
    from transformers import LlamaConfig, LlamaForCausalLM

    teacher = LlamaForCausalLM(LlamaConfig(**(llama.config.to_dict() | {"num_hidden_layers": 4})))
    student = fewer_layers(teacher, 3)
    for i, source in enumerate((0, 2, 3)):
        for own, theirs in zip(student.model.layers[i].parameters(), teacher.model.layers[source].parameters()):
            assert torch.equal(own, theirs)
    whole = fewer_layers(teacher, 4)
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(whole(ids).logits, teacher(ids).logits)
    with pytest.raises(UserError, match="of 5 layers"):
        fewer_layers(teacher, 5)


def test_states_with_the_head_are_the_logits_of_either_kind_of_model(model, llama):
    rows = Rows.of([([1, 2, 3, 4, 5], [-100] * 5), ([6, 7], [-100] * 2)], 9)
    for net in (model, llama):
        logits = head(net).logits(states(net.eval(), rows))
        torch.testing.assert_close(logits[0], net(rows.ids[:1]).logits[0])
        torch.testing.assert_close(logits[1, :2], net(torch.tensor([[6, 7]])).logits[0])


def test_what_a_student_writes_is_trained_after_its_prompt_only(model, tokenizer):
    rows = continued(model, tokenizer, [[2, 3, 4], [5]], max_new_tokens=6)
    assert rows.labels[0, :3].tolist() == [-100] * 3
    for i, n in enumerate((3, 1)):
        inside = slice(n, int(rows.lengths[i]))
        assert torch.equal(rows.labels[i, inside], rows.ids[i, inside])
        assert (rows.labels[i, int(rows.lengths[i]) :] == -100).all()
        assert (rows.labels[i] == tokenizer.eos_token_id).sum() <= 1


def test_batches_are_a_permutation_of_every_epoch():
    seen = torch.cat([shuffled(10, 5, 3, step) for step in (2, 3)])
    assert sorted(seen.tolist()) == list(range(10))
    assert torch.equal(shuffled(10, 5, 3, 7), shuffled(10, 5, 3, 7))
    assert len(shuffled(3, 5, 0, 4)) == 3


ROWS = Rows.of([([2, 3, 4, 5], [-100, -100, 4, 5]), ([6, 7], [-100, 7]), ([8, 9, 3], [-100, 9, 3]), ([2, 2], [-100, -100])], 9)


def test_sft_weighs_every_trained_token_alike_however_the_batch_is_cut(tmp_path, model, tokenizer):
    start = {name: value.clone() for name, value in model.state_dict().items()}
    ended = []
    for accumulate in (1, 2):
        model.load_state_dict(start)
        with Run(tmp_path / str(accumulate), 0, accumulate=accumulate) as run, recording() as seen:
            net, optimizer = run.trainable("student", model, Optimizer("sgd", 0.5, momentum=0.0))
            sft(run, net, optimizer, ROWS, 2, 4)
        assert seen.steps("student") == [step for step in (0, 1) for _ in range(accumulate)]
        assert sum(int(update.count) for update in seen.updates()[:accumulate]) == 5
        ended.append([p.detach().clone() for p in model.parameters()])
        if accumulate == 1:
            model.load_state_dict(start)
            logits = model(ROWS.ids, attention_mask=ROWS.mask).logits[:, :-1]
            want = cross_entropy(logits.flatten(0, 1), ROWS.labels[:, 1:].flatten(), ignore_index=-100)
            assert seen.losses("student", "ce")[0] == pytest.approx(want.item(), rel=1e-5)
    for one, two in zip(*ended):
        torch.testing.assert_close(one, two)


def test_predicting_gives_the_positions_before_each_token(tmp_path, model):
    with Run(tmp_path, 0) as run:
        hidden, layer, labels = predicting(run, model.eval(), ROWS)
    assert labels.tolist() == ROWS.labels[:, 1:].flatten().tolist()
    torch.testing.assert_close(layer.logits(hidden)[:3], model(ROWS.ids[:1]).logits[0, :3])


# -- settings
def test_a_text_is_cut_in_windows_and_its_last_twentieth_held_out(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("abcdefgh" * 100)
    corpus = Corpus(data=str(file), length=8)
    train, test = corpus.rows(corpus.words(), 0)
    assert (len(train), len(test), train.ids.shape[1]) == (95, 5, 8)
    assert not corpus.procedural
    few = override(corpus, {"limit": 7, "test_limit": 2})
    assert list(map(len, few.rows(few.words(), 0))) == [7, 2]
    other = tmp_path / "other.txt"
    other.write_text("ab" * 20)
    train, test = override(corpus, {"test": str(other)}).rows(corpus.words(), 0)
    assert (len(train), len(test)) == (100, 5)
    before = corpus.decides()
    assert override(corpus, {"data": str(other)}).decides() != before != override(corpus, {"length": 9}).decides()
    file.write_text("hgfedcba" * 100)
    assert corpus.decides() != before
    with pytest.raises(UserError, match="there is no such file"):
        Corpus(data="missing.txt").words()


def test_procedural_text_is_drawn_by_seed_and_reads_no_file():
    corpus = Corpus(limit=5, test_limit=3, length=6)
    (train, test), again, other = corpus.rows(None, 0), corpus.rows(None, 0), corpus.rows(None, 1)
    assert (train.ids.shape, test.ids.shape) == ((5, 6), (3, 6))
    assert torch.equal(train.ids, again[0].ids)
    assert not torch.equal(train.ids, other[0].ids)
    assert not torch.equal(train.ids[:3], test.ids)
    assert list(map(len, override(corpus, {"limit": 0, "test_limit": 0}).rows(None, 0))) == [4096, 512]
    assert corpus.procedural
    assert len(corpus.words()) == 64
    for wrong in ({"test": "x.txt"}, {"tokenizer": "hf:x"}):
        with pytest.raises(UserError, match="give --data too"):
            override(corpus, wrong).rows(override(corpus, wrong).words(), 0)


def test_a_named_tokenizer_reads_the_text_and_comes_back_with_a_small_student(tmp_path, model):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(tmp_path / "words")
    (tmp_path / "t.txt").write_text("a b a b c " * 20)
    corpus = Corpus(data=str(tmp_path / "t.txt"), tokenizer=f"hf:{tmp_path / 'words'}", length=5)
    words = corpus.words()
    assert corpus.rows(words, 0)[0].ids[0].tolist() == [0, 1, 0, 1, 2]
    (tmp_path / "student").mkdir()
    save_causal(model, words, tmp_path / "student")
    net, again = load_causal(f"run:{tmp_path}")
    assert again.get_vocab() == words.get_vocab()
    torch.testing.assert_close(net(ROWS.ids).logits, model(ROWS.ids).logits)
    for spec, what in (("gpt2", "write hf:"), (f"hf:{tmp_path / 'none'}", "could not be loaded")):
        with pytest.raises(UserError, match=what):
            override(corpus, {"tokenizer": spec}).words()


def test_a_flag_without_effect_is_refused_unless_it_says_nothing():
    refuse_unread(Corpus(), {"test_limit": "why not"})
    refuse_unread(Corpus(test_limit=3), {"limit": "why not"})
    with pytest.raises(UserError, match="--test-limit does nothing here: why not"):
        refuse_unread(Corpus(test_limit=3), {"test_limit": "why not"})
