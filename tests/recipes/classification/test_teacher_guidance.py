"""The closed forms of guided self-distillation, against refitting step by step, scikit-learn, brute force and the published table."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from stillroom import cli
from stillroom.core.config import override
from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.data.embedded import digits
from stillroom.data.images import hold_out
from stillroom.recipes.classification import teacher_guidance as tg
from stillroom.testing import trace
from tests.recipes.common import assert_resumes

F64 = torch.float64
CFG = tg.Config()


@pytest.fixture
def problem():
    d = tg.sine(CFG, 3)
    return d, tg.rbf(d["x"], d["x"], CFG.gamma), tg.rbf(d["grid"], d["x"], CFG.gamma)


def refit(kernel, cross, y, ridge: float, weights) -> list[torch.Tensor]:
    """Step by step by solving, with no eigenvector in sight."""
    past, out = y, []
    for a in weights:
        target = a * y + (1 - a) * past
        coefficients = torch.linalg.solve(kernel + ridge * torch.eye(len(y), dtype=F64), target)
        out.append(cross @ coefficients)
        past = kernel @ coefficients
    return out


@pytest.mark.parametrize("weights", [[0.0] * 6, [0.35] * 6, [1.0] * 3, [0.9, 0.1, 0.5, 0.0, 1.0]])
def test_steps_equal_refitting(problem, weights) -> None:
    d, kernel, cross = problem
    fit = tg.Smoother.of(kernel, d["y"], 0.2)
    b = fit.start()
    for a, expected in zip(weights, refit(kernel, cross, d["y"], 0.2, weights), strict=True):
        torch.testing.assert_close(fit.predict(cross, b, a), expected, atol=1e-9, rtol=1e-9)
        b = fit.next(b, a)


def test_first_step_is_plain_ridge_whatever_the_weight(problem) -> None:
    from sklearn.kernel_ridge import KernelRidge

    d, _, cross = problem
    fit = tg.Smoother.of(tg.rbf(d["x"], d["x"], CFG.gamma), d["y"], 0.2)
    ridge = KernelRidge(alpha=0.2, kernel="rbf", gamma=CFG.gamma).fit(d["x"][:, None].numpy(), d["y"].numpy())
    expected = torch.tensor(ridge.predict(d["grid"][:, None].numpy()))
    for a in (0.0, 0.3, 1.0):
        torch.testing.assert_close(fit.predict(cross, fit.start(), a), expected, atol=1e-9, rtol=1e-9)


def test_two_hundred_steps_equal_ridge_with_lambda_over_a(problem) -> None:
    d, kernel, cross = problem
    fit = tg.Smoother.of(kernel, d["y"], 0.2)
    b = fit.start()
    for _ in range(200):
        b = fit.next(b, 0.35)
    direct = cross @ torch.linalg.solve(kernel + 0.2 / 0.35 * torch.eye(len(kernel), dtype=F64), d["y"])
    torch.testing.assert_close(fit.predict(cross, b, 0.35), direct, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(fit.limit(cross, 0.35), direct, atol=1e-10, rtol=1e-10)


def test_collapse_and_sparsification(problem) -> None:
    d, kernel, _ = problem
    fit = tg.Smoother.of(kernel, d["y"], 0.2)
    none, some = fit.start(), fit.start()
    for _ in range(3000):
        none, some = fit.next(none, 0.0), fit.next(some, 0.35)
    assert float(none.max()) < 1e-6
    bound = (fit.values[-1] / (0.35 * fit.values[-1] + 0.2)) / (fit.values[-8] / (0.35 * fit.values[-8] + 0.2))
    assert float(some[-1] / some[-8]) == pytest.approx(float(bound), rel=1e-8)


def test_published_toy_table() -> None:
    """11 points, RBF gamma 80, lambda 0.2; error to the sine on 101 points (the reference's README; its targets have four digits)."""
    y = [0.3848, 1.2334, 1.3323, 0.6920, -0.2976, -0.2419, -0.7965, -0.9616, -0.4967, -0.3469, 0.5590]
    x, grid = torch.linspace(0, 1, 11, dtype=F64), torch.linspace(0, 1, 101, dtype=F64)
    truth = (2 * torch.pi * grid).sin()[:, None]
    fit, cross = tg.Smoother.of(tg.rbf(x, x, 80), torch.tensor(y, dtype=F64)[:, None], 0.2), tg.rbf(grid, x, 80)
    table = {
        0.0: [0.16477, 0.15076, 0.14915, 0.15561, 0.16735, 0.18251],
        0.25: [0.16477, 0.15309, 0.14958, 0.14903, 0.14946, 0.15011],
        0.35: [0.16477, 0.15424, 0.15089, 0.14983, 0.14954, 0.14948],
    }
    for a, column in table.items():
        b = fit.start()
        for expected in column:
            assert float((fit.predict(cross, b, a) - truth).square().mean()) == pytest.approx(expected, abs=3e-5)
            b = fit.next(b, a)
    for a, expected in {0.25: 0.15250, 0.35: 0.14959}.items():
        assert float((fit.limit(cross, a) - truth).square().mean()) == pytest.approx(expected, abs=3e-5)


def test_best_weight_against_a_grid_and_clipping() -> None:
    draw = torch.Generator().manual_seed(0)
    y, g, h = (torch.randn(40, 3, generator=draw, dtype=F64) for _ in range(3))
    grid = torch.linspace(0, 1, 10001, dtype=F64)
    losses = torch.stack([(a * g + (1 - a) * h - y).square().sum() for a in grid])
    assert tg.best_weight(y, g, h) == pytest.approx(float(grid[losses.argmin()]), abs=1e-4)
    assert tg.best_weight(g + (g - h), g, h) == 1.0
    assert tg.best_weight(h - (g - h), g, h) == 0.0
    assert tg.best_weight(y, g, g) == 1.0


def test_the_toy_is_a_noisy_sine_drawn_from_its_seed_alone() -> None:
    d = tg.sine(dataclasses.replace(CFG, points=4000, held_out=3000, noise=0.5), 7)
    for x, y, count in ((d["x"], d["y"], 4000), (d["xv"], d["yv"], 3000)):
        noise = y[:, 0] - (2 * torch.pi * x).sin()
        assert x.shape == (count,)
        assert float(x.min()) < 0.01
        assert float(x.max()) > 0.99
        assert float(noise.mean()) == pytest.approx(0, abs=0.03)
        assert float(noise.std()) == pytest.approx(0.5, abs=0.03)
    assert d["grid"].tolist() == pytest.approx([i / 100 for i in range(101)])
    torch.testing.assert_close(d["truth"], (2 * torch.pi * d["grid"]).sin()[:, None])
    torch.manual_seed(1)
    one = tg.sine(CFG, 7)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(one.values(), tg.sine(CFG, 7).values(), strict=True))
    assert not torch.equal(one["x"], tg.sine(CFG, 8)["x"])


