"""Groups among unlabelled inputs: principal axes at equal scale, and k-means."""

from __future__ import annotations

import torch
from torch import Tensor


def whiten(features: Tensor, dimensions: int) -> Tensor:
    """(N, dimensions): features (N, d) along their first principal axes, centred and each of unit (unbiased) variance.

    Without it the directions of largest spread decide what is near. Axes have no sign: only distances and angles of the result mean
    anything. ValueError unless dimensions <= min(N - 1, d), which is as many axes as have variance.
    """
    if not 1 <= dimensions <= min(len(features) - 1, features.shape[1]):
        raise ValueError(f"{len(features)} rows of {features.shape[1]} features have no {dimensions} principal axes")
    centred = features.double() - features.double().mean(0)
    left, _, _ = torch.linalg.svd(centred, full_matrices=False)
    return (left[:, :dimensions] * (len(features) - 1) ** 0.5).to(features.dtype)


def k_means(points: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Centres (count, d) of k-means++ and Lloyd's iterations on points (N, d), and each point's cluster (N,) int64.

    By scikit-learn, one start drawn from `seed`; a cluster that loses its last point begins anew at the point farthest from its centre.
    """
    from sklearn.cluster import KMeans

    found = KMeans(count, random_state=seed, n_init=1).fit(points.cpu().numpy())
    return torch.from_numpy(found.cluster_centers_).to(points), torch.from_numpy(found.labels_).long().to(points.device)


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """(K,) int64 position of the point (N, d) that is nearest to each of the centres (K, d)."""
    from sklearn.metrics import pairwise_distances_argmin

    return torch.from_numpy(pairwise_distances_argmin(centres.cpu().numpy(), points.cpu().numpy())).to(points.device)
