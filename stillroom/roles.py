"""Networks and how a run holds them: trainable roles and their updates, moving averages, the guard against values that are not finite."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stillroom.errors import UserError
from stillroom.optim import BuildOptimizer, Optimizer

if TYPE_CHECKING:
    from stillroom.run import Run


@dataclass
class Role:
    """A trainable network (or bare parameters) with the optimizer that holds it and the config that both came from."""

    name: str
    net: Any
    optimizer: torch.optim.Optimizer
    config: BuildOptimizer
    parameters: list[nn.Parameter]
    weight: Any = 0.0
    """What the gradients accumulated in this step are to be divided by."""
    reaches: bool | None = None
    """Whether losses of this role reach parameters of other roles; None before its first update. A wrong guess costs time only."""


class Ema:
    """An exponential moving average of a network's parameters; buffers are copied. `net` is a frozen network."""

    def __init__(self, run: Run, source: nn.Module, decay: float):
        self.run, self.decay, self.net = run, decay, run.engine.copy(source)
        self._parameters: tuple[list[torch.Tensor], list[torch.Tensor]] = (list(self.net.parameters()), list(source.parameters()))
        self._buffers = list(zip(self.net.buffers(), source.buffers(), strict=True))

    @torch.no_grad()
    def update(self, decay: float | None = None) -> None:
        """After an optimizer step: average <- decay * average + (1 - decay) * parameters. Waits for the last chunk of a step."""
        if self.run.chunk + 1 < self.run.accumulate:
            return
        torch._foreach_lerp_(*self._parameters, 1 - (self.decay if decay is None else decay))
        for average, buffer in self._buffers:
            average.copy_(buffer)


def refuse_shared(run: Run, net: nn.Module) -> None:
    """Freezing `net` would freeze what it shares with a trainable role as well."""
    mine = set(net.parameters())
    for role in run.roles.values():
        if mine.intersection(role.parameters):
            raise ValueError(f"this network shares parameters with the trainable role {role.name!r}: freeze a deep copy")


def averages(parts: dict[str, torch.Tensor], count: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Each part as a scalar, and the weight of this chunk: what vectors were averaged over, 1 for scalars."""
    weight: Any = 1.0
    means = {}
    for name, value in parts.items():
        if value.dim():
            # A chunk may have nothing to count: it then adds nothing.
            weight = value.numel() if count is None else torch.as_tensor(count, device=value.device).clamp_min(1e-12)
            value = value.mean() if count is None else value.sum() / weight
        means[name] = value
    return means, weight


def backward(run: Run, roles: list[Role], loss: torch.Tensor, weight: Any) -> None:
    """Gradients of `loss` for `roles` only, weighted so that chunks and processes add up to the mean over the effective batch."""
    if run.accumulate > 1:
        for role in roles:
            role.weight = role.weight + weight
        loss = loss * weight
    elif run.world > 1:
        loss = loss * (weight * run.world / run.engine.sum(torch.as_tensor(weight, dtype=torch.float32, device=run.device)))
    others = [p for role in run.roles.values() if role not in roles for p in role.parameters] if len(run.roles) > len(roles) else []
    if others and run.world == 1:  # FSDP2's hooks need the ordinary backward
        if roles[0].reaches is None:
            roles[0].reaches = _reaches(loss, others)
        if roles[0].reaches:
            loss.backward(inputs=[p for role in roles for p in role.parameters if p.requires_grad])
            return
    # Without a list of inputs autograd walks the graph faster.
    aside = [(p, p.grad) for p in others if p.grad is not None]
    for p, _ in aside:
        p.grad = None
    loss.backward()
    for p in others:
        if p.grad is not None:
            p.grad, roles[0].reaches = None, True
    for p, gradient in aside:
        p.grad = gradient


def _reaches(loss: torch.Tensor, parameters: list[nn.Parameter]) -> bool:
    """Whether a backward pass from `loss` would give gradients to any of the parameters."""
    wanted, seen, ahead = {id(p) for p in parameters}, set(), [loss.grad_fn]  # type: set[int], set[Any], list[Any]
    while ahead:
        if (node := ahead.pop()) is None or node in seen:
            continue
        if id(getattr(node, "variable", None)) in wanted:
            return True
        seen.add(node)
        ahead.extend(following for following, _ in node.next_functions)
    return False


def step(run: Run, role: Role) -> None:
    """Average, normalise, clip, step and clear."""
    if run.world > 1:
        run.engine.average(role.net, role.parameters)
    if run.accumulate > 1:
        weight = role.weight
        if run.world > 1:
            weight = run.engine.sum(torch.as_tensor(weight, dtype=torch.float32, device=run.device)) / run.world
        torch._foreach_div_([p.grad for p in role.parameters if p.grad is not None], weight)
        role.weight = 0.0
    if isinstance(role.config, Optimizer) and role.config.clip:
        norm = run.engine.clip(role.parameters, role.config.clip)
        run.finite.check(role.name, norm, {"gradient norm": norm})
        run.log(**{f"{role.name}/gradient norm": norm})
    role.optimizer.step()
    role.optimizer.zero_grad(set_to_none=True)


class Finite:
    """Stops a run at the first loss that is not finite, naming step, role and part."""

    def __init__(self, run: Run):
        self.run = run
        self._waiting: list[tuple[int, str, torch.Tensor, dict[str, torch.Tensor]]] = []

    def check(self, who: str, total: torch.Tensor, parts: dict[str, torch.Tensor]) -> None:
        """On CPU at once; on an accelerator every 32 updates and before each save, so that work stays queued ahead of the host."""
        if total.is_cpu:
            if not math.isfinite(total.item()):
                self._stop(self.run.step, who, parts)
            return
        self._waiting.append((self.run.step, who, total.detach(), {k: v.detach() for k, v in parts.items()}))
        if len(self._waiting) >= 32:
            self.pending()

    def pending(self) -> None:
        if self._waiting and not torch.stack([total.float() for _, _, total, _ in self._waiting]).isfinite().all():
            for step, who, total, parts in self._waiting:
                if not torch.isfinite(total):
                    self._stop(step, who, parts)
        self._waiting.clear()

    def parameters(self) -> None:
        """Before a save: every trainable parameter."""
        for role in self.run.roles.values():
            mine = [getattr(p, "_local_tensor", p).detach() for p in role.parameters]  # a sharded parameter's own part
            norms = torch._foreach_norm([p for p in mine if p.numel()], float("inf"))
            bad = sum((~torch.isfinite(n)).float() for n in norms) + torch.zeros((), device=self.run.device)
            if self.run.engine.sum(bad):  # all processes learn of it
                raise UserError(f"{self.run.path}, step {self.run.step}: parameters of {role.name!r} are not finite. {self._advice()}")

    def _stop(self, step: int, who: str, parts: dict[str, torch.Tensor]) -> None:
        bad = [f"{name} = {value.item()}" for name, value in parts.items() if not torch.isfinite(value)]
        what = ", ".join(bad) or "the sum of finite parts overflows"
        raise UserError(f"{self.run.path}, step {step}: the loss of {who!r} is not finite ({what}). {self._advice()}")

    def _advice(self) -> str:
        return f"The last good checkpoint in {self.run.folder} is kept; lower the learning rate, clip gradients, or use --precision fp32."
