"""Teacher caches: what is read is what the teacher says, killed captures go on, and the wrong pairings are refused."""

import json

import pytest
import torch

from stillroom.core.errors import UserError
from stillroom.lm import cache as module
from stillroom.lm.cache import Capture, TeacherCache, capture
from stillroom.lm.tokenizer import Characters
from stillroom.losses.tokens import align, divergence


@pytest.fixture
def sequences(tokenizer):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, len(tokenizer), (n,), generator=generator).tolist() for n in (7, 12, 2, 9, 5)]


def teacher_rows(model, ids):
    return align(model(torch.tensor([ids])).logits, torch.tensor([ids]))[0].detach()


def make(tmp_path, model, tokenizer, sequences, **what):
    return capture(tmp_path, model, tokenizer, sequences, Capture(**what), batch=2, progress=False)


@pytest.mark.parametrize("which", ["model", "llama"])
def test_every_kind_says_what_the_teacher_says(tmp_path, tokenizer, sequences, which, request):
    teacher = request.getfixturevalue(which)
    for ids in teacher.parameters():
        ids.data *= 3  # far from uniform
    rows = torch.cat([teacher_rows(teacher, sequences[i])[: len(sequences[i]) - 1] for i in (3, 0)])
    student = torch.randn_like(rows)
    full = divergence(rows, student)
    real = torch.cat([torch.arange(8) < len(sequences[i]) - 1 for i in (3, 0)])
    found = {}
    for kind, size in (("full", 1), ("states", 1), ("topk", 24), ("sampled", 4000)):
        cache = make(tmp_path, teacher, tokenizer, sequences, kind=kind, size=size).check(tokenizer=tokenizer, sequences=sequences)
        assert cache.tokens(3).tolist() == sequences[3]
        signal = cache.signal([3, 0])[real.nonzero().squeeze(-1)]
        found[kind] = signal.divergence(student, "forward_kl", 1.0)
    torch.testing.assert_close(found["full"], full, atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(found["states"], full, atol=5e-3, rtol=5e-3)
    assert (found["topk"] <= full + 5e-3).all()
    assert (found["topk"] > 0.6 * full).all()
    log_probs = rows.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    torch.testing.assert_close(found["sampled"] - entropy, full, atol=0.15, rtol=0.1)


def test_bytes_per_token(tmp_path, model, tokenizer, sequences):
    assert make(tmp_path, model, tokenizer, sequences, size=8).bytes_per_token == 4 * 8 + 2
    assert make(tmp_path, model, tokenizer, sequences, kind="sampled", size=12).bytes_per_token == 24
    assert make(tmp_path, model, tokenizer, sequences, kind="sampled", size=12, kappa=0.5).bytes_per_token == 48
    assert make(tmp_path, model, tokenizer, sequences, kind="full").bytes_per_token == 2 * len(tokenizer)


def test_weights_stay_unbiased_under_a_flat_proposal(tmp_path, model, tokenizer):
    cache = make(tmp_path, model, tokenizer, [[3, 4]], kind="sampled", size=20_000, kappa=0.5)
    signal = cache.signal([0])
    estimate = torch.zeros(len(tokenizer)).index_add(0, signal.ids[0], signal.weights[0])
    torch.testing.assert_close(estimate, teacher_rows(model, [3, 4])[0].softmax(-1), atol=5e-3, rtol=0)


def test_a_killed_capture_goes_on_and_ends_the_same(tmp_path, model, tokenizer, sequences, monkeypatch):
    for what in ({"kind": "topk", "size": 4}, {"kind": "sampled", "size": 6}):
        whole = make(tmp_path / "whole", model, tokenizer, sequences, **what)
        read, calls = module._read, []

        def dies(*args, read=read, calls=calls):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return read(*args)

        monkeypatch.setattr(module, "_read", dies)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "killed", model, tokenizer, sequences, **what)
        folder = next(f for f in (tmp_path / "killed").glob("teacher-cache-*") if (f / "done.json").exists())
        assert json.loads((folder / "done.json").read_text()) == 2
        with (folder / "ids.bin").open("ab") as torn:
            torn.write(b"half a batch")
        resumed = make(tmp_path / "killed", model, tokenizer, sequences, **what)
        assert len(calls) == 4  # two before the kill, two after: the first batch was not read again
        monkeypatch.setattr(module, "_read", read)
        for name in whole.meta["columns"]:
            assert (resumed.folder / f"{name}.bin").read_bytes() == (whole.folder / f"{name}.bin").read_bytes()


def test_a_finished_cache_is_opened_and_other_weights_make_another(tmp_path, model, tokenizer, sequences, monkeypatch):
    first = make(tmp_path, model, tokenizer, sequences, size=4)
    read = module._read
    monkeypatch.setattr(module, "_read", None)
    assert make(tmp_path, model, tokenizer, sequences, size=4).folder == first.folder
    monkeypatch.setattr(module, "_read", read)
    model.head.weight.data += 1
    assert make(tmp_path, model, tokenizer, sequences, size=4).folder != first.folder


def test_other_text_or_another_tokenizer_is_refused(tmp_path, model, tokenizer, sequences):
    cache = TeacherCache(make(tmp_path, model, tokenizer, sequences, size=4).folder)
    with pytest.raises(UserError, match="another tokenizer"):
        cache.check(tokenizer=Characters("abc"))
    with pytest.raises(UserError, match="other text"):
        cache.check(sequences=[*sequences[:-1], sequences[-1][::-1]])


@pytest.mark.parametrize("which", ["model", "llama"])
def test_the_text_itself_has_its_log_probabilities(tmp_path, tokenizer, sequences, which, request):
    teacher = request.getfixturevalue(which)
    cache = make(tmp_path, teacher, tokenizer, sequences, kind="text")
    assert cache.bytes_per_token == 4
    wanted = []
    for i in (3, 0):
        rows, ids = teacher_rows(teacher, sequences[i]).log_softmax(-1), torch.tensor(sequences[i][1:])
        wanted.append(rows.gather(-1, ids[:, None]).squeeze(-1))
    torch.testing.assert_close(cache.log_probs([3, 0]), torch.cat(wanted))
    with pytest.raises(UserError, match="no distributions"):
        cache.signal([0])


def test_impossible_captures_are_explained(tmp_path, model, tokenizer):
    with pytest.raises(UserError, match="leave no rest"):
        make(tmp_path, model, tokenizer, [[3, 4]], size=len(tokenizer))
    with pytest.raises(UserError, match="at temperature 1"):
        make(tmp_path, model, tokenizer, [[3, 4]], kind="full", temperature=2.0)
    with pytest.raises(UserError, match="two tokens"):
        make(tmp_path, model, tokenizer, [[3]])
