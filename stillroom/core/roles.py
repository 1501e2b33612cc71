"""Networks and how they are held: trainable roles and their updates, moving averages, the guard against values that are not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillroom.core.engine import Local
from stillroom.core.errors import UserError
from stillroom.core.optim import BuildOptimizer, Optimizer


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


class Roles(dict[str, Role]):
    """The trainable roles of one run by name, and where in a step they stand: which of its chunks is under way."""

    def __init__(self, engine: Local, accumulate: int = 1):
        super().__init__()
        self.engine, self.accumulate, self.chunk = engine, accumulate, 0

    @property
    def last_chunk(self) -> bool:
        """Whether the step is whole after this chunk: what happens once a step waits for it."""
        return self.chunk + 1 == self.accumulate

    def of(self, optimizer: torch.optim.Optimizer) -> Role:
        """The role that an optimizer belongs to. ValueError when there is none."""
        for role in self.values():
            if role.optimizer is optimizer:
                return role
        raise ValueError("this optimizer belongs to no role of this run: make it with run.trainable")

    def refuse_shared(self, net: nn.Module) -> None:
        """Freezing `net` would freeze what it shares with a trainable role as well."""
        own = set(net.parameters())
        for role in self.values():
            if own.intersection(role.parameters):
                raise ValueError(f"this network shares parameters with the trainable role {role.name!r}: freeze a deep copy")

    def schedule(self, step: int, total: int) -> None:
        """Learning rates of step `step` of `total`; a group of parameters may have a "ratio" to the others' rate."""
        for role in self.values():
            if isinstance(role.config, Optimizer):
                rate = role.config.rate(step, total)
                for group in role.optimizer.param_groups:
                    group["lr"] = rate * group.get("ratio", 1.0)

    def backward(self, learners: list[Role], loss: torch.Tensor, weight: Any) -> None:
        """Gradients of `loss` for `learners` only, weighted so that chunks and processes add up to the mean over the effective batch."""
        world, device = self.engine.world, self.engine.device
        if self.accumulate > 1:
            for role in learners:
                role.weight = role.weight + weight
            loss = loss * weight
        elif world > 1:
            loss = loss * (weight * world / self.engine.sum(torch.as_tensor(weight, dtype=torch.float32, device=device)))
        others = [p for role in self.values() if role not in learners for p in role.parameters] if len(self) > len(learners) else []
        if others and world == 1:  # FSDP2's hooks need the ordinary backward
            if learners[0].reaches is None:
                learners[0].reaches = _reaches(loss, others)
            if learners[0].reaches:
                loss.backward(inputs=[p for role in learners for p in role.parameters if p.requires_grad])
                return
        # Without a list of inputs autograd walks the graph faster.
        aside = [(p, p.grad) for p in others if p.grad is not None]
        for p, _ in aside:
            p.grad = None
        loss.backward()
        for p in others:
            if p.grad is not None:
                p.grad, learners[0].reaches = None, True
        for p, gradient in aside:
            p.grad = gradient

    def prepare(self, role: Role) -> torch.Tensor | None:
        """Average, normalise and clip the gradients that `backward` left; their norm before it, if the role's config clips."""
        world = self.engine.world
        if world > 1:
            self.engine.average(role.net, role.parameters)
        if self.accumulate > 1:
            weight = role.weight
            if world > 1:
                weight = self.engine.sum(torch.as_tensor(weight, dtype=torch.float32, device=self.engine.device)) / world
            torch._foreach_div_([p.grad for p in role.parameters if p.grad is not None], weight)
            role.weight = 0.0
        if isinstance(role.config, Optimizer) and role.config.clip:
            return self.engine.clip(role.parameters, role.config.clip)
        return None


