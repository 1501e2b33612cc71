"""SSLD: the divergence in closed form, the pool, who is asked about what, and the second stage."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from stillroom.core.config import override
from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.data.images import MemorySplit, keep_labels
from stillroom.data.select import top_per_class
from stillroom.recipes.classification import ssld
from stillroom.testing import assert_grads, trace
from tests.recipes.common import assert_resumes, finish

P, Q = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64), torch.tensor([[0.3, 0.3, 0.4]], dtype=torch.float64)
HALF_BOTH = 0.5 * (0.4 * math.log(7 / 3) + -0.1 * math.log(2 / 3) + -0.3 * math.log(1 / 4))


def pictures(folder: Path, count: int) -> None:
    for i in range(count):
        file = folder / f"{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (8, 8), dtype=np.uint8)).save(file)


# -- the loss --------------------------------------------------------------------------------------------------------------------
def test_jeffreys_is_half_the_sum_of_both_divergences() -> None:
    assert ssld.distance("jeffreys", P.log() + 3, Q.log() - 1).item() == pytest.approx(HALF_BOTH, rel=1e-12)


def test_it_sums_over_classes_and_gives_one_value_per_image() -> None:
    one = ssld.distance("jeffreys", P.log(), Q.log())
    padded = torch.full((1, 5), -60.0, dtype=torch.float64)
    padded[:, :3] = 0
    more = [torch.cat([x.log(), torch.full((1, 2), -60.0, dtype=torch.float64)], 1) for x in (P, Q)]
    assert ssld.distance("jeffreys", *more).shape == (1,)
    assert ssld.distance("jeffreys", *more).item() == pytest.approx(one.item(), rel=1e-9)


def test_true_js_is_a_quarter_of_it_near_agreement_and_bounded() -> None:
    near = P + 1e-4 * torch.tensor([[1.0, -1.0, 0.0]], dtype=torch.float64)
    assert float(ssld.distance("jeffreys", P.log(), near.log()) / ssld.distance("js", P.log(), near.log())) == pytest.approx(4, rel=1e-3)
    far = torch.tensor([[40.0, 0.0]]), torch.tensor([[0.0, 40.0]])
    assert ssld.distance("js", *far).item() == pytest.approx(math.log(2), rel=1e-4)
    assert ssld.distance("jeffreys", *far).item() == pytest.approx(40, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("kl", float((P * (P / Q).log()).sum())),
        ("ce", float(-(P * Q.log()).sum())),
        ("js", float(0.5 * (P * (2 * P / (P + Q)).log()).sum() + 0.5 * (Q * (2 * Q / (P + Q)).log()).sum())),
    ],
)
def test_the_other_losses(kind: str, value: float) -> None:
    assert ssld.distance(kind, P.log(), Q.log()).item() == pytest.approx(value, rel=1e-9)


def test_half_precision_logits_are_compared_in_single_precision() -> None:
    z = torch.tensor([[12.0, 0.0, -9.0]], dtype=torch.bfloat16)
    other = torch.tensor([[11.0, 1.0, -9.0]], dtype=torch.bfloat16)
    assert ssld.distance("jeffreys", z, other).dtype == torch.float32
    assert ssld.distance("jeffreys", z, other).item() == pytest.approx(ssld.distance("jeffreys", z.float(), other.float()).item())


def test_gradient_reaches_the_student_alone_and_is_that_of_the_formula() -> None:
    s = Q.log().clone().requires_grad_(True)
    ssld.distance("jeffreys", P.log(), s).sum().backward()
    # d/ds 1/2 [KL(p||q) + KL(q||p)] = 1/2 [q - p + q (log q/p - KL(q||p))]
    ratio = (Q / P).log()
    assert torch.allclose(s.grad, 0.5 * (Q - P + Q * (ratio - (Q * ratio).sum())), atol=1e-12)
    net = nn.Linear(3, 3)
    assert_grads(ssld.distance("jeffreys", P.float().log(), net(torch.ones(1, 3))).sum(), to=[net])


# -- the pool --------------------------------------------------------------------------------------------------------------------
def test_pollution_is_noise_as_given_and_images_turned_by_their_quarters() -> None:
    image = torch.arange(4.0).view(1, 1, 2, 2).expand(2, 1, 2, 2)
    noise = torch.rand(2, 1, 2, 2)
    made = ssld.pollution(image, noise, torch.tensor([1, 2]))
    assert torch.equal(made[:2], noise)
    assert made[2, 0].tolist() == [[1.0, 3.0], [0.0, 2.0]]
    assert made[3, 0].tolist() == [[3.0, 2.0], [1.0, 0.0]]


def traced(run: Run, **changes):
    return trace(ssld, run, changes, watch=["distance", "top_per_class", "cross_entropy", "pollution"])


def test_the_student_learns_what_the_teacher_says_of_the_images_it_sees(run: Run) -> None:
    seen = traced(run)
    assert seen.steps("student", stage="run") == [0, 1, 2, 3]
    asked = seen.calls("distance")
    assert {call.args[0] for call in asked} == {"jeffreys"}
    views = seen.calls("student", stage="run")[:4]
    teacher = seen.nets["frozen 0"]
    for call, view, update in zip(asked, views, seen.updates("student"), strict=True):
        assert torch.allclose(call.args[1], teacher(view.args[0]), atol=1e-5), "one view for both"
        assert torch.equal(call.args[2], view.result)
        assert torch.equal(update.parts["distance"], call.result)
    assert not seen.moved("frozen 0")
    assert seen.moved("student")
    assert not seen.calls("cross_entropy"), "no label is used"


def test_of_the_pool_the_surest_of_each_class_join_the_labelled_images(run: Run) -> None:
    seen = traced(run)
    (selection,) = seen.calls("top_per_class")
    logits, k = selection.args
    assert k == ssld.TINY["per_class"]
    assert len(logits) == 160 + 40, "images beyond the labelled ones, and the pollution"
    assert seen.metrics["learned_images"] == 40 + len(selection.result)
    (made,) = seen.calls("pollution")
    assert made.args[1].shape == (20, 1, 8, 8)
    assert set(made.args[2].tolist()) == {1, 2, 3}


@pytest.fixture
def some(run: Run) -> tuple:
    """A config, a task of 200 images, a fixed network, and the task's images as a pool without labels."""
    cfg = override(ssld.Config(), {**ssld.TINY, "per_class": 3})
    data = cfg.load(run, labelled=cfg.images, transfer=False)
    torch.manual_seed(0)
    net = run.frozen(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    return cfg, data, net, MemorySplit(data.train.images(), torch.full((len(data.train),), -1))


def test_the_surest_of_each_class_or_as_many_at_random(run: Run, some: tuple) -> None:
    cfg, _, net, pool = some
    top, drawn = (ssld.choose(replace(cfg, select=kind), run, net, pool) for kind in ("top", "random"))
    assert torch.equal(top, top_per_class(net(pool.images()), 3))
    assert len(top) == len(drawn) == len(drawn.unique())
    assert not torch.equal(top, drawn)
    assert drawn.max() > 0.8 * len(pool)
    assert torch.equal(drawn, ssld.choose(replace(cfg, select="random"), run, net, pool)), "drawn from the seed"


def test_a_pool_holds_what_was_given_then_the_folder_then_pollution_of_both(run: Run, some: tuple, tmp_path: Path) -> None:
    cfg, data, _, _ = some
    pictures(tmp_path / "pool", 5)
    own = MemorySplit(data.train.images()[:20], torch.full((20,), -1))
    torch.manual_seed(1)
    pool = ssld.build_pool(replace(cfg, polluted=12, pool=str(tmp_path / "pool")), run, data, own, ssld.copies)
    assert len(pool) == 20 + 5 + 12
    assert (pool.labels == -1).all()
    images = pool.images()
    assert torch.equal(images[:20], own.images())
    noise, turned = images[25:31], images[31:]
    assert noise.std() > 0.25
    assert all(any(torch.equal(t, base.rot90(k, (1, 2))) for base in images[:25] for k in (1, 2, 3)) for t in turned)
    torch.manual_seed(2)
    assert torch.equal(
        images, ssld.build_pool(replace(cfg, polluted=12, pool=str(tmp_path / "pool")), run, data, own, ssld.copies).images()
    )


def test_what_is_learned_are_the_labelled_images_and_the_chosen_ones(run: Run) -> None:
    """Every batch's images are among them, and the labelled ones are balanced images of the task."""
    seen = traced(run, steps=24, polluted=0, batch_size=16)
    cfg = override(ssld.Config(), ssld.TINY)
    whole = cfg.load(run, labelled=cfg.images, transfer=False)
    train, rest = keep_labels(whole.train, 40, torch.Generator().manual_seed(0))
    (selection,) = seen.calls("top_per_class")
    wanted = torch.cat([train.images(), rest.images()[selection.result]]).flatten(1)
    views = torch.cat([call.args[0].flatten(1) for call in seen.calls("student", stage="run") if call.training])
    found = torch.cdist(views, wanted)
    assert (found.min(1).values == 0).all()
    assert len(found.argmin(1).unique()) > 0.8 * len(wanted)


def test_without_pool_only_labelled_images_are_learned_and_labels_on_demand(run: Run, tmp_path: Path) -> None:
    seen = traced(run, select="none")
    assert seen.metrics["learned_images"] == 40
    assert len(seen.calls("distance")) == 4
    with Run(tmp_path / "labels", 0, engine=run.engine, store=run.store, plots=False) as other:
        seen = traced(other, select="none", target="labels")
    assert not seen.calls("distance")
    assert "frozen 0" not in seen.nets, "no teacher is made"
    logits, labels = seen.calls("cross_entropy")[0].args
    assert logits.shape == (40, 10)
    assert torch.bincount(labels, minlength=10).tolist() == [4] * 10


def test_images_of_the_test_split_are_not_learned(run: Run) -> None:
    cfg = override(ssld.Config(), {**ssld.TINY, "polluted": 0})
    whole = cfg.load(run, labelled=cfg.images, transfer=False)
    leaked = MemorySplit(torch.cat([whole.test.images()[:7], whole.train.images()[:5]]), torch.full((12,), -1))
    assert len(ssld.build_pool(cfg, run, whole, leaked, ssld.copies)) == 5
    assert len(ssld.build_pool(cfg, run, whole, leaked, lambda pool, test: torch.arange(12) < 3)) == 9


def test_the_second_stage_learns_the_labelled_images_at_a_hundredth_of_the_rate(run: Run) -> None:
    seen = traced(run, finetune_steps=3)
    later = seen.updates(stage="finetune")
    assert [u.step for u in later] == [0, 1, 2]
    assert later[0].rates[0] == pytest.approx(0.001)
    assert all(len(u.parts["distance"]) == 40 for u in later)


def test_a_teacher_whose_batch_norm_follows_the_batch(run: Run, tmp_path: Path) -> None:
    answers = {}
    for mode in ("eval", "train"):
        with Run(tmp_path / mode, 0, engine=run.engine, store=run.store, plots=False) as other:
            seen = traced(other, teacher="small:convnet-w4", teacher_bn=mode)
            view, asked = seen.calls("student", stage=mode)[0], seen.calls("distance")[0]
            clean = seen.nets["frozen 0"](view.args[0])
            answers[mode] = torch.allclose(asked.args[1], clean, atol=1e-5)
            assert not seen.moved("frozen 0"), "what was evaluated stays clean"
            tracked = {name: value for name, value in other._tracked.items() if name.startswith("teacher ")}
            assert bool(tracked) == (mode == "train")
            for name, value in tracked.items():
                assert not torch.equal(value, seen.nets["frozen 0"].get_buffer(name.removeprefix("teacher ").replace(" ", "."))), name
    assert answers == {"eval": True, "train": False}
    with pytest.raises(UserError, match="no batch norm"):
        ssld.moving(run, nn.Linear(2, 2))


# -- flags, folders, whole runs --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select": "none", "per_class": 7}, "--per-class 7 has no effect with --select none"),
        ({"select": "none", "target": "labels", "loss": "kl"}, "--loss kl has no effect with --target labels"),
        ({"target": "labels"}, "--target labels knows the labelled images alone"),
        ({"labelled": 200, "polluted": 0}, "there is no pool"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(run: Run, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        traced(run, **changes)


def test_a_folder_is_a_pool(run: Run, tmp_path: Path) -> None:
    pictures(tmp_path / "pool", 12)
    seen = traced(run, labelled=0, polluted=0, pool=str(tmp_path / "pool"))
    (selection,) = seen.calls("top_per_class")
    assert len(selection.args[0]) == 12


def test_killed_anywhere_it_ends_bitwise_alike(tmp_path: Path) -> None:
    assert_resumes("ssld", tmp_path, after=9, changes={"finetune_steps": 3, "teacher": "small:convnet-w4", "teacher_bn": "train"})


def test_a_transformers_student_is_loaded_by_its_own_library(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_channels=1)
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "model")
    result = finish("ssld", tmp_path / "run", {"student": f"hf:{tmp_path / 'model'}"})
    assert result["metrics"]["learned_images"] > 40
    student = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "student")
    assert student.config.num_labels == 10
