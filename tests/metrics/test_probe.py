import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp

from stillroom.metrics.probe import linear_probe


def test_probe_is_the_optimum_of_its_objective():
    """Against scipy's minimum of summed cross-entropy plus |W|^2 / (2 strength), on features standardised by the training ones."""
    random = np.random.default_rng(0)
    x, new = random.normal(3, 2, (40, 4)), random.normal(3, 2, (60, 4))
    truth = random.normal(size=(4, 3))
    y, y_new = ((part - 3) @ truth + random.normal(size=(len(part), 3)) for part in (x, new))
    y, y_new = y.argmax(1), y_new.argmax(1)
    a, b = ((part - x.mean(0)) / x.std(0) for part in (x, new))

    def objective(flat):
        weights, bias = flat[:12].reshape(4, 3), flat[12:]
        logits = a @ weights + bias
        return (logsumexp(logits, 1) - logits[range(40), y]).sum() + (weights**2).sum() / (2 * 0.5)

    best = minimize(objective, np.zeros(15), tol=1e-10).x
    expected = ((b @ best[:12].reshape(4, 3) + best[12:]).argmax(1) == y_new).mean()
    accuracy = linear_probe(torch.tensor(x), torch.tensor(y), torch.tensor(new), torch.tensor(y_new), strength=0.5)
    assert accuracy == expected
