"""Kernel ridge regression as a differentiable function: the head of a network, or a whole model, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor


def kernel_ridge(train: Tensor, new: Tensor, targets: Tensor, ridge: float | Tensor) -> Tensor:
    """Predictions `new (train + ridge I)^-1 targets` of the fit that minimises |targets - f|^2 + ridge |f|^2 over the kernel's space.

    train (m, m) and new (b, m) are kernel values, between the training points and from the new ones to them; targets (m, d) or (m,).
    Differentiable in all of them. Solved in float32 or wider, also under autocast: half precision cannot hold a small ridge.
    Returns (b, d) or (b,).
    """
    width = torch.promote_types(train.dtype, torch.float32)
    with torch.autocast(train.device.type, enabled=False):
        train, new, targets = train.to(width), new.to(width), targets.to(width)
        return new @ torch.linalg.solve(train + ridge * torch.eye(len(train), dtype=width, device=train.device), targets)


def ridge_head(train: Tensor, new: Tensor, targets: Tensor, share: float) -> Tensor:
    """Predictions at the features `new` (b, h) of the linear head with bias that ridge regression fits to (train, targets).

    train (m, h), targets (m, d). A column of ones joins both feature matrices (so the bias is penalised like the weights, as in
    Lee et al. 2023), and the ridge is `share` of the trace of the training kernel, a constant to the gradient. Differentiable in all
    three tensors. Returns (b, d).
    """
    width = torch.promote_types(train.dtype, torch.float32)
    with torch.autocast(train.device.type, enabled=False):
        train, new = (torch.cat([x.to(width), torch.ones_like(x[:, :1], dtype=width)], 1) for x in (train, new))
        kernel = train @ train.T
        return kernel_ridge(kernel, new @ train.T, targets, share * kernel.detach().trace())
