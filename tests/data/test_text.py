import json

import pytest
import torch

from stillroom.core.errors import UserError
from stillroom.data.text import load_texts


class Letters:
    """A tokenizer by transformers' call: one id a letter, padded with 0 to the longest of the call."""

    def __call__(self, texts, *, truncation, max_length, padding, return_tensors):
        rows = [[ord(c) - 96 for c in text][:max_length] for text in texts]
        width = max(map(len, rows))
        return {"input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows])}


def write(folder, name, rows):
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def load(folder, **changes):
    return load_texts(str(folder), Letters(), **{"seed": 0, "length": 5} | changes)


def test_ids_labels_and_classes(tmp_path):
    write(tmp_path, "train", [{"text": "abc", "label": "pos"}, {"text": "abcdefgh", "label": "neg"}])
    write(tmp_path, "validation", [{"text": "b", "label": "neg"}])
    data = load(tmp_path)
    assert data.classes == ("neg", "pos")
    assert data.train.ids.tolist() == [[1, 2, 3, 0, 0], [1, 2, 3, 4, 5]]
    assert data.train.labels.tolist() == [1, 0]
    assert data.test.take(torch.tensor([0])).images.tolist() == [[2]]
    assert data.test.labels.tolist() == [0]


def test_numbered_classes_keep_their_order(tmp_path):
    rows = [{"sentence": "a", "labels": i} for i in (10, 2, 0)]
    write(tmp_path, "train", rows)
    write(tmp_path, "test", rows)
    assert load(tmp_path).classes == ("0", "2", "10")


def test_labelled_is_balanced_and_seeded(tmp_path):
    rows = [{"text": chr(97 + i), "label": i % 2} for i in range(20)]
    write(tmp_path, "train", rows)
    write(tmp_path, "test", rows)
    one, two, other = (load(tmp_path, labelled=6, seed=seed).train for seed in (0, 0, 1))
    assert one.labels.sum() == 3
    assert torch.equal(one.ids, two.ids)
    assert not torch.equal(one.ids, other.ids)
    assert len(load(tmp_path, limit=4).test) == 4
    assert one.fingerprint() == two.fingerprint() != other.fingerprint()


def test_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name in ("train", "test"):
        parquet.write_table(pyarrow.table({"text": ["ab", "c"], "label": [1, 0]}), tmp_path / f"{name}.parquet")
    assert load(tmp_path).train.ids.tolist() == [[1, 2], [3, 0]]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([{"text": "a", "label": 0}], [{"text": "a", "label": 1}], r"test\.jsonl, row 1: the label '?1'? of a test text is not among"),
        ([{"text": "a", "label": [0]}], [{"text": "a", "label": 0}], r"train\.jsonl, row 1: the label is \[0\]"),
        ([{"text": "a", "label": 0.5}], [{"text": "a", "label": 0}], r"train\.jsonl, row 1: the label is 0\.5"),
        ([3], [{"text": "a", "label": 0}], r"train\.jsonl, line 1: 3 is no object"),
        ([{"words": "a", "label": 0}], [{"text": "a", "label": 0}], "no text or no label among the columns words, label"),
        ([{"text": "a", "label": 0}, {"text": None, "label": 0}], [{"text": "a", "label": 0}], "row 2: text and label must both"),
        ([], [{"text": "a", "label": 0}], "there are no texts"),
    ],
)
def test_bad_texts_are_named(train, test, message, tmp_path):
    write(tmp_path, "train", train)
    write(tmp_path, "test", test)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no training or no test texts"):
        load(tmp_path)
    write(tmp_path, "test", [{"text": "a", "label": 0}])
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 0}\n{"text"')
    with pytest.raises(UserError, match=r"train\.jsonl, line 2: not readable JSON"):
        load(tmp_path)
    (tmp_path / "train.jsonl").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"train\.jsonl, line 1: not readable JSON"):
        load(tmp_path)
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(UserError, match=r"train\.jsonl: not readable as UTF-8"):
        load(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(UserError, match="not a readable parquet"):
        load(tmp_path)


def test_a_line_ends_only_at_a_line_feed(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(
            json.dumps({"text": "a\u2028b", "label": 0}, ensure_ascii=False) + "\r\n\n", encoding="utf-8"
        )
    assert load(tmp_path).train.ids.shape == (1, 3)
