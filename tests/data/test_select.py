"""Selection from a pool: per predicted class, without test images, from a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stillroom.core.errors import UserError
from stillroom.data.decode import BadImage
from stillroom.data.images import MemorySplit
from stillroom.data.select import duplicates, load_pool, top_per_class


def test_top_per_class_by_brute_force() -> None:
    logits = 3 * torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    p = logits.double().softmax(1)
    expected = []
    for label in range(5):
        own = [row for row in range(200) if int(p[row].argmax()) == label]
        expected += sorted(own, key=lambda row: -float(p[row, label]))[:7]
    assert top_per_class(logits, 7).tolist() == sorted(expected)


def test_no_class_crowds_out_another_and_a_small_one_gives_all() -> None:
    """By rank alone the first class would take all four places; the second has a single image, the third none."""
    logits = torch.tensor([[9.0, 0, 0], [8.0, 0, 0], [7.0, 0, 0], [1.0, 1.5, 0]])
    assert top_per_class(logits, 2).tolist() == [0, 1, 3]
    assert top_per_class(torch.zeros(4, 3), 2).tolist() == [0, 1]  # ties: the earlier
    assert top_per_class(torch.empty(0, 3), 2).tolist() == []


def test_duplicates_are_found_by_content() -> None:
    test = MemorySplit(torch.rand(3, 1, 4, 4), torch.zeros(3))
    pool = MemorySplit(torch.cat([torch.rand(2, 1, 4, 4), test.pixels[1:2], test.pixels[:1] + 1e-3]), torch.full((4,), -1))
    assert duplicates(pool, test).tolist() == [False, False, True, False]


def test_a_folder_of_images(tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image")
    build = lambda name, make, *inputs: make(*inputs)
    (tmp_path / "below").mkdir()
    for name, value in (("b.png", 20), ("below/a.png", 200)):
        Image.fromarray(np.full((6, 9), value, np.uint8)).save(tmp_path / name)
    pool = load_pool(tmp_path, 1, 4, build)
    assert pool.pixels.shape == (2, 1, 4, 4)
    assert pool.pixels.float().mean((1, 2, 3)).tolist() == [20, 200]
    assert pool.labels.tolist() == [-1, -1]
    (tmp_path / "below" / "c.png").write_bytes(b"no image")
    with pytest.raises(BadImage, match=r"c\.png"):
        load_pool(tmp_path, 1, 4, build)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images were found"):
        load_pool(tmp_path / "empty", 1, 4, build)
