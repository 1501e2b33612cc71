"""Selection by a teacher's answers, and splits of several sources as one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from stillroom.core.errors import UserError
from stillroom.data.images import ImageData, LazySplit, MemorySplit
from stillroom.data.select import Pooled, copies, pooled, top_per_class
from stillroom.data.unlabelled import load_unlabelled


def logits_of(probabilities: list[list[float]]) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def test_the_surest_of_each_predicted_class_are_kept_and_no_class_crowds_out_another() -> None:
    logits = logits_of([[0.9, 0.1, 0.0], [0.8, 0.1, 0.1], [0.7, 0.3, 0.0], [0.2, 0.6, 0.2], [0.3, 0.5, 0.2], [0.95, 0.0, 0.05]])
    assert top_per_class(logits, 2).tolist() == [0, 3, 4, 5]  # of class 0 the rows 5 and 0, of class 1 both that there are, of class 2 none
    assert top_per_class(logits, 1).tolist() == [3, 5]
    assert top_per_class(logits, 99).tolist() == list(range(6))


def test_rank_is_by_probability_not_by_logit() -> None:
    assert top_per_class(torch.tensor([[10.0, 9.9], [1.0, -5.0]]), 1).tolist() == [1]


def test_selection_equals_a_loop_over_classes() -> None:
    logits = torch.randn(200, 7, generator=torch.Generator().manual_seed(0))
    p, c = logits.softmax(-1).max(-1)
    by_hand = [i for label in range(7) for i in sorted((c == label).nonzero().flatten().tolist(), key=lambda i: -float(p[i]))[:5]]
    assert top_per_class(logits, 5).tolist() == sorted(by_hand)


def grey(*values: float) -> MemorySplit:
    return MemorySplit(torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone(), torch.arange(len(values)))


def test_copies_are_equal_in_every_pixel() -> None:
    pool, test = grey(0.0, 0.5, 1.0), grey(1.0, 0.25)
    assert copies(pool, test).tolist() == [False, False, True]
    pool.pixels[2, 0, 0, 0] = 0.9
    assert not copies(pool, test).any()


class Decode:
    """Row i is an image of the grey value i."""

    def __call__(self, row: int) -> torch.Tensor:
        return torch.full((1, 2, 2), row, dtype=torch.uint8)

    def fingerprint(self) -> str:
        return "rows"


@pytest.fixture
def both() -> Pooled:
    split = pooled(grey(0.25, 0.75), LazySplit(Decode(), torch.tensor([7, 8, 9]), torch.tensor([10, 20, 30])))
    assert isinstance(split, Pooled)
    return split


def test_two_sources_are_one_split(both: Pooled) -> None:
    batch = both.take(torch.tensor([4, 0, 2, 1, 2]))
    assert batch.labels.tolist() == [9, 0, 7, 1, 7]
    assert batch.images[:, 0, 0, 0].tolist() == pytest.approx([30 / 255, 0.25, 10 / 255, 0.75, 10 / 255])
    assert len(both) == 5
    assert both.images()[:, 0, 0, 0].tolist() == pytest.approx([0.25, 0.75, 10 / 255, 20 / 255, 30 / 255])


def test_parts_of_a_pool_keep_their_place_and_labels(both: Pooled) -> None:
    part = both.subset(torch.tensor([3, 1]))
    assert part.labels.tolist() == [8, 1]
    assert part.take(torch.tensor([0, 1])).images[:, 0, 0, 0].tolist() == pytest.approx([20 / 255, 0.75])
    again = part.subset(torch.tensor([1]), torch.tensor([-1]))
    assert again.labels.tolist() == [-1]
    assert again.images()[:, 0, 0, 0].tolist() == [0.75]
    assert part.fingerprint() != both.fingerprint() != again.fingerprint()


def test_what_is_in_memory_stays_in_memory() -> None:
    assert isinstance(pooled(grey(0.1), grey(0.2)), MemorySplit)


def folder(root, *names: str) -> None:
    for i, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((12, 9), 20 * i, dtype=np.uint8)).save(file)


@pytest.fixture
def like() -> ImageData:
    return ImageData.of("like", grey(0.1, 0.2), grey(0.3), ("a", "b"))


def test_a_folder_without_labels_is_read_with_the_folders_in_it(tmp_path, like) -> None:
    folder(tmp_path, "a.png", "deep/er/b.png", ".hidden.png")
    (tmp_path / "notes.txt").write_text("no image")
    pool = load_unlabelled(tmp_path, like)
    assert pool.labels.tolist() == [-1, -1]
    assert pool.images().shape == (2, 1, 2, 2)
    assert pool.images()[:, 0, 0, 0].tolist() == pytest.approx([0.0, 20 / 255])


def test_what_cannot_be_read_is_named_or_left_out(tmp_path, like) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_unlabelled(tmp_path / "none", like)
    with pytest.raises(UserError, match="no images"):
        load_unlabelled(tmp_path, like)
    folder(tmp_path, "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"bad\.png"):
        load_unlabelled(tmp_path, like)
    assert len(load_unlabelled(tmp_path, like, skip_bad=True)) == 1
