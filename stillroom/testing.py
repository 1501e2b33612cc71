"""Helpers for tests of recipes: where gradients go, and what a loop did.

seen = trace(recipe, run, {"updates": 4}, watch=["fake_loss"])        # the recipe at its TINY size, on a test's run
assert seen.steps("fake") == [0, 1, 2, 3] and seen.steps("generator") == [0, 3]
assert not seen.moved("teacher") and all(not call.grad for call in seen.calls("teacher"))
(x, s, t), loss = seen.calls("fake_loss")[0].args[1:4], seen.calls("fake_loss")[0].result
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._pytree import tree_map

from stillroom.core.config import override
from stillroom.core.engine import parameters
from stillroom.core.roles import Ema
from stillroom.core.run import Run


def assert_grads(loss: torch.Tensor, *, to: Iterable[nn.Module | torch.Tensor], not_to: Iterable[nn.Module | torch.Tensor] = ()) -> None:
    """AssertionError unless `loss` sends gradient to every network in `to` and to none in `not_to`.

    A network is reached when any of its parameters gets a gradient that is not zero; frozen parameters count as not reached.
    """
    to, not_to = list(to), list(not_to)

    def reached(item: nn.Module | torch.Tensor) -> bool:
        leaves = [p for p in parameters(item) if p.requires_grad]
        if not leaves or not loss.requires_grad:
            return False
        found = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        return any(g is not None and bool(g.count_nonzero()) for g in found)

    for i, item in enumerate(to):
        assert reached(item), f"no gradient reaches item {i} of `to` ({type(item).__name__})"
    for i, item in enumerate(not_to):
        assert not reached(item), f"gradient reaches item {i} of `not_to` ({type(item).__name__})"


@dataclass(frozen=True)
class Update:
    """One `run.update`."""

    stage: str
    """Path of the run, and its loop unless that is "train": "run", "run/phase1", "run:pretrain"."""
    step: int
    chunk: int
    roles: tuple[str, ...]
    parts: dict[str, torch.Tensor]
    """The losses as they were given (vectors or scalars), detached."""
    count: Any
    rates: tuple[float, ...]
    """Learning rate of each role."""
    moved: frozenset[str]
    """Which of the run's roles have other weights after the update."""


@dataclass(frozen=True)
class Call:
    """One call of a network, or of a watched function."""

    who: str
    stage: str
    step: int
    chunk: int
    args: tuple
    keywords: dict[str, Any]
    result: Any
    """Detached, like the arguments."""
    grad: bool
    """Whether autograd was on."""
    training: bool | None
    """The network's mode; None for a function."""


@dataclass
class Trace:
    """What a recipe did, in order. Networks are called by the names of their roles, moving averages by theirs, frozen ones "frozen 0",
    "frozen 1", … in the order in which they were frozen; a second one of a name has an apostrophe."""

    recorded: list[Update] = field(default_factory=list)
    called: list[Call] = field(default_factory=list)
    averaged: list[tuple[str, int]] = field(default_factory=list)
    """(stage, step) of every call of a moving average's `update`."""
    logged: list[dict[str, Any]] = field(default_factory=list)
    """What `run.log` was given, with "stage" and "step"."""
    first: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """Weights of every network when the run first held it."""
    nets: dict[str, Any] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    """The name that a network had first, by each of its names: one that is trained again has two."""
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    metrics: Any = None
    """What the recipe returned."""

    def updates(self, role: str | None = None, stage: str = "") -> list[Update]:
        """Of a role (None: of all), in stages whose path ends so."""
        return [u for u in self.recorded if role in (None, *u.roles) and u.stage.endswith(stage)]

    def steps(self, role: str, stage: str = "") -> list[int]:
        """Steps at which the role was updated."""
        return [u.step for u in self.updates(role, stage)]

    def losses(self, role: str, part: str = "loss", stage: str = "") -> list[float]:
        """Means of one part of the role's loss, update by update (those that have it)."""
        return [float(u.parts[part].float().mean()) for u in self.updates(role, stage) if part in u.parts]

    def calls(self, who: str, stage: str = "", step: int | None = None) -> list[Call]:
        who = self.same.get(who, who)
        return [c for c in self.called if c.who == who and c.stage.endswith(stage) and step in (None, c.step)]

    def moved(self, name: str) -> bool:
        """Whether any weight or buffer of the network has changed since the run first held it."""
        return any(not torch.equal(a, b) for a, b in zip(self.first[name], _tensors(self.nets[name]), strict=True))


