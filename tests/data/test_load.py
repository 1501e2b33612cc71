import io
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from stillroom.core.errors import UserError
from stillroom.core.store import Store
from stillroom.data import load
from stillroom.data.batches import Batches
from stillroom.data.images import LazySplit, MemorySplit
from stillroom.data.load import load_images
from stillroom.nets.build import build


def picture(value: int, size: tuple[int, int] = (6, 6), mode: str = "RGB") -> Image.Image:
    pixels = np.full((size[1], size[0], 3), value, dtype=np.uint8)
    pixels[0, 0] = (255, 0, 0)
    return Image.fromarray(pixels).convert(mode)


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "png")
    return data.getvalue()


def write_folder(root: Path, test: str = "test", count: int = 4) -> Path:
    for split in ("train", test):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                picture(10 * label + number).save(root / split / name / f"{number}.png")
    return root


def write_table(file: Path, labels: list, images: list | None = None, names=("cat", "dog"), image="image", label="label") -> None:
    images = images or [png(picture(number)) for number in range(len(labels))]
    table = pa.table({image: pa.array([{"bytes": i, "path": None} for i in images]), label: labels})
    features = {image: {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else {}
    pq.write_table(table.replace_schema_metadata(metadata), file)


def write_tables(root: Path, **changes) -> Path:
    write_table(root / "train.parquet", [0, 1, 0, 1], **changes)
    write_table(root / "test.parquet", [1, 0], **changes)
    return root


def refused(*parts: str, spec: object, **options) -> None:
    with pytest.raises(UserError) as error:
        load_images(str(spec), seed=0, **options)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("test", ["test", "val"])
def test_folder_of_class_folders(tmp_path, test):
    (write_folder(tmp_path, test) / "train" / "cat" / "notes.txt").write_text("not an image")
    data = load_images(str(tmp_path), seed=0)
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.test), data.transfer) == (8, 8, None)
    assert data.train.images()[:, 0, 3, 3].mul(255).round().tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4
    assert (data.channels, data.size) == (3, 6)


def test_grey_folder_has_one_channel_and_refuses_colour(tmp_path):
    write_folder(tmp_path)
    for file in tmp_path.rglob("*.png"):
        picture(50, mode="L").save(file)
    assert load_images(str(tmp_path), seed=0).channels == 1
    for number in range(200):
        picture(50, mode="L").save(tmp_path / "train" / "cat" / f"more{number}.png")
    picture(50).save(tmp_path / "train" / "cat" / "more1.png")  # between the images that are looked at
    refused("more1.png", "colour", spec=tmp_path)


def test_pixels_of_sixteen_bits_are_refused(tmp_path):
    write_folder(tmp_path)
    Image.fromarray(np.full((6, 6), 40000, dtype=np.uint16)).save(tmp_path / "train" / "cat" / "0.png")
    refused("0.png", "8 bits", spec=tmp_path)


@pytest.mark.parametrize(("image", "label"), [("image", "label"), ("img", "fine_label"), ("img", "labels")])
def test_parquet(tmp_path, image, label):
    data = load_images(str(write_tables(tmp_path, image=image, label=label)), seed=0)
    assert data.classes == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 1, 0, 1]
    assert data.train.images()[:, 1, 2, 2].mul(255).round().tolist() == [0, 1, 2, 3]


def test_parquet_in_shards_under_data(tmp_path):
    (tmp_path / "data").mkdir()
    write_table(tmp_path / "data" / "train-00000-of-00002.parquet", [0, 1])
    write_table(tmp_path / "data" / "train-00001-of-00002.parquet", [1, 1])
    write_table(tmp_path / "data" / "validation-00000-of-00001.parquet", [0])
    data = load_images(str(tmp_path), seed=0)
    assert data.train.labels.tolist() == [0, 1, 1, 1]
    assert len(data.test) == 1


def test_parquet_without_declared_names(tmp_path):
    assert load_images(str(write_tables(tmp_path, names=())), seed=0).classes == ("0", "1")
    write_table(tmp_path / "train.parquet", ["pear", "fig"], names=())
    write_table(tmp_path / "test.parquet", ["fig"], names=())
    data = load_images(str(tmp_path), seed=0)
    assert data.classes == ("fig", "pear")
    assert data.train.labels.tolist() == [1, 0]
    write_table(tmp_path / "test.parquet", ["plum"], names=())
    refused("plum", "row 0 of", "test.parquet", spec=tmp_path)


