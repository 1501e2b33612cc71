"""A pretended accelerator: `with pretend() as seen:` torch believes in one device, `gpu:0`, whose tensors hold their values on the CPU.

Whole programs run on it, for its tensors have values, and it refuses what a GPU refuses: operators on tensors of two devices, an index of
the device into a tensor of the host, a generator of the wrong device, `numpy()`. What would make the host wait for the device (values
that the host reads, results whose shape depends on values, memory sent to it without `non_blocking`) is counted in `seen.waits`, all that
is sent to the device in `seen.copies`, every operator in `seen.kernels`; all of them by the training loop whose step is under way (None
outside of loops), and by line.

It says nothing about time, memory or numerics, and one thing it cannot do: change the shape of a tensor in place.
Importing this module renames torch's spare backend for the whole process, so it belongs into a process of its own:

    python -m tests.pretended FOLDER NAME[:bf16]…        # recipes at TINY size; FOLDER/found.json says what was seen
"""

from __future__ import annotations

import builtins
import contextlib
import json
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

import stillroom
from stillroom.catalogue import cards
from stillroom.catalogue.execute import execute
from stillroom.core import optim
from stillroom.core.config import override
from stillroom.core.engine import make, parameters
from stillroom.core.run import Run
from stillroom.core.store import Store

NAME = "gpu"
PACKAGE = str(Path(stillroom.__file__).parent)
SHAPED = {"nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "bincount", "equal", "multinomial"}
"""Operators whose result's shape (or whose result, on the host) depends on values of the device."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
MIXED = INDEXING | {"copy_", "_to_copy", "set_", "_has_compatible_shallow_copy_type", "_pin_memory"}
"""Operators that take tensors of both devices (those that index are looked at one by one)."""
FREE = {"detach", "_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided"}
"""Operators that start no kernel, views aside."""
HALF = ["linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "mv", "conv1d", "conv2d", "convolution", "scaled_dot_product_attention"]
WHOLE = ["exp", "log", "pow.Tensor_Scalar", "softmax.int", "log_softmax.int", "layer_norm", "group_norm", "nll_loss", "kl_div", "mse_loss"]
WHOLE += ["cumsum", "norm.ScalarOpt_dim", "rsqrt", "softplus", "binary_cross_entropy_with_logits", "cosine_similarity", "cdist", "prod"]
WHOLE += ["sum", "sum.dim_IntList"]
"""What autocast runs in bfloat16 and in float32 on a GPU, as far as it occurs here."""


class _Backend:
    """What torch asks of `torch.gpu`. The host's generator serves the device, so that a seed gives the same draws on both."""

    is_available = is_initialized = is_bf16_supported = lambda self: True
    _is_in_bad_fork = lambda self: False
    device_count = lambda self: 1
    current_device = lambda self: 0
    get_amp_supported_dtype = lambda self: [torch.float16, torch.bfloat16]
    get_rng_state = lambda self, device=0: torch.get_rng_state()
    set_device = synchronize = manual_seed = manual_seed_all = set_rng_state = _lazy_init = lambda self, *_: None


torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME, _Backend())  # type: ignore[no-untyped-call]
DEVICE = torch.device(NAME, 0)


class Seen:
    """What happened, each counter by (loop or None, what, line)."""

    def __init__(self) -> None:
        self.waits: Counter[tuple] = Counter()
        self.copies: Counter[tuple] = Counter()
        self.kernels: Counter[tuple] = Counter()
        self.loop: str | None = None
        self.steps: Counter[str] = Counter()
        """Counted steps of each loop: all but its first, which logs and builds what later ones have."""
        self.generators = ["cpu"]

    def note(self, counter: Counter[tuple], what: str) -> None:
        counter[self.loop, what, place()] += 1

    def a_step(self, counter: Counter[tuple]) -> dict[str, float]:
        """{loop: what: line: times a step} of what happens in training loops."""
        return {": ".join(map(str, key)): round(n / self.steps[key[0]], 2) for key, n in sorted(counter.items(), key=str) if key[0]}


SEEN = Seen()


