import numpy as np
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge

from stillroom.adapt.ridge import kernel_ridge, ridge_head


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_kernel_ridge_is_scikit_learns():
    x, new, y = rows(7, 3), rows(5, 3), rows(7, 2)
    kernel = lambda a, b: torch.exp(-torch.cdist(a, b).square())
    expected = KernelRidge(alpha=0.3, kernel="rbf", gamma=1.0).fit(x.numpy(), y.numpy()).predict(new.numpy())
    np.testing.assert_allclose(kernel_ridge(kernel(x, x), kernel(new, x), y, 0.3).numpy(), expected, rtol=1e-10)
    single = kernel_ridge(kernel(x, x), kernel(new, x), y[:, 0], 0.3)
    np.testing.assert_allclose(single.numpy(), expected[:, 0], rtol=1e-10)


def test_head_is_the_primal_ridge_with_a_bias_column_and_relative_ridge():
    """The primal solution of the same problem: weights of [features, 1], all penalised by share * trace of the kernel."""
    train, new, targets, share = rows(9, 4), rows(5, 4), rows(9, 3), 1e-2
    ones = lambda x: np.hstack([x.numpy(), np.ones((len(x), 1))])
    ridge = share * np.trace(ones(train) @ ones(train).T)
    expected = Ridge(alpha=ridge, fit_intercept=False).fit(ones(train), targets.numpy()).predict(ones(new))
    np.testing.assert_allclose(ridge_head(train, new, targets, share).numpy(), expected, rtol=1e-9)


def test_head_carries_a_bias():
    """Constant features can fit constant targets only through the bias column."""
    predicted = ridge_head(torch.zeros(4, 2), torch.zeros(3, 2), torch.full((4, 1), 5.0), 1e-6)
    torch.testing.assert_close(predicted, torch.full((3, 1), 5.0), rtol=1e-4, atol=1e-4)


def test_predictions_do_not_depend_on_the_features_scale_but_for_the_bias():
    train, new, targets = rows(6, 8), rows(5, 8), rows(6, 2)
    one, thousand = (ridge_head(scale * train, scale * new, targets, 1e-9) for scale in (1e3, 1e6))
    torch.testing.assert_close(one, thousand, rtol=1e-4, atol=1e-5)


def test_the_ridge_is_a_constant_to_the_gradient():
    """Against central differences of the prediction with the ridge held at its value."""
    train, new, targets = rows(5, 3).requires_grad_(), rows(4, 3), rows(5, 2)
    share = 0.1  # large, so that its gradient would show
    (gradient,) = torch.autograd.grad(ridge_head(train, new, targets, share).sum(), train)
    ones = lambda x: torch.cat([x, torch.ones_like(x[:, :1])], 1)
    held = share * (ones(train) @ ones(train).T).trace().detach()
    value = lambda x: kernel_ridge(ones(x) @ ones(x).T, ones(new) @ ones(x).T, targets, held).sum()
    numeric = torch.zeros_like(train)
    with torch.no_grad():
        for i in range(train.numel()):
            step = torch.zeros(train.numel(), dtype=torch.float64)
            step[i] = 1e-6
            step = step.view_as(train)
            numeric.view(-1)[i] = (value(train + step) - value(train - step)) / 2e-6
    torch.testing.assert_close(gradient, numeric, rtol=1e-6, atol=1e-8)


def test_half_precision_is_solved_in_single():
    train, new, targets = rows(6, 12), rows(5, 12), rows(6, 2)
    exact = ridge_head(train.bfloat16().double(), new.bfloat16().double(), targets.bfloat16().double(), 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        half = ridge_head(train.bfloat16(), new.bfloat16(), targets.bfloat16(), 1e-6)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), exact, rtol=1e-3, atol=1e-3)