def test_hub_id_is_read_as_the_same_files(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write_tables(tmp_path / "set")
    local = load_images(str(tmp_path / "set"), seed=0)
    for spec in (f"hub:{tmp_path}/set", f"hub:{tmp_path}/set@train,test"):
        data = load_images(spec, seed=0)
        assert data.classes == ("cat", "dog")
        assert data.fingerprint() == local.fingerprint()
    refused("@TRAIN,TEST", spec=f"hub:{tmp_path}/set@train,nowhere")
    refused("could not be loaded", spec=f"hub:{tmp_path}/nothing")
    (tmp_path / "broken").mkdir()
    for name in ("train", "test"):
        (tmp_path / "broken" / f"{name}.parquet").write_bytes(b"PAR1 nonsense")
    refused("could not be loaded", spec=f"hub:{tmp_path}/broken")


def test_labelled_images_are_balanced_and_the_others_transfer(tmp_path):
    data = load_images(str(write_folder(tmp_path, count=6)), seed=1, labelled=4)
    assert data.train.labels.bincount().tolist() == [2, 2]
    assert (data.transfer.labels == -1).all()
    values = [split.images()[:, 0, 3, 3].mul(255).round().tolist() for split in (data.train, data.transfer)]
    assert sorted(values[0] + values[1]) == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15]
    assert load_images(str(tmp_path), seed=1, labelled=4).fingerprint() == data.fingerprint()
    assert load_images(str(tmp_path), seed=2, labelled=4).fingerprint() != data.fingerprint()
    refused("13 labelled", "12 training", spec=tmp_path, labelled=13)
    refused("at least 1", spec=tmp_path, labelled=0)


def test_limit_keeps_a_balanced_part(tmp_path):
    data = load_images(str(write_folder(tmp_path)), seed=0, limit=4)
    assert data.train.labels.bincount().tolist() == data.test.labels.bincount().tolist() == [2, 2]


def test_embedded_sets_by_name():
    assert len(load_images("digits", seed=0).train) == 950
    data = load_images("digits", seed=0, labelled=50)
    assert (len(data.train), len(data.transfer), len(data.test)) == (50, 900, 847)
    assert load_images("shapes", seed=0, limit=30).channels == 3
    refused("fixed size", spec="digits", image_size=16)


def test_large_sets_stay_on_disk_and_agree(tmp_path, monkeypatch):
    memory = load_images(str(write_folder(tmp_path)), seed=0, labelled=4)
    monkeypatch.setattr(load, "MEMORY", 0)
    lazy = load_images(str(tmp_path), seed=0, labelled=4)
    assert isinstance(memory.train, MemorySplit)
    assert isinstance(lazy.train, LazySplit)
    assert isinstance(lazy.transfer, LazySplit)
    for one, two in ((memory.train, lazy.train), (memory.transfer, lazy.transfer), (memory.test, lazy.test)):
        assert torch.equal(one.images(), two.images())
        assert torch.equal(one.labels, two.labels)
    assert lazy.mean == memory.mean
    ahead, plain = Batches(lazy.train, 2, seed=0), Batches(memory.train, 2, seed=0)
    assert (ahead.workers > 0, plain.workers) == (True, 0)
    for step in (0, 0, 1, 1, 0):  # chunks of one step ask again; any other step starts anew
        assert torch.equal(ahead(step).images, plain(step).images)


def test_decoded_pixels_go_through_the_cache(tmp_path):
    calls = []

    def cache(name, build, *inputs):
        calls.append((name, build.__closure__, [getattr(i, "fingerprint", lambda i=i: i)() for i in inputs]))
        return build(*inputs)

    load_images(str(write_folder(tmp_path)), seed=0, cache=cache)
    load_images(str(tmp_path), seed=0, cache=cache)
    assert [call[:2] for call in calls] == [("pixels", None)] * 4
    assert calls[0][2][0] == calls[2][2][0] != calls[1][2][0]
    os.utime(tmp_path / "train" / "cat" / "0.png", (0, 0))
    load_images(str(tmp_path), seed=0, cache=cache)
    assert calls[4][2][0] != calls[0][2][0]