def test_the_kernel_part_is_the_mean_of_its_data_sets(run: Run) -> None:
    cfg = override(tg.Config(), {"part": "kernel", "rule": "fixed", "label_weight": 0.35, "steps": 4, "draws": 3})
    found = tg.main(cfg, run)
    curves = []
    for draw in range(3):
        d = tg.sine(cfg, run.seed * 1000 + draw)
        K, cross = tg.rbf(d["x"], d["x"], cfg.gamma), tg.rbf(d["grid"], d["x"], cfg.gamma)
        curves.append(torch.stack([(f - d["truth"]).square().mean() for f in refit(K, cross, d["y"], cfg.ridge, [0.35] * 4)]))
    curve = torch.stack(curves).mean(0)
    wanted = {"mse": curve[-1], "mse_first": curve[0], "mse_best": curve.min()}
    assert {name: found[name] for name in wanted} == {name: pytest.approx(float(value), rel=1e-6) for name, value in wanted.items()}
    assert found["label_weight"] == pytest.approx(0.35)
    assert 0 < found["limit_gap"] < 1e-8


def test_the_optimal_weight_of_a_step_minimises_the_held_out_error(run: Run) -> None:
    cfg = override(tg.Config(), {"part": "kernel", "rule": "optimal", "steps": 3, "draws": 1})
    found = tg.main(cfg, run)
    d = tg.sine(cfg, run.seed * 1000)
    K, held, grid = (tg.rbf(d[to], d["x"], cfg.gamma) for to in ("x", "xv", "grid"))
    solve = torch.linalg.inv(K + cfg.ridge * torch.eye(len(K), dtype=F64))
    past = d["y"]
    for _ in range(3):
        g, h = held @ solve @ d["y"], held @ solve @ past
        best = float(((d["yv"] - h) * (g - h)).sum() / (g - h).square().sum()) if not torch.equal(g, h) else 1.0
        weight = min(1.0, max(0.0, best))
        target = weight * d["y"] + (1 - weight) * past
        error, past = (grid @ solve @ target - d["truth"]).square().mean(), K @ solve @ target
    assert found["mse"] == pytest.approx(float(error), rel=1e-6)
    assert found["label_weight"] == pytest.approx(weight, rel=1e-6)
    assert found["grid_regret"] < 1e-8


