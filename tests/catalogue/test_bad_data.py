"""Data, weights and teachers that are wrong, as the command meets them: named, not executed, and nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest

from stillroom.cli import main
from tests.command import TINY, files, refused


def images(root: Path, classes: int = 2, each: int = 6) -> Path:
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(classes):
            (root / split / f"class{label}").mkdir(parents=True)
            for i in range(each):
                pixels = random.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / f"class{label}" / f"{i}.png")
    return root


def table(root: Path, labels: list[int]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir(exist_ok=True)
    png = (images(root / "source") / "train" / "class0" / "0.png").read_bytes()
    feature = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    for split, values in (("train", labels), ("test", [0, 1])):
        columns = pa.table({"image": [{"bytes": png, "path": None}] * len(values), "label": values})
        pq.write_table(
            columns.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": feature}})}), root / f"{split}.parquet"
        )
    return root


def no_data(place: Path) -> list[str]:
    return [str(place / "nowhere")]


def empty_data(place: Path) -> list[str]:
    (place / "nowhere").mkdir()
    return [str(place / "nowhere")]


def no_test_images(place: Path) -> list[str]:
    root = images(place / "nowhere")
    (root / "test").rename(root / "elsewhere")
    return [str(root)]


def corrupt_image(place: Path) -> list[str]:
    file = images(place / "d") / "train" / "class1" / "3.png"
    file.write_bytes(b"\x89PNG but no more")
    return [str(place / "d"), str(file), "--skip-bad"]


def truncated_parquet(place: Path) -> list[str]:
    file = table(place / "d", [0, 1, 0, 1]) / "train.parquet"
    file.write_bytes(file.read_bytes()[:-40])
    return [str(place / "d"), str(file), "truncated"]


def label_outside(place: Path) -> list[str]:
    return [str(table(place / "d", [0, 1, 7, 1])), "row 2 of", "train.parquet", "7"]


@pytest.mark.parametrize("wrong", [no_data, empty_data, no_test_images, corrupt_image, truncated_parquet, label_outside])
def test_wrong_data_is_named_and_the_command_can_be_corrected_in_place(wrong, work: Path, tmp_path: Path, capsys) -> None:
    place = tmp_path / "data"
    place.mkdir()
    data, *parts = wrong(place)
    message = refused(capsys, "run", "kd", "--data", data, "--labelled", "0", "--out", "r", *TINY, code=1)
    for part in [data, *parts]:
        assert part in message
    assert files(work) == [], "nothing half-written, so that the corrected command may use the same folder"
    if wrong is no_data:
        assert main(["run", "kd", "--out", "r", *TINY]) == 0


def test_skip_bad_continues_and_counts(work: Path, tmp_path: Path, capsys) -> None:
    data, *_ = corrupt_image(tmp_path)
    words = ["run", "kd", "--data", data, "--labelled", "0", "--batch-size", "4", "--no-baseline", "--out", "r", *TINY]
    with pytest.warns(UserWarning, match="1 of 24 images could not be read"):
        assert main([*words, "--skip-bad"]) == 0
    assert (work / "r" / "report.html").exists()


def test_teacher_and_data_with_different_class_counts(work: Path, tmp_path: Path, finished: Path, capsys) -> None:
    words = ["run", "kd", "--data", str(images(tmp_path / "d", classes=3)), "--labelled", "0", "--teacher", f"run:{finished}", "--out", "r"]
    message = refused(capsys, *words, *TINY, code=1)
    assert "tells 10 classes apart" in message
    assert "has 3" in message
    assert files(work) == []


class Hostile:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_pickled_weights_are_refused_and_never_executed(work: Path, tmp_path: Path, finished: Path, capsys) -> None:
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "config.json").write_text((finished / "student" / "config.json").read_text())
    for name in ("pytorch_model.bin", "model.safetensors"):  # as itself, and under a false name
        (folder / name).write_bytes(pickle.dumps(Hostile(tmp_path / "executed")))
        message = refused(capsys, "run", "kd", "--teacher", f"run:{folder}", "--out", "r", *TINY, code=1)
        assert name in message
    assert "could not be read" in message
    assert not (tmp_path / "executed").exists()
    assert files(work) == []
