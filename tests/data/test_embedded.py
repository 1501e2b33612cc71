import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from stillroom.core.errors import UserError
from stillroom.data.batches import Batches
from stillroom.data.embedded import SHAPES, digits, shapes, spiral
from stillroom.data.images import ImageData, LazySplit, MemorySplit, balanced_rows, statistics


class Constant:
    """A decoder whose image of row r is filled with r."""

    def __call__(self, row: int) -> torch.Tensor:
        return torch.full((1, 2, 2), row, dtype=torch.uint8)

    def fingerprint(self) -> str:
        return "constant"


def rows_of(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_digits_parts_are_disjoint_balanced_and_complete():
    data = digits(seed=3, labelled=50, transfer=900)
    assert (len(data.train), len(data.transfer), len(data.test)) == (50, 900, 847)
    assert data.train.labels.bincount().tolist() == [5] * 10
    assert (data.transfer.labels == -1).all()
    parts = [rows_of(split.images()) for split in (data.train, data.transfer, data.test)]
    everything = rows_of(torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16)
    assert set.union(*parts) == everything
    assert sum(map(len, parts)) == len(everything)  # all 1797 digits differ
    assert (data.channels, data.size, len(data.classes)) == (1, 8, 10)
    assert data.train.images().max() == 1


def test_digits_labels_are_those_of_scikit_learn():
    bunch = load_digits()
    known = {(image / 16).astype(np.float32).tobytes(): label for image, label in zip(bunch.images, bunch.target)}
    data = digits(seed=1)
    for split in (data.train, data.test):
        assert [known[image.numpy().tobytes()] for image in split.images()] == split.labels.tolist()


def test_digits_noise_touches_only_a_share_of_the_training_labels():
    clean, noisy = digits(seed=5, labelled=200, transfer=0), digits(seed=5, labelled=200, transfer=0, noise=0.5)
    assert clean.transfer is None
    assert torch.equal(clean.train.images(), noisy.train.images())
    assert torch.equal(clean.test.labels, noisy.test.labels)
    changed = int((clean.train.labels != noisy.train.labels).sum())
    assert 75 <= changed <= 100  # 100 replaced, a tenth of them by the true label
    assert clean.fingerprint() != noisy.fingerprint()


def test_digits_is_seeded():
    assert digits(seed=1).fingerprint() == digits(seed=1).fingerprint() != digits(seed=2).fingerprint()


@pytest.mark.parametrize("wrong", [{"labelled": 0}, {"labelled": 1797, "transfer": 0}, {"transfer": -1}, {"noise": 1.5}])
def test_digits_refuses_impossible_parts(wrong):
    with pytest.raises(UserError):
        digits(**wrong)


def test_shapes_classes_are_balanced_and_learnable():
    data = shapes(seed=0, count=300, size=16)
    assert data.train.pixels.shape == (300, 3, 16, 16)
    assert data.classes == SHAPES
    assert data.train.labels.bincount().min() >= 40
    assert data.fingerprint() == shapes(seed=0, count=300, size=16).fingerprint()


def test_statistics_are_those_of_the_images():
    data = shapes(seed=0, count=60, size=8)
    images = data.train.images()
    torch.testing.assert_close(torch.tensor(data.mean), images.mean((0, 2, 3)))
    torch.testing.assert_close(torch.tensor(data.std), images.std((0, 2, 3), correction=0))
    assert (data.mean, data.std) == statistics(data.train)


def test_batches_are_a_pure_function_of_seed_and_step():
    split = digits().transfer
    batches = Batches(split, 64, seed=7)
    assert batches.steps_per_epoch == 14
    assert [batches.epoch(step) for step in (0, 13, 14)] == [0, 0, 1]
    straight = [batches(step) for step in range(30)]
    again = Batches(split, 64, seed=7)
    for step in (29, 3, 17):
        for one, two in zip(straight[step], again(step)):
            assert torch.equal(one, two)
    assert not torch.equal(straight[0].index, Batches(split, 64, seed=8)(0).index)
    assert not torch.equal(straight[0].index, straight[14].index)
    seen = torch.cat([batch.index for batch in straight[:14]])
    assert seen.unique().numel() == 14 * 64


def test_batch_rows_belong_together():
    pixels = torch.arange(20, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    batch = Batches(MemorySplit(pixels, torch.arange(20) * 2), 6, seed=0)(2)
    assert torch.equal(batch.labels, batch.index * 2)
    torch.testing.assert_close(batch.images[:, 0, 0, 0], batch.index / 255)
    assert batch.images.dtype == torch.float32


def test_a_small_split_is_used_whole():
    batches = Batches(MemorySplit(torch.zeros(5, 1, 2, 2), torch.arange(5)), 32, seed=0)
    assert batches.steps_per_epoch == 1
    assert sorted(batches(4).index.tolist()) == [0, 1, 2, 3, 4]
    with pytest.raises(UserError):
        Batches(MemorySplit(torch.zeros(0, 1, 2, 2), torch.zeros(0)), 32, seed=0)


def test_prefetching_gives_the_same_batches_and_leaves_the_generator_alone():
    split = LazySplit(Constant(), torch.arange(40))
    plain, ahead = Batches(split, 8, seed=1), Batches(split, 8, seed=1, workers=1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for step in (0, 1, 2, 7, 8, 3):
        for one, two in zip(plain(step), ahead(step)):
            assert torch.equal(one, two)
    assert torch.equal(before, torch.get_rng_state())


def test_lazy_and_memory_splits_agree():
    pixels = torch.stack([Constant()(row) for row in range(12)])
    memory, lazy = MemorySplit(pixels, torch.arange(12)), LazySplit(Constant(), torch.arange(12))
    rows = torch.tensor([7, 2, 9])
    for one, two in zip(memory.subset(rows).take(torch.tensor([2, 0])), lazy.subset(rows).take(torch.tensor([2, 0]))):
        assert torch.equal(one, two)
    assert torch.equal(memory.images(), lazy.to("cpu").images())
    assert lazy.fingerprint() != lazy.subset(rows).fingerprint()


def test_balanced_rows_exhaust_small_classes():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 50)
    rows = balanced_rows(labels, 23, torch.Generator().manual_seed(0))
    assert labels[rows].bincount().tolist() == [10, 3, 10]
    assert rows.unique().numel() == 23


def test_moving_keeps_the_task():
    data = digits().to("cpu")
    assert isinstance(data, ImageData)
    assert data.fingerprint() == digits().fingerprint()


def test_spiral_arms_turn_with_the_radius():
    data = spiral(3, count=4000)
    assert (data.channels, data.size, len(data.train), len(data.test)) == (2, 1, 4000, 1000)
    assert data.train.labels.bincount().tolist() == pytest.approx([800] * 5, abs=60)
    points = data.train.images().flatten(1).double() * 2 - 1
    assert 0 <= float(data.train.images().min()) <= float(data.train.images().max()) <= 1
    radius = points.norm(dim=1)
    assert float((radius ** (1 / 0.7)).mean()) == pytest.approx(0.5, abs=0.02)  # radius^(1/0.7) is uniform
    angle = torch.atan2(points[:, 1], points[:, 0]) - 2 * torch.pi / 5 * data.train.labels - 12 * radius
    noise = torch.remainder(angle + torch.pi, 2 * torch.pi) - torch.pi
    assert float(noise.std()) == pytest.approx(0.25, abs=0.01)
    assert torch.equal(spiral(3, count=4000).train.images(), data.train.images())