class Ema:
    """An exponential moving average of a network's parameters; buffers are copied. `net` is a frozen network."""

    def __init__(self, roles: Roles, source: nn.Module, decay: float):
        self.roles, self.decay, self.net = roles, decay, roles.engine.copy(source)
        self._tensors = _pairs(self.net, source)

    def update(self, decay: float | None = None) -> None:
        """After an optimizer step: average <- decay * average + (1 - decay) * parameters. Waits for the last chunk of a step."""
        if self.roles.last_chunk:
            _blend(*self._tensors, 1 - (self.decay if decay is None else decay))

    def state_dict(self) -> dict[str, Any]:
        return self.roles.engine.state(self.net, None)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.roles.engine.load(self.net, None, state)


def blend(target: nn.Module, source: nn.Module, share: float) -> None:
    """target <- (1 - share) target + share source, in place, for two networks of one form under one engine; buffers are copied."""
    _blend(*_pairs(target, source), share)


def _pairs(target: nn.Module, source: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]:
    return list(target.parameters()), list(source.parameters()), list(zip(target.buffers(), source.buffers(), strict=True))


@torch.no_grad()
def _blend(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], buffers: Sequence[tuple], share: float) -> None:
    torch._foreach_lerp_(targets, sources, share)  # type: ignore[call-overload]  # its stub knows lists of weights only
    for own, other in buffers:
        own.copy_(other)


def averages(parts: dict[str, torch.Tensor], count: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Each part as a scalar, and the weight of this chunk: what vectors were averaged over; `count`, or else 1, for scalars."""
    weight: Any = 1.0
    if count is not None:
        weight = torch.as_tensor(count, device=next(iter(parts.values())).device).clamp_min(1e-12)
    means = {}
    for name, value in parts.items():
        if value.dim():
            # A chunk may have nothing to count: it then adds nothing.
            weight = value.numel() if count is None else weight
            value = value.mean() if count is None else value.sum() / weight
        means[name] = value
    return means, weight


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


class Finite:
    """Stops a run at the first loss that is not finite, naming step, role and part."""

    def __init__(self, path: str, folder: Path):
        self.path, self.folder, self.step = path, folder, 0
        self._waiting: list[tuple[int, str, torch.Tensor, dict[str, torch.Tensor]]] = []

    def check(self, who: str, total: torch.Tensor, parts: dict[str, torch.Tensor]) -> None:
        """On CPU at once; on an accelerator every 32 updates and before each save, so that work stays queued ahead of the host."""
        if total.is_cpu:
            if not math.isfinite(total.item()):
                self._stop(self.step, who, parts)
            return
        self._waiting.append((self.step, who, total.detach(), {k: v.detach() for k, v in parts.items()}))
        if len(self._waiting) >= 32:
            self.pending()

    def pending(self) -> None:
        if self._waiting and not torch.stack([total.float() for _, _, total, _ in self._waiting]).isfinite().all():
            for step, who, total, parts in self._waiting:
                if not torch.isfinite(total):
                    self._stop(step, who, parts)
        self._waiting.clear()

    def parameters(self, roles: Roles) -> None:
        """Before a save: every trainable parameter."""
        for role in roles.values():
            own = [getattr(p, "_local_tensor", p).detach() for p in role.parameters]  # a sharded parameter's own part
            norms = torch._foreach_norm([p for p in own if p.numel()], float("inf"))
            bad = sum((~torch.isfinite(n)).float() for n in norms) + torch.zeros((), device=roles.engine.device)
            if roles.engine.sum(bad):  # all processes learn of it
                raise UserError(f"{self.path}, step {self.step}: parameters of {role.name!r} are not finite. {self._advice()}")

    def _stop(self, step: int, who: str, parts: dict[str, torch.Tensor]) -> None:
        bad = [f"{name} = {value.item()}" for name, value in parts.items() if not torch.isfinite(value)]
        what = ", ".join(bad) or "the sum of finite parts overflows"
        raise UserError(f"{self.path}, step {step}: the loss of {who!r} is not finite ({what}). {self._advice()}")

    def _advice(self) -> str:
        return f"The last good checkpoint in {self.folder} is kept; lower the learning rate, clip gradients, or use --precision fp32."
