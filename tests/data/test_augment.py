import subprocess
import sys

import pytest
import torch
from torch.nn.functional import pad

from stillroom.core.errors import UserError
from stillroom.data.augment import augmenter


def windows(image: torch.Tensor, reach: int, flips: bool) -> list[torch.Tensor]:
    """Every image that the augmentation can make."""
    size, wide = image.shape[-1], pad(image, (reach,) * 4)
    shifted = [wide[:, y : y + size, x : x + size] for y in range(2 * reach + 1) for x in range(2 * reach + 1)]
    return shifted + [image.flip(-1) for image in shifted] if flips else shifted


@pytest.mark.parametrize(("kind", "reach", "flips", "channels", "size"), [("shift", 1, False, 1, 8), ("crop-flip", 4, True, 3, 12)])
def test_each_image_becomes_one_of_its_windows(kind, reach, flips, channels, size):
    torch.manual_seed(0)
    images = torch.rand(64, channels, size, size)
    augmented = augmenter(kind, size)(images)
    chosen = []
    for image, result in zip(images, augmented):
        found = [number for number, window in enumerate(windows(image, reach, flips)) if torch.equal(window, result)]
        assert len(found) == 1
        chosen += found
    assert len(set(chosen)) > (5 if kind == "shift" else 30)  # each image has its own draw


def test_the_draws_come_from_torch():
    images, augment = torch.rand(16, 3, 8, 8), augmenter("crop-flip", 8)
    results = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        results.append(augment(images))
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize("kind", ["shift", "crop-flip"])
def test_draws_and_pixels_are_those_of_kornias_modules_without_their_matrices(kind, monkeypatch):
    """Which it would send to an accelerator at every call."""
    import kornia.augmentation as kornia

    images, ours = torch.rand(32, 3, 12, 12), augmenter(kind, 12)
    crop = kornia.RandomCrop((12, 12), padding=1 if kind == "shift" else 4)
    whole = crop if kind == "shift" else torch.nn.Sequential(crop, kornia.RandomHorizontalFlip())
    torch.manual_seed(3)
    expected, state = whole(images), torch.get_rng_state()
    monkeypatch.setattr(kornia.RandomCrop, "compute_transformation", None)
    monkeypatch.setattr(kornia.RandomHorizontalFlip, "compute_transformation", None)
    torch.manual_seed(3)
    assert torch.equal(ours(images), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_none_is_the_identity_and_imports_nothing():
    images = torch.rand(2, 1, 8, 8)
    assert augmenter("none", 8)(images) is images
    code = (
        "import sys, stillroom.data.load, stillroom.data.batches, stillroom.data.augment as augment; augment.augmenter('none', 8); "
        "heavy = {'kornia', 'PIL', 'pyarrow', 'datasets', 'sklearn'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_kornia_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    with pytest.raises(UserError, match=r"stillroom\[images\]"):
        augmenter("shift", 8)