def test_the_store_keeps_decoded_pixels(tmp_path, monkeypatch):
    tables = tmp_path / "tables"
    tables.mkdir()
    write_tables(tables)
    cache = Store(tmp_path / "store").cached
    first = load_images(str(tables), seed=0, cache=cache)
    monkeypatch.setattr("stillroom.data.decode.Decoder.__call__", None)
    again = load_images(str(tables), seed=0, cache=cache)
    assert again.fingerprint() == first.fingerprint()


def test_image_size_scales_and_crops(tmp_path):
    write_folder(tmp_path)
    picture(7, size=(20, 10)).save(tmp_path / "train" / "cat" / "0.png")
    refused("20 x 10", "--image-size", spec=tmp_path)
    data = load_images(str(tmp_path), seed=0, image_size=5)
    assert data.train.images().shape == (8, 3, 5, 5)
    assert data.train.images()[0, 1, 3, 3].mul(255).round() == 7


def test_missing_and_empty_folders_say_what_is_understood(tmp_path):
    refused("no such folder", "train/CLASS", "train.parquet", spec=tmp_path / "nowhere")
    refused("no training images", "train/CLASS", spec=tmp_path)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    refused("no test split", spec=tmp_path)
    (tmp_path / "test").mkdir()
    refused("no images", spec=tmp_path)


def test_unknown_class_folder_of_the_test_split(tmp_path):
    (write_folder(tmp_path) / "test" / "fish").mkdir()
    refused("fish", spec=tmp_path)


@pytest.mark.parametrize("lazy", [False, True])
def test_corrupt_file_is_named_or_skipped(tmp_path, monkeypatch, lazy):
    monkeypatch.setattr(load, "MEMORY", 0 if lazy else 2**30)
    bad = write_folder(tmp_path) / "train" / "dog" / "1.png"
    before = load_images(str(tmp_path), seed=0)
    bad.write_bytes(bad.read_bytes()[:60])
    refused("dog/1.png", "--skip-bad", spec=tmp_path)
    if lazy:  # a file that breaks during the run is named by the worker that reads it
        with pytest.raises(UserError, match=r"dog/1\.png") as error:
            Batches(before.train, 8, seed=0, workers=1)(0)
        assert "Traceback" not in str(error.value)
    with pytest.warns(UserWarning, match="1 of 16 images"):
        data = load_images(str(tmp_path), seed=0, skip_bad=True)
    assert data.train.labels.tolist() == [0] * 4 + [1] * 3
    assert data.train.images()[:, 0, 3, 3].mul(255).round().tolist() == [0, 1, 2, 3, 10, 12, 13]


def test_undecodable_row_is_named_or_skipped(tmp_path):
    write_tables(tmp_path)
    good = [png(picture(number)) for number in range(3)]
    for bad in (b"nonsense", None, good[2][:50]):
        write_table(tmp_path / "train.parquet", [0, 1, 1], images=[good[0], bad, good[2]])
        refused("row 1 of", "train.parquet", spec=tmp_path)
        with pytest.warns(UserWarning, match="1 of 5"):
            assert load_images(str(tmp_path), seed=0, skip_bad=True).train.labels.tolist() == [0, 1]


def test_nothing_readable(tmp_path):
    for file in write_folder(tmp_path).rglob("*.png"):
        file.write_bytes(b"nonsense")
    refused("not a readable image", spec=tmp_path, skip_bad=True)


def test_truncated_parquet_is_named(tmp_path):
    file = write_tables(tmp_path) / "test.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    refused("test.parquet", "truncated", spec=tmp_path, skip_bad=True)


@pytest.mark.parametrize("label", [2, -1, None])
def test_label_outside_the_classes(tmp_path, label):
    write_tables(tmp_path)
    write_table(tmp_path / "train-1.parquet", [0, label])
    refused("row 1 of", "train-1.parquet", repr(label), "2 classes", spec=tmp_path)


@pytest.mark.parametrize("label", [10**12, 0.5, [1], {"a": 1}])
def test_labels_without_declared_classes_have_a_range_and_a_type(tmp_path, label):
    write_tables(tmp_path, names=())
    write_table(tmp_path / "train.parquet", [label, label], names=())
    write_table(tmp_path / "test.parquet", [label], names=())
    refused("row 0 of", "train.parquet", "label is", spec=tmp_path)


