"""Devices and processes. Everything that differs between one process, DDP and FSDP2 is here; recipes never see it.

`Local` is plain torch, `Ddp` goes through Accelerate, `Fsdp2` through torch's own `fully_shard` (Accelerate prepares only one
model per call there, and ignores the request on CPU).  One launch line serves all: `torchrun --nproc-per-node N -m stillroom run …`.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import os
import types
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_map

from stillroom.core.errors import UserError, needs
from stillroom.core.optim import BuildOptimizer

Precision = Literal["fp32", "bf16"]


def is_bare(net: Any) -> bool:
    """Parameters without a forward pass (synthetic images, architecture weights): no wrapper can see them used."""
    return isinstance(net, nn.ParameterDict | nn.ParameterList | torch.Tensor | list)


def parameters(net: Any) -> list[Any]:
    return [net] if isinstance(net, torch.Tensor) else list(net) if isinstance(net, list) else list(net.parameters())


class Local:
    """One process on one device."""

    rank, world, local_rank = 0, 1, 0
    sharded = False
    """Whether networks are cut among the processes."""

    def __init__(self, device: str | None = None, precision: Precision = "fp32"):
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        try:
            self.device = torch.empty(0, device=device or accelerator or "cpu").device  # with its index: cuda is cuda:0
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device!r} is not usable here: {str(error).splitlines()[0]}", code=2) from None
        self.precision = precision

    # -- roles
    def trainable(self, net: Any, build: BuildOptimizer) -> tuple[Any, torch.optim.Optimizer]:
        if isinstance(net, nn.Module):
            net = self._autocast(net.to(self.device).train())
        elif any(p.device != self.device for p in parameters(net)):
            raise ValueError(f"bare parameters must already be on {self.device}")
        return net, build(parameters(net))

    def frozen(self, net: nn.Module) -> nn.Module:
        return self._autocast(net.to(self.device).eval().requires_grad_(False))

    def copy(self, net: nn.Module) -> nn.Module:
        """An independent, frozen copy in the same layout (for an EMA)."""
        return self.frozen(copy.deepcopy(net))

    def unwrap(self, net: Any) -> Any:
        """A plain, whole network with the weights of `net`; all processes call it together."""
        return net

    def _autocast(self, net: nn.Module) -> nn.Module:
        if self.precision == "bf16" and "forward" not in net.__dict__:
            # A bound method, so that a deep copy of the network gets one bound to itself.
            net.forward = types.MethodType(torch.autocast(self.device.type, torch.bfloat16)(type(net).forward), net)  # type: ignore[method-assign]
        return net

    # -- gradients
    def synchronise(self, net: Any, now: bool) -> None:
        """Whether the coming backward passes of `net` exchange gradients (of a role that is alone, those of a step's last chunk only)."""

    def average(self, net: Any, params: list[nn.Parameter]) -> None:
        """Before a role's step: every process holds the mean of the gradients, and the buffers of rank 0."""

    def clip(self, params: list[nn.Parameter], norm: float) -> torch.Tensor:
        return _plain(nn.utils.clip_grad_norm_(params, norm))

    # -- collectives
    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The concatenation over processes, in rank order, along the first dimension."""
        return tensor

    def barrier(self) -> None:
        pass

    def end(self) -> None:
        """The last call of a program that succeeded: of several processes, each leaves the group and ends here, with exit code 0."""

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The block runs on rank 0, then on the others."""
        if self.rank:
            self.barrier()
        yield
        if not self.rank:
            self.barrier()

    # -- state, the same on disk for every engine
    def state(self, net: Any, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
        """Of a role (with its optimizer), without what it holds frozen: the base under its adapters is not written again and again."""
        if is_bare(net):
            tensors: dict[Any, torch.Tensor] = dict(enumerate(parameters(net)))
        else:
            still = {name for name, p in net.named_parameters() if not p.requires_grad} if optimizer else set()
            tensors = {name: value for name, value in net.state_dict().items() if name not in still}
        return {"net": tensors} | ({"optimizer": optimizer.state_dict()} if optimizer else {})

    def load(self, net: Any, optimizer: torch.optim.Optimizer | None, state: dict[str, Any]) -> None:
        if is_bare(net):
            with torch.no_grad():
                for i, parameter in enumerate(parameters(net)):
                    parameter.copy_(state["net"][i])
        else:
            still = {name for name, p in net.named_parameters() if not p.requires_grad}
            missing, unknown = net.load_state_dict(state["net"], strict=False)
            if unknown or set(missing) - (still if optimizer else set()):
                raise RuntimeError(f"the saved network differs: {[*missing, *unknown][:3]}")
        if optimizer:
            optimizer.load_state_dict(state["optimizer"])


class _Distributed(Local):
    """What DDP and FSDP2 share: the process group's collectives."""

    def average(self, net: Any, params: list[nn.Parameter]) -> None:
        buffers = [] if is_bare(net) else [b for b in net.buffers() if b.is_floating_point()]
        learning = [p for p in params if p.requires_grad]
        for dtype in sorted({t.dtype for t in [*learning, *buffers]}, key=str):
            mine, theirs = ([t for t in tensors if t.dtype == dtype] for tensors in (learning, buffers))
            # What a process has no gradient for (a gate was shut) counts as zero if another one has it, and is left alone if none has.
            has = torch.tensor([float(p.grad is not None) for p in mine], dtype=dtype, device=self.device)
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in mine]
            parts += [b if self.rank == 0 else torch.zeros_like(b) for b in theirs]
            flat = torch.cat([has, *(t.detach().reshape(-1) for t in parts)])
            torch.distributed.all_reduce(flat)
            sums = flat[len(has) :].split([t.numel() for t in parts])
            for i, p in enumerate(mine):
                if p.grad is not None or flat[i] > 0:
                    p.grad = sums[i].div_(self.world).view_as(p)
            with torch.no_grad():
                for b, value in zip(theirs, sums[len(mine) :]):
                    b.copy_(value.view_as(b))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        torch.distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def barrier(self) -> None:
        torch.distributed.barrier()

    def end(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
            atexit._run_exitfuncs()
            print(end="", flush=True)
            # The group's threads live on. One that lets go of a tensor while the interpreter is taken down would abort the process.
            os._exit(0)


class Ddp(_Distributed):
    """One replica a process, set up by Accelerate, so that its launcher and environment variables apply.

    Gradients are averaged in one piece before a step. `DistributedDataParallel` would send them during the backward pass, but it refuses
    what recipes do: weights used outside of a forward pass (the chunked losses of language models, quantized weights), two forward passes
    before one backward (adversarial heads), features of the middle of a network.
    """

    def __init__(self, device: str | None = None, precision: Precision = "fp32"):
        from accelerate import PartialState

        # Without an accelerator Accelerate must be told so, or each process takes itself for the only one.
        state, self.precision = PartialState(cpu=device == "cpu" or not torch.accelerator.is_available()), precision
        self.device = torch.device("cpu") if state.device.type == "cpu" else state.device  # it says cpu:0
        self.rank, self.world, self.local_rank = state.process_index, state.num_processes, state.local_process_index

    def trainable(self, net: Any, build: BuildOptimizer) -> tuple[Any, torch.optim.Optimizer]:
        net, optimizer = super().trainable(net, build)
        for tensor in filter(torch.is_floating_point, [*parameters(net), *([] if is_bare(net) else net.buffers())]):
            torch.distributed.broadcast(tensor.detach(), 0)
        return net, optimizer


class Fsdp2(_Distributed):
    """Every role is sharded on its own, whole-module granularity plus each child that holds at least a million parameters."""

    sharded = True

    def __init__(self, device: str | None = None, precision: Precision = "fp32"):
        self.rank, self.world, self.local_rank = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        super().__init__(device, precision)
        if self.device.type != "cpu":
            self.device = torch.device(self.device.type, self.local_rank)
            torch.accelerator.set_device_index(self.local_rank)
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo" if self.device.type == "cpu" else None)
        self.mesh = torch.distributed.init_device_mesh(self.device.type, (self.world,))

    def _shard(self, net: nn.Module, again: bool | None = None) -> nn.Module:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if hasattr(net, "_template"):  # a frozen network that serves again
            return net
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if self.precision == "bf16" else MixedPrecisionPolicy()
        template = copy.deepcopy(net).to("meta")
        net = net.to(self.device)
        for child in reversed(list(net.modules())[1:]):
            own, total = (sum(p.numel() for p in child.parameters(recurse=r)) for r in (False, True))
            if own == 0 and total >= 1_000_000 and not isinstance(child, nn.ModuleList | nn.ModuleDict):
                fully_shard(child, mesh=self.mesh, mp_policy=policy)
        fully_shard(net, mesh=self.mesh, mp_policy=policy, reshard_after_forward=again)
        object.__setattr__(net, "_template", template)  # not a submodule: it must not enter the state
        return net

    def trainable(self, net: Any, build: BuildOptimizer) -> tuple[Any, torch.optim.Optimizer]:
        if is_bare(net):
            return super().trainable(net, build)
        net = self._shard(net.train())
        return net, build(net.parameters())

    def frozen(self, net: nn.Module) -> nn.Module:
        # Left whole after its first forward pass, which no backward pass follows, a moving average would go on answering with old weights.
        return self._shard(net.eval().requires_grad_(False), again=True)

    def copy(self, net: nn.Module) -> nn.Module:
        template: Any = net._template
        twin = self.frozen(copy.deepcopy(template).to_empty(device=self.device))  # the same shards, so that weights copy locally
        with torch.no_grad():
            for new, old in zip([*twin.parameters(), *twin.buffers()], [*net.parameters(), *net.buffers()], strict=True):
                new.copy_(old)
        return twin

    def unwrap(self, net: Any) -> Any:
        if not hasattr(net, "_template"):
            return net
        whole = copy.deepcopy(net._template).to_empty(device=self.device).train(net.training)
        whole.load_state_dict(self.state(net, None)["net"])
        with torch.no_grad():
            for new, old in zip(whole.buffers(), net.buffers(), strict=True):  # those that a state leaves out too
                new.copy_(old)
        object.__setattr__(whole, "gathered", True)  # what its weights are used for teaches the sharded network nothing
        return whole.requires_grad_(any(p.requires_grad for p in net.parameters()))

    def average(self, net: Any, params: list[nn.Parameter]) -> None:
        if is_bare(net):
            return super().average(net, params)
        if not any(p.grad is not None for p in params):
            raise RuntimeError("no gradient arrived: forward() must return tensors in tuples, dicts or transformers' outputs")

    def synchronise(self, net: Any, now: bool) -> None:
        if hasattr(net, "set_requires_gradient_sync"):
            net.set_requires_gradient_sync(now)

    def state(self, net: Any, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
        return tree_map(_plain, super().state(net, optimizer))

    def load(self, net: Any, optimizer: torch.optim.Optimizer | None, state: dict[str, Any]) -> None:
        if not is_bare(net):
            own = net.state_dict()
            state = state | {"net": {name: _like(own.get(name), value) for name, value in state["net"].items()}}
            if optimizer:
                held = [p for group in optimizer.param_groups for p in group["params"]]
                moments = {i: {k: _like(held[i], v) for k, v in m.items()} for i, m in state["optimizer"]["state"].items()}
                state["optimizer"] = state["optimizer"] | {"state": moments}
        super().load(net, optimizer, state)


def _plain(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _like(mine: Any, whole: Any) -> Any:
    """A whole tensor cut as `mine` is, if it is; all processes hold the whole."""
    if not hasattr(mine, "placements") or mine.shape != getattr(whole, "shape", None):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, mine.device_mesh, mine.placements, src_data_rank=None)


def make(kind: Literal["auto", "local", "ddp", "fsdp2"] = "auto", device: str | None = None, precision: Precision = "fp32") -> Local:
    """The engine for this process: "auto" is DDP under a launcher that started several processes, else local."""
    if kind in ("ddp", "fsdp2") and "RANK" not in os.environ:
        launch = f"torchrun --nproc-per-node 2 -m stillroom run NAME --engine {kind}"
        raise UserError(f"--engine {kind} needs a launcher: {launch}", code=2)
    if kind == "fsdp2":
        return Fsdp2(device, precision)
    if kind == "ddp" or (kind == "auto" and int(os.environ.get("WORLD_SIZE", "1")) > 1):
        needs("accelerate", "hf", "a run in several processes")
        return Ddp(device, precision)
    return Local(device, precision)