def place() -> str:
    """The innermost line of the package that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            return f"{frame.f_code.co_filename[len(PACKAGE) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


class Pretended(torch.Tensor):
    """A tensor of the device: `inner` holds its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Pretended:
        own = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        own.inner = inner
        return own

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretended({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Pretended:
        if id(self) not in memo:
            twin = Pretended(self.inner.clone()).requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):
                twin._is_param = True  # type: ignore[attr-defined]
            memo[id(self)] = twin
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.clone().__reduce_ex__(protocol)

    def tolist(self) -> Any:
        SEEN.note(SEEN.waits, "tolist")
        return self.inner.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert a tensor of {DEVICE} to numpy")

    __array__ = numpy
    untyped_storage = lambda self: self.inner.untyped_storage()
    data_ptr = lambda self: self.inner.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class Generator(torch.Generator):
    """A generator of the host that remembers the device it was made for."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        own = super().__new__(cls)
        own.on = torch.device(device)  # type: ignore[attr-defined]
        return own

    def __init__(self, device: Any = "cpu"):
        pass

    device = property(lambda self: self.on)  # type: ignore[assignment]


def refuse(func: Any, why: str) -> None:
    raise RuntimeError(f"{why}, in {func} at {place()}")


def look(func: Any, name: str, args: Any, kwargs: dict[str, Any], leaves: list[Any], onto: bool) -> None:
    """Refuse what a GPU refuses, count waits and copies."""
    held = [x for x in leaves if isinstance(x, Pretended)]
    plain = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, Pretended) and x.device.type != "meta"]
    if name in ("_to_copy", "copy_"):
        source = isinstance(args[0] if name == "_to_copy" else args[1], Pretended)
        target = onto if name == "_to_copy" else isinstance(args[0], Pretended)
        if source and not target:
            SEEN.note(SEEN.waits, "device to host")
        elif target and not source:
            SEEN.note(SEEN.copies, "host to device")
            if not (kwargs.get("non_blocking") or args[2:3] == (True,)):  # `copy_` has it as its third argument
                SEEN.note(SEEN.waits, "host to device")
    elif name in INDEXING:
        indices = [x for x in args[1] if x is not None]
        if not isinstance(args[0], Pretended) and any(isinstance(x, Pretended) for x in indices):
            refuse(func, "an index of the device into a tensor of the host")
        if isinstance(args[0], Pretended) and any(not isinstance(x, Pretended) for x in indices):
            SEEN.note(SEEN.copies, "index of the host")
            SEEN.note(SEEN.waits, "index of the host")
        if isinstance(args[0], Pretended) and any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            SEEN.note(SEEN.waits, "boolean mask")
        if name != "index" and isinstance(args[0], Pretended) != isinstance(args[2], Pretended) and args[2].dim():
            refuse(func, "values of one device into a tensor of the other")
    elif held and any(x.dim() for x in plain) and name not in MIXED:
        refuse(func, f"tensors on two devices {[(x.device.type, tuple(x.shape)) for x in [*held, *plain]]}")
    if any(isinstance(x, torch.Generator) for x in leaves) and SEEN.generators[-1] != (NAME if onto else "cpu"):
        refuse(func, f"a generator of {SEEN.generators[-1]} for a tensor of {NAME if onto else 'cpu'}")
    if held and name == "_local_scalar_dense":
        SEEN.note(SEEN.waits, "item")
    elif held and (name in SHAPED or (name == "repeat_interleave" and "Tensor" in func._overloadname)):
        SEEN.note(SEEN.waits, name)
    if (onto or held) and not func.is_view and name not in FREE:
        SEEN.kernels[SEEN.loop, name, ""] += 1


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator: on the values, its results on the device where it was told so or works on tensors of it."""
    name = func._schema.name.split("::")[-1]
    if name == "_fused_sdp_choice":
        return 0  # plain arithmetic
    leaves = tree_leaves((args, kwargs))
    held = {id(x.inner): x for x in leaves if isinstance(x, Pretended)}
    asked = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
    onto = bool(held) if asked is None else asked == NAME
    if asked != "meta":
        look(func, name, args, kwargs, leaves, onto)

    def enter(x: Any) -> Any:
        return x.inner if isinstance(x, Pretended) else torch.device("cpu") if isinstance(x, torch.device) and x.type == NAME else x

    def leave(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or isinstance(x, Pretended) or x.device.type == "meta":
            return x
        if (known := held.get(id(x))) is not None:
            if known.shape != x.shape:
                raise NotImplementedError(f"{func} changes a shape in place")
            return known
        return Pretended(x) if onto else x

    own_args, own = tree_map(enter, (tuple(args), kwargs))
    if own.get("pin_memory"):
        own["pin_memory"] = False
    result = func(*own_args, **own)
    return args[0] if name == "copy_" else tree_map(leave, result)


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Remembers whose generator a call was given, for the dispatcher makes a new object of it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "quantile" and isinstance(args[0], Pretended):  # changes a shape in place
            args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Pretended) else x, (args, kwargs))
            with _disable_current_modes():
                return Pretended(func(*args, **kwargs))
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Generator)), None)
        SEEN.generators.append(SEEN.generators[-1] if given is None else torch.device(getattr(given, "on", "cpu")).type)
        try:
            return func(*args, **kwargs)
        finally:
            SEEN.generators.pop()


