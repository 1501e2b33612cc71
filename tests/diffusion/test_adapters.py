"""Saved adapters that are damaged or another network's: a message that names the file."""

import os
from pathlib import Path

import pytest

from stillroom.adapt import lora
from stillroom.core.errors import UserError
from stillroom.diffusion import adapters
from stillroom.nets.denoisers import PointNet
from tests.damage import rewrite, survives


@pytest.fixture
def folder(tmp_path) -> Path:
    adapters.save(adapters.Adapters(PointNet(2, 16, 2), "offset", 8, 1.0), tmp_path)
    return tmp_path


def load(folder: Path, width: int = 16) -> None:
    adapters.load(folder, PointNet(2, width, 2))


@pytest.mark.parametrize(
    ("field", "value"),
    [("kind", "x"), ("kind", 3), ("width", 0), ("width", 2**20), ("width", None), ("scale_w", "x"), ("scale_w", None), ("more", 1)],
)
def test_a_field_is_named(field, value, folder):
    load(folder)
    rewrite(folder / "adapters.json", **{field: value})
    with pytest.raises(UserError, match=rf"adapters\.json: .*{field}"):
        load(folder)


def test_tensors_of_another_network_or_none_are_refused(folder):
    with pytest.raises(UserError, match=r"adapters\.safetensors could not be read"):
        load(folder, width=32)
    tensors = folder / "adapters.safetensors"
    tensors.write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match=r"adapters\.safetensors could not be read"):
        load(folder)
    tensors.unlink()
    os.mkfifo(tensors)
    with pytest.raises(UserError, match=r"adapters\.safetensors is not a file"):
        load(folder)


def test_mutants_are_refused_or_load(folder):
    file = folder / "adapters.json"
    assert survives(lambda: load(folder), file, file.read_text(), 100) > 50


def test_damaged_lora_is_said(tmp_path):
    (tmp_path / lora.FILE).write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match=lora.FILE):
        lora.load(lora.add(PointNet(2, 16, 2), 2), tmp_path)
