"""Sample-set metrics against scipy, brute force and known distributions."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from stillroom.metrics.generation import coverage, diversity, energy_distance, frechet, mmd, modes, straightness


def test_frechet_against_scipy_and_the_closed_form() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(500, 4).double(), torch.randn(400, 4).double() @ torch.randn(4, 4).double() + 1
    ca, cb = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = scipy.linalg.sqrtm(ca @ cb).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(ca + cb - 2 * root)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet(a, a) == pytest.approx(0, abs=1e-8)


def test_mmd_and_energy_by_loops() -> None:
    torch.manual_seed(1)
    a, b = torch.randn(6, 2).double(), torch.randn(5, 2).double() + 1

    def mean(x: torch.Tensor, y: torch.Tensor, kernel, skip: bool) -> float:
        values = [float(kernel(p, q)) for i, p in enumerate(x) for j, q in enumerate(y) if not (skip and i == j)]
        return sum(values) / len(values)

    k = lambda p, q: np.mean([np.exp(-float(((p - q) ** 2).sum()) / (2 * h * h)) for h in (0.25, 0.5, 1.0, 2.0)])
    assert mmd(a, b) == pytest.approx(mean(a, a, k, True) + mean(b, b, k, True) - 2 * mean(a, b, k, False))
    d = lambda p, q: float((p - q).norm())
    assert energy_distance(a, b) == pytest.approx(2 * mean(a, b, d, False) - mean(a, a, d, True) - mean(b, b, d, True))
    assert diversity(a) == pytest.approx(mean(a, a, d, True))


def test_mmd_is_unbiased_at_equality() -> None:
    torch.manual_seed(2)
    values = [mmd(torch.randn(200, 2), torch.randn(200, 2)) for _ in range(60)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 60**0.5


def test_coverage_by_brute_force_and_in_the_extremes() -> None:
    torch.manual_seed(3)
    real, fake, k = torch.randn(30, 2).double(), torch.randn(25, 2).double() * 1.5, 3

    def radius(x: torch.Tensor) -> list[float]:
        return [sorted(float((p - q).norm()) for q in x)[k] for p in x]

    rr, rf = radius(real), radius(fake)
    d = [[float((p - q).norm()) for q in fake] for p in real]
    got = coverage(real, fake, k)
    assert got["precision"] == pytest.approx(np.mean([any(d[i][j] <= rr[i] for i in range(30)) for j in range(25)]))
    assert got["recall"] == pytest.approx(np.mean([any(d[i][j] <= rf[j] for j in range(25)) for i in range(30)]))
    assert got["density"] == pytest.approx(np.mean([sum(d[i][j] <= rr[i] for i in range(30)) / k for j in range(25)]))
    assert got["coverage"] == pytest.approx(np.mean([min(d[i]) <= rr[i] for i in range(30)]))
    assert coverage(real, real + 100, k)["coverage"] == 0
    assert coverage(real, real, k)["recall"] == 1


def test_modes_and_straightness() -> None:
    centres = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    x = torch.tensor([[0.1, 0.0], [0.0, 0.1], [4.0, 0.1], [4.1, 0.0], [2.5, 2.5]])
    got = modes(x, centres, 0.5)
    assert got["modes"] == 2
    assert got["on_mode"] == pytest.approx(0.8)
    assert got["effective_modes"] == pytest.approx(np.exp(-(0.4 * np.log(0.4) + 0.6 * np.log(0.6))))
    chord = torch.tensor([[1.0, 2.0]])
    assert straightness(chord.expand(5, 1, 2), chord) == 0
    assert straightness(torch.stack([chord + 1, chord - 1]), chord) == pytest.approx(2.0)


def test_few_samples() -> None:
    few, many = torch.randn(3, 2), torch.randn(40, 2)
    assert coverage(few, many) == coverage(few, many, k=2)
    assert all(value != value for value in (frechet(few[:1], many), *coverage(few[:1], many).values()))