_LIBRARIES = [torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")]
_LIBRARIES[1].fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


def _autocast(operator: str, to: torch.dtype) -> None:
    """Inside autocast the operator works in `to`, as it does on a GPU."""
    name, _, overload = operator.partition(".")
    op = getattr(getattr(torch.ops.aten, name), overload or "default")
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(x: Any) -> Any:
        return x.to(to) if isinstance(x, torch.Tensor) and x.dtype in (torch.float32, torch.bfloat16, torch.float16) else x

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(key):
            args, kwargs = tree_map(cast, (args, kwargs))
            return op(*args, **kwargs)

    _LIBRARIES[0].impl(operator, kernel, "AutocastPrivateUse1")


for _operator in HALF:
    _autocast(_operator, torch.bfloat16)
for _operator in WHOLE:
    _autocast(_operator, torch.float32)

_load, _steps, _trainable = torch.load, Run.steps, Run.trainable


def _placed(*args: Any, map_location: Any = None, **kwargs: Any) -> Any:
    state = _load(*args, **kwargs)
    return tree_map(lambda x: x.to(map_location) if isinstance(x, torch.Tensor) and map_location is not None else x, state)


def _counted(run: Run, total: int, name: str = "train") -> Iterator[int]:
    """`Run.steps`, whose first step only logs; waits are noted in the others, between the loop's own lines."""
    loop = f"{run.path.partition('/')[2] or 'run'}:{name}"
    for i, step in enumerate(_steps(run, total, name)):
        run.log_now = i == 0
        SEEN.loop = loop if i else None
        SEEN.steps[loop] += bool(i)
        yield step
        SEEN.loop = None


@contextlib.contextmanager
def pretend() -> Iterator[Seen]:
    """Inside, `gpu` is a device; what happens is counted anew."""
    SEEN.__init__()  # type: ignore[misc]
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch, "Generator", Generator),
            (torch, "load", _placed),
            (torch, "inference_mode", lambda mode=True: torch.no_grad()),  # such tensors know no versions, which wrappers need
            (torch.accelerator, "synchronize", lambda device=None: None),
            (Run, "steps", _counted),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        # The fused optimizers look at the type.
        plain = lambda x: torch.nn.Parameter if isinstance(x, Pretended) else builtins.type(x)
        stack.enter_context(mock.patch.object(optim, "type", plain, create=True))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(_Operators())
        stack.enter_context(_Functions())
        yield SEEN


def measured(folder: Path, precision: Any, name: str) -> dict[str, Any]:
    """A recipe at TINY size on the device, then once more from its checkpoints: "failed" (the error and its lines), or "still" (roles
    that did not move), "resumed" (whether the second time measures the same), and waits and copies a step."""
    recipe, first, held = cards.load(name), {}, {}  # type: Any, dict[str, list[torch.Tensor]], dict[str, Any]

    def trainable(run: Run, role: str, net: Any, optimizer: Any) -> Any:
        net, built = _trainable(run, role, net, optimizer)
        held[f"{run.path}:{role}"] = net
        first[f"{run.path}:{role}"] = [p.inner.clone() for p in parameters(net)]
        return net, built

    with pretend() as seen, mock.patch.object(Run, "trainable", trainable):
        engine, results = make("local", NAME, precision), []
        try:
            for plots in (True, False):
                with Run(folder / name, 0, engine=engine, store=Store(folder / "store"), plots=plots) as run:
                    results.append(execute(name, override(recipe.Config(), recipe.TINY), run)["metrics"])
                (folder / name / "result.json").unlink()
        except Exception as error:
            own = [f for f in traceback.extract_tb(error.__traceback__) if PACKAGE in f.filename]
            lines = [f"{f.filename[len(PACKAGE) + 1 :]}:{f.lineno}" for f in own[::-1]]
            return {"failed": f"{type(error).__name__}: {error}", "lines": lines}
        still = [role for role, net in held.items() if all(torch.equal(a, b.inner) for a, b in zip(first[role], parameters(net)))]
        kernels = Counter[str]()
        for (loop, *_), n in seen.kernels.items():
            if loop:
                kernels[loop] += n
        return {
            "still": still,
            "resumed": results[0] == results[1],
            "waits": seen.a_step(seen.waits),
            "copies": seen.a_step(seen.copies),
            "kernels": {loop: round(n / seen.steps[loop]) for loop, n in kernels.items()},
            "steps": dict(seen.steps),
        }


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    found = {}
    for name in names:
        recipe, _, precision = name.partition(":")
        found[name] = measured(Path(folder) / (precision or "fp32"), precision or "fp32", recipe)
    (Path(folder) / "found.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
