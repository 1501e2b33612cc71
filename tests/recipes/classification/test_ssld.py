"""SSLD: what the student learns from and with which loss, the pool, both stages, and a transformers model with a folder as pool."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stillroom import cli
from stillroom.core.config import check
from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.data.batches import Batches
from stillroom.data.embedded import digits
from stillroom.data.images import ImageData, LazySplit, MemorySplit, join
from stillroom.data.select import top_per_class
from stillroom.recipes.classification import ssld
from stillroom.testing import trace
from stillroom.vision import hub
from tests.recipes.common import assert_resumes


@pytest.fixture(scope="module")
def data() -> ImageData:
    return digits(0, labelled=40, transfer=60)


@pytest.fixture(scope="module")
def teacher(data) -> torch.nn.Module:
    torch.manual_seed(0)
    return hub.load_classifier("small:mlp-64", data=data, fresh=True).eval()


@pytest.mark.parametrize("name", ssld.LOSSES)
def test_losses_in_float64(name: str) -> None:
    t, s = (3 * torch.randn(6, 5, dtype=torch.float64) for _ in range(2))
    p, q = t.softmax(1), s.softmax(1)
    m = (p + q) / 2
    kl = lambda a, b: (a * (a / b).log()).sum(1)
    expected = {"jeffreys": (kl(p, q) + kl(q, p)) / 2, "js": (kl(p, m) + kl(q, m)) / 2, "kl": kl(p, q), "ce": -(p * q.log()).sum(1)}
    torch.testing.assert_close(ssld.LOSSES[name](t, s).double(), expected[name], atol=1e-5, rtol=1e-5)


def test_polluted_images_are_noise_and_turned() -> None:
    images = torch.arange(3 * 16.0).view(3, 1, 4, 4) / 48
    spoilt = ssld.polluted(images, 41, torch.Generator().manual_seed(0))
    assert spoilt.shape == (41, 1, 4, 4)
    turned = [image.rot90(turn, (-2, -1)) for image in images for turn in (1, 2, 3)]
    found = [next((n for n, other in enumerate(turned) if torch.equal(image, other)), None) for image in spoilt]
    assert found[:20] == [None] * 20
    assert len(set(found[20:])) > 6
    assert None not in found[20:]
    assert 0.4 < float(spoilt[:20].mean()) < 0.6
    assert float(spoilt[:20].max()) <= 1


@pytest.mark.parametrize("changes", [{}, {"select": "random"}, {"select": "none"}, {"augment": "shift"}, {"loss": "kl"}], ids=str)
def test_the_student_learns_the_teacher_alone_on_what_is_selected(changes: dict, run: Run, data, teacher) -> None:
    seen = trace(ssld, run, {**changes, "batch_size": 20, "k": 3, "pollution": 0.5}, watch=["polluted"], data=data, teacher=teacher)
    pool = data.transfer
    assert seen.steps("student") == [0, 1, 2, 3]
    assert not seen.moved("frozen 0")
    images = data.train
    if changes.get("select") != "none":
        (spoilt,) = seen.calls("polluted")
        assert spoilt.args[1] == 30
        pool = join(pool, MemorySplit(spoilt.result, torch.full((30,), -1)))
        rows = top_per_class(teacher(pool.images()), 3)
        if changes.get("select") == "random":
            drawn = ssld.chosen("random", teacher(pool.images()), 3, 0)
            assert len(drawn) == len(drawn.unique()) == len(rows)
            assert drawn.tolist() != rows.tolist()
            rows = drawn
        images = join(data.train, pool.subset(rows))
        assert seen.metrics["selected"] == len(rows)
        assert seen.metrics["polluted"] == pytest.approx(float((rows >= 60).double().mean()))
    else:
        assert "selected" not in seen.metrics
    batches = Batches(images, 20, 0)
    for step, call in enumerate(c for c in seen.calls("student") if c.training):
        view = batches(step).images
        assert torch.equal(call.args[0], view) == ("augment" not in changes)
        loss = ssld.LOSSES[changes.get("loss", "jeffreys")](teacher(call.args[0]), call.result)
        torch.testing.assert_close(seen.updates("student")[step].parts["loss"], loss.detach(), atol=1e-4, rtol=1e-4)
    assert [row["name"] for row in run.rows] == ["teacher", "student"]


def test_ground_truth_is_read_by_the_baseline_alone(run: Run, data, teacher) -> None:
    seen = trace(ssld, run, {**ssld.ARMS["labels"], "batch_size": 20}, data=data, teacher=teacher)
    batches = Batches(data.train, 20, 0)
    for step, call in enumerate(c for c in seen.calls("student") if c.training):
        expected = torch.nn.functional.cross_entropy(call.result, batches(step).labels, reduction="none")
        torch.testing.assert_close(seen.updates("student")[step].parts["loss"], expected)


def test_the_second_stage_is_a_hundredth_as_fast_on_the_labelled_images(run: Run, data, teacher) -> None:
    changes = {"finetune_steps": 3, "batch_size": 20, "optimizer.schedule": "constant"}
    seen = trace(ssld, run, changes, data=data, teacher=teacher)
    first, second = seen.updates("student", "run"), seen.updates("student", "finetune")
    assert (len(first), [u.step for u in second]) == (4, [0, 1, 2])
    assert second[0].rates[0] == pytest.approx(first[0].rates[0] / 100)
    views = [call.args[0] for call in seen.calls("student") if call.training][4:]
    assert torch.equal(views[0], Batches(data.train, 20, 0)(0).images)


def test_a_teacher_in_train_mode_uses_batch_statistics_and_a_clean_copy_is_measured(run: Run, data) -> None:
    teacher = hub.load_classifier("small:convnet-w4", data=data, fresh=True).eval()
    seen = trace(ssld, run, {"teacher_bn": "train", "batch_size": 20, "k": 3}, data=data, teacher=teacher)
    assert not seen.moved("frozen 0")
    assert seen.moved("frozen 1")
    asked = seen.calls("frozen 1")
    assert len(asked) == 4
    assert all(call.training and not call.grad for call in asked)
    assert any(name.endswith("running_mean") for name in run._tracked)


def test_flags_that_change_nothing_and_pools_that_cannot_be_are_refused(run: Run, tmp_path: Path, data, teacher) -> None:
    refused = {"has no batch norm": {"teacher_bn": "train"}, "--select none": {"targets": "labels"}}
    for n, (message, changes) in enumerate(refused.items()):
        with Run(tmp_path / str(n), 0, plots=False) as other, pytest.raises(UserError, match=message):
            trace(ssld, other, changes, data=data, teacher=teacher)
    with pytest.raises(UserError, match="give --pool"):
        trace(ssld, run, {}, data=digits(0, labelled=40, transfer=0), teacher=teacher)
    with pytest.raises(UserError, match="all of them are test images"):
        ssld.gather(ssld.Config(), run, data, lambda pool, test: torch.ones(len(pool), dtype=torch.bool))
    with pytest.raises(UserError, match="same files"):
        ssld.merged(LazySplit(lambda row: None, torch.zeros(3)), data.train)
    with pytest.raises(UserError, match="5000 labelled images"):
        ssld.split_labels(ssld.Config(labelled=5000), run)
    check(ssld.full())


def test_the_labelled_images_are_among_the_teachers_and_the_rest_is_the_pool(run: Run) -> None:
    taught, data = ssld.split_labels(ssld.Config(), run)
    assert (len(taught.train), len(data.train), len(data.transfer), taught.transfer) == (700, 100, 850, None)
    assert torch.equal(taught.train.pixels[:100], data.train.pixels)
    assert data.train.labels.bincount().tolist() == [10] * 10
    assert (data.transfer.labels == -1).all()
    pool, spoilt = ssld.gather(ssld.Config(), run, data, lambda pool, test: torch.arange(len(pool)) < 50)
    assert (len(pool), spoilt) == (1600, 800)
    assert torch.equal(pool.pixels[:800], data.transfer.pixels[50:])


def test_killed_and_started_again_in_both_stages(tmp_path: Path) -> None:
    for after in (6, 10):  # four steps of the teacher, four of the student, then stage 2
        assert_resumes("ssld", tmp_path / str(after), after=after, changes={"finetune_steps": 4})


def test_a_transformers_pair_with_a_folder_as_pool(tmp_path: Path, capsys) -> None:
    transformers = pytest.importorskip("transformers")
    Image = pytest.importorskip("PIL.Image")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=10, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    (tmp_path / "pool").mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (9, 12), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pool" / f"{number}.png")
    words = ["--pool", str(tmp_path / "pool"), "--teacher", f"hf:{tmp_path / 'vit'}", "--student", f"hf:{tmp_path / 'vit'}", "--quiet"]
    assert cli.main(["run", "ssld", "--tiny", "--out", str(tmp_path / "r"), *words]) == 0
    shown = capsys.readouterr().out
    assert "student: labelled only" in shown
    assert "student: ssld" in shown
    student = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "r" / "student")
    assert student.config.num_labels == 10
