"""The closed forms of guided self-distillation, against refitting step by step, scikit-learn, brute force and the published table."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from stillroom import cli
from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.data.embedded import digits
from stillroom.data.images import hold_out
from stillroom.recipes.classification import teacher_guidance as tg

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


def test_deep_teacher_is_frozen_in_eval_mode_and_students_start_fresh(run: Run, monkeypatch) -> None:
    seen = []
    original = tg.fit_net

    def spy(cfg, stage, data, train, teacher, weight):
        net = original(cfg, stage, data, train, teacher, weight)
        seen.append((stage.path, teacher, weight, net))
        if teacher is not None:
            assert not teacher.training
            assert not any(p.requires_grad for p in teacher.parameters())
        return net

    monkeypatch.setattr(tg, "fit_net", spy)
    cfg = dataclasses.replace(CFG, part="deep", generations=3, fit_steps=8, student="small:convnet-w4", labelled=60)
    metrics = tg.main(cfg, run)
    assert seen[0][1] is None
    assert all(teacher is not None for _, teacher, _, _ in seen[1:])
    assert len({id(net) for *_, net in seen}) == len(seen)
    assert 0 <= metrics["label_weight"] <= 1


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