# -- the deep part -----------------------------------------------------------------------------------------------------------------
SMALL = {"generations": 3, "fit_steps": 3, "student": "small:convnet-w4", "labelled": 60, "batch_size": 10}


def traced(run: Run, **changes):
    return trace(tg, run, {**SMALL, **changes}, watch=["guided", "best_weight", "one_hot"])


def test_generations_learn_from_the_frozen_one_before_on_labels_and_its_answers(run: Run) -> None:
    seen = traced(run, rule="fixed", label_weight=0.3, validation=0.5)
    stages = ["run/generation 1", "run/generation 2", "run/generation 3"]
    assert list(dict.fromkeys(u.stage for u in seen.recorded)) == stages
    assert [u.step for u in seen.updates(stage="generation 2")] == [0, 1, 2]
    nets = [name for name in seen.nets if name.startswith("student")]
    assert all(map(seen.moved, nets)), "every generation trains a network of its own"
    assert not any(seen.moved(name) for name in seen.nets if name.startswith("frozen"))
    for k, stage in enumerate(stages):
        views = [call for call in seen.calls(nets[k], stage) if call.training]
        for call, view in zip(seen.calls("guided", stage), views, strict=True):
            logits, labels, answer, weight = call.args
            assert weight == (0.3 if k else 1.0)
            assert torch.equal(logits, view.result)
            assert labels.sum(1).tolist() == [1.0] * 10
            if not k:
                assert answer is None
                continue
            asked = next(c for c in seen.calls(nets[k - 1], stage) if torch.equal(c.args[0], view.args[0]))
            assert not asked.grad
            assert not asked.training
            assert torch.allclose(answer, asked.result.softmax(-1))
    for update, call in zip(seen.recorded, seen.calls("guided"), strict=True):
        assert all(torch.equal(update.parts[name], value) for name, value in call.result.items())
        assert update.parts["norm"] > 0


def test_the_best_weight_comes_from_a_fit_without_labels_and_the_first_one(run: Run) -> None:
    seen = traced(run, rule="optimal")
    weights = [call.args[3] for call in seen.calls("guided")]
    asked = seen.calls("best_weight")
    assert len(asked) == 2
    truth, first, past = asked[0].args
    assert torch.equal(asked[1].args[1], first), "g is the first fit, in every generation"
    assert not torch.equal(asked[1].args[2], past)
    assert truth.sum(1).tolist() == [1.0] * len(truth)
    assert torch.allclose(first.sum(1), torch.ones(len(first), dtype=F64))
    found = [call.result for call in asked]
    wanted = [1.0] * 3 + [w for a in found for w in [0.0] * 3 + [a] * 3 * (a > 0.01)]
    assert weights == wanted
    assert seen.metrics["label_weight"] == found[-1]


@pytest.mark.parametrize(("weight", "fits"), [(0.009, 2), (0.011, 3)])
def test_a_generation_without_weight_on_the_labels_is_not_fitted_twice(run: Run, monkeypatch, weight: float, fits: int) -> None:
    monkeypatch.setattr(tg, "best_weight", lambda *_: weight)
    seen = trace(tg, run, {**SMALL, "rule": "optimal", "generations": 2, "fit_steps": 1})
    assert len(seen.updates("student")) == fits


