import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from stillroom.data.clusters import k_means, nearest, whiten


def blobs() -> torch.Tensor:
    """Three far groups of 5, 7 and 9 points."""
    noise = torch.randn(21, 2, generator=torch.Generator().manual_seed(0))
    return noise + torch.tensor([[0.0, 0], [50, 0], [0, 50]]).repeat_interleave(torch.tensor([5, 7, 9]), 0)


def test_whitened_features_are_scikit_learns_up_to_the_axes_signs():
    features = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.tensor([9.0, 5, 3, 1, 0.5, 0.1])) + 4
    mine, theirs = whiten(features, 4).numpy(), PCA(4, whiten=True).fit_transform(features.double().numpy())
    np.testing.assert_allclose(np.abs(mine), np.abs(theirs), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.cov(mine.T), np.eye(4), atol=1e-5)
    np.testing.assert_allclose(mine.mean(0), 0, atol=1e-5)
    assert whiten(features, 4).dtype == torch.float32


@pytest.mark.parametrize("dimensions", [0, 3, 5])
def test_there_are_no_more_axes_than_rows_and_features_leave(dimensions):
    with pytest.raises(ValueError, match="principal axes"):
        whiten(torch.randn(3, 4), dimensions)


def test_k_means_finds_groups_and_their_means():
    points = blobs()
    centres, cluster = k_means(points, 3, seed=0)
    assert [len(set(part.tolist())) for part in cluster.split([5, 7, 9])] == [1, 1, 1]
    for k in range(3):
        torch.testing.assert_close(centres[k], points[cluster == k].mean(0))
    assert all(torch.equal(a, b) for a, b in zip(k_means(points, 3, seed=0), (centres, cluster)))


def test_no_cluster_stays_empty():
    """As many clusters as points: each has its own."""
    points = torch.cat([torch.zeros(1, 2), blobs()[:6]])
    assert sorted(k_means(points, 7, seed=1)[1].tolist()) == list(range(7))


def test_nearest_gives_a_point_for_each_centre():
    points = blobs()
    assert nearest(points, points[[3, 20, 7]] + 1e-3).tolist() == [3, 20, 7]
