"""Barlow Twins: the loss by loops, the views by hand, and what its training does."""

import pytest
import torch

from stillroom.data.embedded import digits
from stillroom.losses.twins import barlow_twins
from stillroom.testing import recording
from stillroom.vision import twins


def test_the_loss_by_loops():
    one, two = (torch.randn(9, 4, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
    a, b = ((x - x.mean(0)) / x.std(0, correction=0) for x in (one, two))
    expected = 0.0
    for i in range(4):
        for j in range(4):
            c = float(sum(a[k, i] * b[k, j] for k in range(9)) / 9)
            expected += (1 - c) ** 2 if i == j else 0.1 * c**2
    assert float(barlow_twins(one, two, 0.1)) == pytest.approx(expected)
    assert float(barlow_twins(one, one, 0.0)) == pytest.approx(0.0, abs=1e-12)


def test_a_view_is_scaled_image_by_image_and_noised_in_deviations_of_the_data():
    images, eps = torch.full((2, 2, 1, 1), 0.5), torch.tensor([[[[1.0]], [[0.0]]], [[[0.0]], [[-1.0]]]])
    found = twins.view(images, torch.tensor([1.0, -2.0]).view(2, 1, 1, 1), eps, 0.2, torch.tensor([0.5, 2.0]).view(2, 1, 1))
    torch.testing.assert_close(found.flatten(1), torch.tensor([[0.55 + 0.1, 0.55], [0.4, 0.4 - 0.4]]))


def test_training_compares_two_views_of_the_same_images_and_is_kept(run):
    data = digits(0, labelled=60, transfer=0)
    cfg = twins.BarlowTwins(steps=3, batch_size=16, augment="none", redundancy_weight=0.02)
    with recording({"barlow_twins": twins, "view": twins}) as seen:
        encoder = cfg.encoder(run, "convnet-avg-4x8", data)
    views, losses = seen.calls("view"), seen.calls("barlow_twins")
    assert (len(views), len(losses), seen.steps("teacher")) == (6, 3, [0, 1, 2])
    for step, loss in enumerate(losses):
        one, two = views[2 * step : 2 * step + 2]
        assert torch.equal(one.args[0], two.args[0])
        assert not torch.equal(one.args[1], two.args[1])
        assert not torch.equal(one.args[2], two.args[2])
        assert one.args[3] == 0.3
        assert one.args[1].shape == (16, 1, 1, 1)
        torch.testing.assert_close(one.args[4].flatten(), torch.tensor(data.std))
        network = seen.calls("teacher")[step]
        assert torch.equal(network.args[0], torch.cat([one.result, two.result]))
        assert torch.equal(torch.cat(loss.args[:2]), network.result)
        assert loss.args[2] == 0.02
    still = {
        name for (name, after), before in zip(seen.nets["teacher"].named_parameters(), seen.first["teacher"]) if torch.equal(before, after)
    }
    assert still == {"encoder.net.head.weight", "encoder.net.head.bias"}
    images = data.test.images()[:3]
    torch.testing.assert_close(encoder.eval()(images), seen.nets["teacher"].eval().encoder(images))
    with recording() as again:
        same = cfg.encoder(run, "convnet-avg-4x8", data)
    assert not again.recorded
    torch.testing.assert_close(same.eval()(images), encoder(images))
