"""KRR-ST's first claim without its code: a random inner loss biases the outer gradient. Pure numpy."""

import math

import numpy as np


def meta_gradient(x, y, x_new, y_new, ridge, shift=0.0):
    """Outer loss 1/2 |x_new w - y_new|^2 at w = argmin 1/2 |x w - y|^2 + ridge/2 |w|^2, and its gradient in x by the implicit function
    theorem. `shift` adds to the Hessian what the noise adds in expectation."""
    hessian = x.T @ x + (ridge + shift) * np.eye(x.shape[1])
    w = np.linalg.solve(hessian, x.T @ y)
    v = np.linalg.solve(hessian, x_new.T @ (x_new @ w - y_new))
    return 0.5 * np.sum((x_new @ w - y_new) ** 2), np.outer(y - x @ w, v) - np.outer(x @ v, w)


def test_sampled_meta_gradient_is_biased_exactly_when_the_inner_loss_is_random():
    random = np.random.default_rng(0)
    x, y, x_new, y_new = random.normal(size=(6, 3)), random.normal(size=6), random.normal(size=(20, 3)), random.normal(size=20)
    numeric = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i] = 1e-6
        numeric[i] = (meta_gradient(x + step, y, x_new, y_new, 0.1)[0] - meta_gradient(x - step, y, x_new, y_new, 0.1)[0]) / 2e-6
    np.testing.assert_allclose(meta_gradient(x, y, x_new, y_new, 0.1)[1], numeric, rtol=1e-5, atol=1e-7)

    for noise, biased in ((0.0, False), (0.5, True)):
        # E |(x + e) w - y|^2 = |x w - y|^2 + 6 noise^2 |w|^2: the expected inner problem has this Hessian and no randomness left
        exact = meta_gradient(x, y, x_new, y_new, 0.1, shift=6 * noise**2)[1]
        sampled = np.stack([meta_gradient(x + noise * random.normal(size=x.shape), y, x_new, y_new, 0.1)[1] for _ in range(4000)])
        error = np.linalg.norm(sampled.mean(0) - exact)
        chance = math.sqrt(np.sum(sampled.var(0)) / len(sampled))
        if biased:
            assert error > 0.2 * np.linalg.norm(exact)
            assert error > 5 * chance
        else:
            assert error < 1e-10 * np.linalg.norm(exact)