def test_labels_are_those_of_the_batch_and_some_images_are_held_out(run: Run) -> None:
    """Labels follow the images; 60 labelled images, 40 of them trained on."""
    changes = {"generations": 1, "fit_steps": 4, "rule": "fixed", "label_weight": 0.3, "validation": 1 / 3, "label_noise": 0.0}
    seen = traced(run, **changes)
    plain = digits(run.seed, labelled=60, transfer=0)
    known = {image.numpy().tobytes(): int(label) for image, label in zip(plain.train.images(), plain.train.labels)}
    shown: set[bytes] = set()
    views = [call for call in seen.calls("student") if call.training]
    for call, view in zip(seen.calls("guided"), views, strict=True):
        pictures = [image.numpy().tobytes() for image in view.args[0]]
        assert call.args[1].argmax(1).tolist() == [known[picture] for picture in pictures]
        shown.update(pictures)
    assert len(shown) == 40


def test_the_norm_term_is_the_sum_of_the_tensors_norms_and_can_be_left_out(run: Run, tmp_path) -> None:
    seen = traced(run, generations=1, fit_steps=1, norm_weight=0.5)
    first = seen.first["student"]
    parameters = first[: len(list(seen.nets["student"].parameters()))]
    assert seen.losses("student", "norm") == [pytest.approx(0.5 * float(sum(p.norm() for p in parameters)), rel=1e-5)]
    with Run(tmp_path / "other", 0, engine=run.engine, store=run.store, plots=False) as other:
        assert "norm" not in traced(other, generations=1, fit_steps=1, norm_weight=0.0).recorded[0].parts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": 3.0}, "--gamma 3.0 has no effect in the deep part"),
        ({"part": "kernel", "batch_size": 7}, "--batch-size 7 has no effect in the kernel part"),
        ({"rule": "optimal", "label_weight": 0.5}, "--label-weight 0.5 has no effect with --rule optimal"),
    ],
)
def test_flags_of_the_other_part_are_refused(run: Run, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tg.main(override(tg.Config(), {"part": "deep", **changes}), run)


def test_killed_in_the_second_generation_it_ends_bitwise_alike(tmp_path) -> None:
    assert_resumes("teacher-guidance", tmp_path, after=8, changes={**SMALL, "generations": 2, "fit_steps": 5})


def test_the_held_out_images_are_balanced_whatever_the_order_and_none_is_trained_on() -> None:
    plain = digits(0, labelled=200, transfer=0)
    sorted_data = dataclasses.replace(plain, train=plain.train.subset(plain.train.labels.argsort()))
    data, held_out = hold_out(sorted_data, 100, 0)
    assert held_out.labels.bincount().tolist() == [10] * 10
    assert len(data.train) == 100
    assert not (data.train.pixels[:, None] == held_out.pixels[None]).flatten(2).all(2).any()
    for count in (0, 200):
        with pytest.raises(UserError, match="--validation"):
            hold_out(sorted_data, count, 0)


def test_the_label_weight_weighs_the_labels() -> None:
    z, y = torch.tensor([[0.0, 0.0]], dtype=F64), torch.tensor([[1.0, 0.0]], dtype=F64)
    parts = tg.guided(z, y, torch.tensor([[0.9, 0.1]], dtype=F64), 0.25)  # p = (1/2, 1/2)
    assert parts["labels"].item() == pytest.approx(0.25 * 0.25)
    assert parts["teacher"].item() == pytest.approx(0.75 * 0.16)
    assert tg.guided(z, y, None, 1.0).keys() == {"labels"}


def test_end_to_end(tmp_path, capsys) -> None:
    assert cli.main(["run", "teacher-guidance", "--out", str(tmp_path / "r"), "--draws", "2"]) == 0
    assert "student: optimal" in capsys.readouterr().out
    assert len(list((tmp_path / "r" / "samples").glob("*.svg"))) == 2
