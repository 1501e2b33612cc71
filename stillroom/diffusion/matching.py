"""Distribution matching: the steps of two players that every recipe with a fake score makes (DMD, its relatives, Phased DMD).

The teacher ("real") and a model of the generator's own output ("fake") answer at one noised sample y of the generator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.core.run import Run
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.objectives import squared
from stillroom.diffusion.processes import Process
from stillroom.losses.adversarial import softplus_discriminator, softplus_generator
from stillroom.losses.scores import dmd_weight, vsd
from stillroom.nets.hooks import outputs


@contextmanager
def answering(net: nn.Module) -> Iterator[None]:
    """While the block runs, a network that otherwise trains answers without dropout."""
    training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(training)


@torch.no_grad()
def scores(
    run: Run, teacher: nn.Module, fake: nn.Module, y: Tensor, t: Tensor, cond: Any, process: Process | None = None
) -> tuple[Tensor, Tensor]:
    """(D_real, D_fake), both clean predictions at y, without gradient and dropout. The run stops if they are not finite; their mean
    distance is logged."""
    with answering(fake):
        real_x0, fake_x0 = teacher(y, t, cond, process).x0, fake(y, t, cond, process).x0
    gap = (fake_x0 - real_x0).abs().mean()
    run.finite.check("scores", gap, {"score gap": gap})
    run.log(score_gap=gap)
    return real_x0, fake_x0


def gap_loss(x: Tensor, real_x0: Tensor, fake_x0: Tensor) -> Tensor:
    """[B] whose gradient in x is (D_fake - D_real) / mean|x - D_real|, per element: descent moves x from the fake to the teacher (DMD)."""
    return vsd(x, fake_x0, real_x0, dmd_weight(x, real_x0))


def denoising_loss(raw: Tensor, x: Tensor, eps: Tensor, t: Tensor, fake: Denoiser) -> Tensor:
    """[B] squared error of the fake network's own output at mix(sg x, eps, t), in its own parametrization."""
    return squared(raw, fake.target(x.detach(), eps, t))


# -- the game with a head on the fake network's features -----------------------------------------------------------------------------
def features(net: Any, middle: nn.Module, x: Tensor, t: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
    """The network's own output at (x, t), and what its module `middle` gave in the same call (the last part, if it gives several)."""
    with outputs(middle) as seen:
        raw = net(x, t, cond, read=False)
    found = seen[-1][-1] if isinstance(seen[-1], tuple) else seen[-1]
    if found.requires_grad and hasattr(net, "unshard"):
        # FSDP2 gathers the weights of a module when a gradient reaches its output. A loss on the features alone enters the modules around
        # `middle` behind their outputs, and would find the weights that come before it still cut.
        around = [module for module in net.modules() if hasattr(module, "unshard") and middle in module.modules()]

        def gather(gradient: Tensor) -> None:
            for module in around:
                module.unshard()

        found.register_hook(gather)
    return raw, found


def fooling_loss(weight: float, fake_logits: Tensor) -> Tensor:
    """[B] weight softplus(-head(fake)): the generator's part."""
    return weight * softplus_generator(fake_logits)


def telling_loss(weight: float, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """[B] weight (softplus(-head(real)) + softplus(head(fake))): the part of head and fake network."""
    return weight * softplus_discriminator(real_logits, fake_logits)
