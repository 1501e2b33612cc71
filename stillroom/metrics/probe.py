"""What frozen features are worth for a labelled task."""

from __future__ import annotations

from torch import Tensor


def linear_probe(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, strength: float = 1.0) -> float:
    """Test accuracy of logistic regression on features (N, d) that are standardised by the training ones.

    The optimum itself, of the summed cross-entropy plus |weights|^2 / (2 strength), by scikit-learn: no step size to tune, no seed.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
    model.fit(train.cpu().double().numpy(), labels.cpu().numpy())
    return float(model.score(test.cpu().double().numpy(), test_labels.cpu().numpy()))