@pytest.mark.parametrize("metadata", [b"{", b"[1]", b'{"info": {"features": 3}}', b'{"info": {"features": {"label": {"names": "ab"}}}}'])
def test_damaged_metadata_of_a_table_are_named(tmp_path, metadata):
    table = pq.read_table(write_tables(tmp_path) / "train.parquet")
    pq.write_table(table.replace_schema_metadata({b"huggingface": metadata}), tmp_path / "train.parquet")
    refused("train.parquet", "metadata", spec=tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_only_regular_files_are_read(tmp_path, kind):
    odd = write_folder(tmp_path) / "train" / "dog" / "odd.png"
    if kind == "pipe":
        os.mkfifo(odd)  # reading it would wait for a writer
    elif kind == "folder":
        odd.mkdir()
    else:
        odd.symlink_to(tmp_path / "nothing")
    refused("dog/odd.png", "regular file", "--skip-bad", spec=tmp_path)
    with pytest.warns(UserWarning, match="1 of 17"):
        assert len(load_images(str(tmp_path), seed=0, skip_bad=True, cache=Store(tmp_path / "store").cached).train) == 8


def test_a_cell_that_points_to_a_pipe_is_not_read(tmp_path):
    write_tables(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    images = [{"bytes": None, "path": str(tmp_path / "pipe.png")}, {"bytes": png(picture(1)), "path": None}]
    pq.write_table(pa.table({"image": pa.array(images), "label": [0, 1]}), tmp_path / "train.parquet")
    refused("row 0 of", "train.parquet", "regular file", spec=tmp_path)
    (tmp_path / "train.parquet").unlink()
    os.mkfifo(tmp_path / "train.parquet")
    refused("no training images", spec=tmp_path)


def test_a_file_larger_than_any_image_is_not_read(tmp_path):
    file = write_folder(tmp_path) / "train" / "dog" / "1.png"
    with file.open("r+b") as opened:
        opened.truncate(2**40)  # a hole, which takes no room on the disk
    refused("dog/1.png", "bytes", spec=tmp_path)


def test_pictures_of_one_pixel(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            picture(5, (1, 1)).save(tmp_path / split / name / "0.png")
    data = load_images(str(tmp_path), seed=0)
    assert data.train.images().shape == (2, 3, 1, 1)
    shape = {"classes": 2, "channels": 3, "size": 1, "mean": data.mean, "std": data.std}
    for name in ("mlp-4", "resnet8", "residual-mlp-w4-d1", "preact-resnet18", "vit-p1-w16-d1"):
        assert build(name, **shape).eval()(data.train.images()).isfinite().all()
    for name in ("convnet", "convnet-avg-4", "vit-p2-w16-d1"):
        with pytest.raises(UserError, match=name):
            build(name, **shape)


def test_readers_that_fail_in_their_own_ways_name_the_file(tmp_path, monkeypatch):
    write_folder(tmp_path)
    monkeypatch.setattr("PIL.Image.Image.convert", lambda *_: 1 / 0)
    refused("cat/0.png", "not a readable image", spec=tmp_path)
    refused("at most", spec=tmp_path, image_size=10**8)


def test_parquet_without_the_columns_or_rows(tmp_path):
    write_tables(tmp_path, image="photo")
    refused("no column image", "photo", spec=tmp_path)
    write_tables(tmp_path)
    write_table(tmp_path / "train-1.parquet", [0], label="fine_label")
    refused("different columns", spec=tmp_path)
    (tmp_path / "train-1.parquet").unlink()
    write_table(tmp_path / "test.parquet", [])
    refused("no rows", spec=tmp_path)


@pytest.mark.parametrize(("module", "extra"), [("pyarrow.parquet", "images"), ("PIL", "images"), ("datasets", "hub")])
def test_missing_package_names_the_extra(tmp_path, monkeypatch, module, extra):
    write_tables(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    refused(f"stillroom[{extra}]", spec=f"hub:{tmp_path}" if module == "datasets" else tmp_path)


@pytest.mark.skipif("STILLROOM_DATA" not in os.environ, reason="STILLROOM_DATA names no folder of data sets")
def test_cifar10():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_images(f"{os.environ['STILLROOM_DATA']}/cifar10", seed=0, limit=500, labelled=100)
    assert (len(data.train), len(data.transfer), len(data.test)) == (100, 400, 500)
    assert data.classes[0] == "airplane"
    torch.testing.assert_close(torch.tensor(data.mean), torch.tensor([0.4914, 0.4822, 0.4465]), atol=0.03, rtol=0)