@contextlib.contextmanager
def recording(watch: Mapping[str, Any] | None = None) -> Iterator[Trace]:
    """Everything that runs inside is written down. watch: modules by the name of a function of theirs whose calls are recorded too."""
    seen, hooks = Trace(), []
    originals = {name: getattr(Run, name) for name in ("update", "trainable", "frozen", "ema", "log", "steps")}
    average = Ema.update
    loops: dict[Run, str] = {}
    latest: list[Run] = []
    owners: dict[int, Run] = {}

    def place(run: Run) -> dict[str, Any]:
        loop = loops.get(run, "train")
        return {"stage": run.path + ("" if loop == "train" else f":{loop}"), "step": run.finite.step, "chunk": run.roles.chunk}

    def steps(run: Run, total: int, name: str = "train") -> Iterator[int]:
        for step in originals["steps"](run, total, name):
            loops[run], latest[:] = name, [run]
            yield step

    def hold(run: Run, name: str, net: Any) -> None:
        while name in seen.nets:
            name += "'"
        known = next((other for other, held in seen.nets.items() if held is net), None)
        seen.nets[name], seen.first[name] = net, [t.detach().clone() for t in _tensors(net)]
        seen.same[name] = name if known is None else seen.same[known]
        if isinstance(net, nn.Module) and known is None:

            def called(module: nn.Module, args: tuple, keywords: dict, result: Any) -> None:
                if module is not net:  # a deep copy, which took the hook along
                    return
                given = {"args": _kept(args), "keywords": _kept(keywords), "result": _kept(result)}
                here = place(latest[0] if latest else run)
                seen.called.append(Call(name, **here, **given, grad=torch.is_grad_enabled(), training=module.training))

            hooks.append(net.register_forward_hook(called, with_kwargs=True))

    def update(run: Run, optimizer: Any, loss: Any = None, *, count: Any = None, **parts: Any) -> torch.Tensor:
        given = {"loss": loss, **parts} if loss is not None else parts
        before = {name: [p.detach().clone() for p in role.parameters] for name, role in run.roles.items()}
        learners = [run.roles.of(o) for o in (optimizer if isinstance(optimizer, tuple) else (optimizer,))]
        result = originals["update"](run, optimizer, loss, count=count, **parts)
        moved = {n for n, role in run.roles.items() if any(not torch.equal(a, b) for a, b in zip(before[n], role.parameters))}
        rates = tuple(role.optimizer.param_groups[0]["lr"] for role in learners)
        names = tuple(role.name for role in learners)
        seen.recorded.append(Update(**place(run), roles=names, parts=_kept(given), count=count, rates=rates, moved=frozenset(moved)))
        return result

    def trainable(run: Run, name: str, net: Any, optimizer: Any) -> Any:
        net, built = originals["trainable"](run, name, net, optimizer)
        hold(run, name, net)
        seen.optimizers[name] = built
        return net, built

    def frozen(run: Run, net: nn.Module) -> nn.Module:
        net = originals["frozen"](run, net)
        hold(run, f"frozen {sum(n.startswith('frozen ') for n in seen.nets)}", net)
        return net

    def ema(run: Run, name: str, net: nn.Module, decay: float) -> Ema:
        held = originals["ema"](run, name, net, decay)
        owners[id(held)] = run
        hold(run, name, held.net)
        return held

    def averaged(held: Any, decay: float | None = None) -> None:
        here = place(owners[id(held)])
        seen.averaged.append((here["stage"], here["step"]))
        average(held, decay)

    def log(run: Run, **values: Any) -> None:
        seen.logged.append({**values, **place(run)})
        originals["log"](run, **values)

    def watched(name: str, function: Callable) -> Callable:
        def call(*args: Any, **keywords: Any) -> Any:
            given, grad = (_kept(args), _kept(keywords)), torch.is_grad_enabled()
            result = function(*args, **keywords)
            here = place(latest[0]) if latest else {"stage": "", "step": 0, "chunk": 0}
            seen.called.append(Call(name, **here, args=given[0], keywords=given[1], result=_kept(result), grad=grad, training=None))
            return result

        return call

    with contextlib.ExitStack() as stack:
        for name, new in {"update": update, "trainable": trainable, "frozen": frozen, "ema": ema, "log": log, "steps": steps}.items():
            stack.enter_context(mock.patch.object(Run, name, new))
        stack.enter_context(mock.patch.object(Ema, "update", averaged))
        for name, module in (watch or {}).items():
            stack.enter_context(mock.patch.object(module, name, watched(name, getattr(module, name))))
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()


def trace(recipe: Any, run: Run, changes: Mapping[str, Any] | None = None, watch: Sequence[str] = (), **keywords: Any) -> Trace:
    """Run a recipe at its TINY size with `changes` by dotted name, writing down what it does.

    watch: functions of the recipe's module whose calls are recorded. keywords: for `main` (data, teacher, …).
    """
    with recording(dict.fromkeys(watch, recipe)) as seen:
        seen.metrics = recipe.main(override(recipe.Config(), {**recipe.TINY, **(changes or {})}), run, **keywords)
    return seen


def _tensors(net: Any) -> list[torch.Tensor]:
    return [*parameters(net), *(net.buffers() if isinstance(net, nn.Module) else ())]


def _kept(values: Any) -> Any:
    """Tensors as they are now, for in-place changes would show later."""
    return tree_map(lambda v: v.detach().clone() if isinstance(v, torch.Tensor) else v, values)
