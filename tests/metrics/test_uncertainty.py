import numpy as np
import pytest
import torch

from stillroom.metrics.exits import exit_quantiles, measured
from stillroom.metrics.uncertainty import conformal_sets, conformal_threshold, equal_mass_ece


def test_equal_mass_ece_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(97, 4, generator=generator) * 2, torch.randint(4, (97,), generator=generator)
    p = logits.double().softmax(1).numpy()
    order = np.argsort(p.max(1), kind="stable")
    right = (p.argmax(1) == labels.numpy())[order].astype(float)
    groups = zip(np.array_split(p.max(1)[order], 15), np.array_split(right, 15), strict=True)
    expected = sum(len(c) * abs(r.mean() - c.mean()) for c, r in groups) / 97
    assert equal_mass_ece(logits, labels) == pytest.approx(expected, abs=1e-12)
    assert equal_mass_ece(logits[:3], labels[:3]) >= 0  # fewer samples than bins


def test_conformal_threshold_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 0])  # scores 0.1, 0.4, 0.3, 0.8
    assert conformal_threshold(p, labels, 0.5) == pytest.approx(0.8)  # level ceil(5 * 0.5) / 4 = 3/4: position 2.25 of the sorted scores
    assert conformal_threshold(p, labels, 0.01) == pytest.approx(0.8)  # level above one: the largest
    assert conformal_sets(p, 0.4).tolist() == [[True, False], [True, False], [False, True], [False, True]]
    assert conformal_sets(p, torch.tensor([0.95, 0.0, 0.4, 0.85])).tolist() == [[True, True], [False, False], [False, True], [True, True]]
    with pytest.raises(ValueError, match="calibration"):
        conformal_threshold(p[:0], labels[:0], 0.1)


def test_conformal_sets_cover():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4000, 5, generator=generator) * 2
    labels = torch.multinomial((logits * 0.5).softmax(1), 1, generator=generator).squeeze(1)  # the model is over-confident
    p = logits.softmax(1)
    for alpha in (0.05, 0.2):
        sets = conformal_sets(p[2000:], conformal_threshold(p[:2000], labels[:2000], alpha))
        covered = sets.gather(1, labels[2000:, None]).float().mean()
        assert 1 - alpha - 0.03 < covered < 1 - alpha + 0.03


def test_an_exit_with_few_images_takes_its_threshold_from_all():
    generator = torch.Generator().manual_seed(2)
    p = torch.randn(200, 2, 3, generator=generator).softmax(-1)
    labels, taken = torch.randint(3, (200,), generator=generator), torch.zeros(200, dtype=torch.int64)
    taken[:20] = 1
    both = exit_quantiles(p, labels, taken, 0.1)
    assert both == [conformal_threshold(p[20:, 0], labels[20:], 0.1), conformal_threshold(p[:, 1], labels, 0.1)]
    taken[:21] = 1
    assert exit_quantiles(p, labels, taken, 0.1)[1] == conformal_threshold(p[:21, 1], labels[:21], 0.1)


def test_an_operating_point_reads_each_image_where_it_left():
    logits = torch.tensor([[[5.0, 0.0], [0.0, 5.0]], [[5.0, 0.0], [0.0, 5.0]]])
    labels, costs = torch.tensor([0, 0]), torch.tensor([0.25, 1.0], dtype=torch.float64)
    result = measured(logits, labels, torch.tensor([0, 1]), [0.5, 0.999], costs)
    assert (result["accuracy"], result["cost"]) == (0.5, 0.625)
    assert (result["set_size"], result["coverage"]) == (1.5, 1.0)  # the generous threshold of exit 1 lets both classes in
    assert result["nll"] == pytest.approx((np.log1p(np.exp(-5)) + np.log1p(np.exp(5))) / 2)
