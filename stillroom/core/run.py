"""`Run`: the services of one execution. It gives folders, seeds, placement, steps, checkpoints, logs; it never owns the step.

    student, optimizer = run.trainable("student", net, cfg.optimizer)
    for step in run.steps(cfg.steps):
        index, images, labels = run.shard(batches(step))
        run.update(optimizer, ce=..., kd=...)

Resume is a property of the loop. Step i draws its random numbers from (seed, stage, loop, i, chunk, rank); outside loops all
processes draw alike, so that networks start equal. Batches are a pure function of (seed, step), and everything that changes is a
role or tracked by name; so a run killed anywhere and started again ends bitwise where the uninterrupted one ends.  Draw from
torch's generators only: they are what a step seeds.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils._pytree import tree_map

from stillroom.core import checkpoint, pictures
from stillroom.core import engine as engines
from stillroom.core.errors import UserError
from stillroom.core.interrupt import Interrupted, Signals
from stillroom.core.log import Clock, MetricsLog, progress_bar
from stillroom.core.optim import BuildOptimizer
from stillroom.core.roles import Ema, Finite, Role, Roles, averages
from stillroom.core.store import Store, replacing, write_atomic

B = TypeVar("B")
N = TypeVar("N")
# Odd numbers that set the seeds of steps, chunks and ranks apart (no hash: after 2 ms of work its code has left the processor's cache).
_STEP, _CHUNK, _RANK, _COMMON = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5


class Run:
    """One execution in one folder.

    folder: where everything is kept; created. UserError when another live process uses it.
    seed: of every random draw. engine: placement and processes (default: `engine.make()`).
    store: results shared by runs. accumulate: chunks that each step's batch is split into.
    save_seconds: time between checkpoints; every loop also saves at its end. plots: draw figures (off in verifications).
    tensorboard: write event files beside metrics.jsonl.
    """

    def __init__(
        self,
        folder: str | Path,
        seed: int = 0,
        *,
        engine: engines.Local | None = None,
        store: Store | None = None,
        accumulate: int = 1,
        save_seconds: float = 30.0,
        progress: bool = False,
        plots: bool = True,
        tensorboard: bool = False,
        parent: Run | None = None,
        wait: bool = False,
    ):
        self.folder, self.seed, self.parent = Path(folder), seed, parent
        self.path: str = self.folder.name if parent is None else f"{parent.path}/{self.folder.name}"
        self._stream: str = "" if parent is None else f"{parent._stream}/{self.folder.name}"
        self.engine, self.store = engine or engines.make(), store or Store()
        self.accumulate, self.save_seconds, self.progress = accumulate, save_seconds, progress
        self.plots, self.tensorboard = plots, tensorboard
        self.device, self.rank, self.world = self.engine.device, self.engine.rank, self.engine.world
        self.rows: list[dict[str, Any]] = []
        self.roles = Roles(self.engine, accumulate)
        self.common = torch.Generator()
        """For draws that steer control flow (which step, which expert, a coin): on the CPU, and the same on every process and chunk."""
        self._tracked: dict[str, Any] = {}
        self._loops: set[str] = set()
        self.finite = Finite(self.path, self.folder)
        self._log = MetricsLog(self.folder / "metrics.jsonl", writes=not self.rank, tensorboard=tensorboard)
        self._clock: Clock = parent._clock if parent is not None and not wait else Clock()
        self.log_now = True
        self._lock: Any = None
        if not self.rank:
            self._open(wait)
        self.engine.barrier()
        self._seed(self._number())

    def _open(self, wait: bool) -> None:
        from filelock import FileLock, Timeout

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.parent is None or wait:
                self._lock = self.store.lock(self.folder) if wait else FileLock(self.folder / ".lock")
                self._lock.acquire(timeout=-1 if wait else 0)
            for leftover in [*self.folder.glob(".*.tmp"), *self.folder.glob("*/.*.tmp")]:
                leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover)
        except Timeout:
            raise UserError(f"{self.folder} is in use by another live process; wait for it, or choose another --out.") from None
        except OSError as error:
            raise UserError(f"cannot write to the run folder {self.folder}: {error.strerror or error}.") from None

    def close(self) -> None:
        """Give the folder free for other processes."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- stages and shared results -----------------------------------------------------------------------------------------------
    def stage(self, name: str, *, shared: tuple | None = None) -> Run:
        """A named part of the run with its own folder, seed stream and checkpoints; when it finished before, it only reloads.

        shared: everything that decides its outcome, the functions that make it included. The stage is then kept in the store and
        serves every run with equal inputs; while another process works on it, this one waits, and takes over if that one dies.
        Use it as `with run.stage(…) as stage:`, whose end lets the others in.
        """
        settings = {k: getattr(self, k) for k in ("engine", "store", "accumulate", "save_seconds", "progress", "plots", "tensorboard")}
        if shared is None:
            return Run(self.folder / name, self.seed, parent=self, **settings)
        placed = (str(self.device.type), self.engine.precision, self.world, self.accumulate)
        stage = Run(self.store.entry(name, self.seed, placed, self._whole(shared)), self.seed, parent=self, wait=True, **settings)
        stage.path, stage._stream = f"{self.path}/{name}", name  # its random draws must not depend on which run came first
        stage._seed(stage._number("start"))
        return stage

    def cached(self, name: str, build: Callable[..., Mapping[str, torch.Tensor]], *inputs: Any) -> dict[str, torch.Tensor]:
        """`build(*inputs)` from the store (see `Store.cached`), on this run's device. It works on whole networks, by itself."""
        inputs = self._whole(inputs)
        with self.engine.main_first():
            tensors = self.store.cached(name, build, *inputs)
        return {k: v.to(self.device) for k, v in tensors.items()}

    def _whole(self, inputs: tuple) -> tuple:
        return tuple(self.unwrap(value) if isinstance(value, nn.Module) else value for value in inputs)

    def kept(self, name: str, build: Callable[[], Any]) -> Any:
        """What `build()` returns as JSON has it (texts, verdicts, traces), kept in the run's folder: a resumed run reads it.

        One process builds it, alone. UserError when the file is damaged.
        """
        file = self.folder / "kept" / f"{name}.json"
        with self.engine.main_first():
            if not file.exists():
                file.parent.mkdir(exist_ok=True)
                write_atomic(file, json.dumps(build()))
        try:
            return json.loads(file.read_text())
        except ValueError:
            raise UserError(f"{file} is damaged: delete it, and give the same command to make it anew.") from None

    # -- roles -------------------------------------------------------------------------------------------------------------------
    def trainable(self, name: str, net: Any, optimizer: BuildOptimizer) -> tuple[Any, torch.optim.Optimizer]:
        """Place a network (or bare parameters) and build its optimizer; both are saved and resumed under `name`.

        optimizer: an `Optimizer` config, or any function from parameters to a torch optimizer (then without schedule or clipping).
        """
        if name in self.roles or name in self._tracked:
            raise ValueError(f"this run already has something called {name!r}")
        net, built = self.engine.trainable(net, optimizer)
        self.roles[name] = Role(name, net, built, optimizer, engines.parameters(net))
        return net, built

    def frozen(self, net: nn.Module) -> nn.Module:
        """A network that only answers: placed, in eval mode, without gradients, never saved. ValueError if a role trains part of it."""
        self.roles.refuse_shared(net)
        return self.engine.frozen(net)

    def ema(self, name: str, net: nn.Module, decay: float) -> Ema:
        """A moving average of a trainable network, saved and resumed under `name`; call its `update()` after each step."""
        average = Ema(self.roles, net, decay)
        self.track(**{name: average})
        return average

    def track(self, **objects: Any) -> None:
        """Anything else that changes: a tensor (restored in place), or an object with `state_dict` and `load_state_dict`."""
        for name, value in objects.items():
            if name in self.roles or name in self._tracked:
                raise ValueError(f"this run already has something called {name!r}")
            if not isinstance(value, torch.Tensor) and not (hasattr(value, "state_dict") and hasattr(value, "load_state_dict")):
                raise TypeError(f"cannot track {name}: a {type(value).__name__} has no state_dict and load_state_dict")
        self._tracked |= objects

    # -- the loop ----------------------------------------------------------------------------------------------------------------
    def steps(self, total: int, name: str = "train") -> Iterator[int]:
        """Yield the steps that are left of 0..total-1 (each `accumulate` times); restore before the first, save by the clock and at
        the end.  Ctrl-C and SIGTERM finish the step, save, and raise Interrupted."""
        if name in self._loops:
            raise ValueError(f"a second loop called {name!r} would overwrite the first one's checkpoint: name it")
        self._loops.add(name)
        start, first = self._restore(name, total), self._number(name)
        stop = threading.Event()
        saved, stride = time.monotonic(), max(1, total // 200)
        collective = self.world > 1
        bar = progress_bar(self.path, name, start, total) if self.progress and not self.rank else None
        with Signals(stop):
            for step in range(start, total):
                self.finite.step = step
                self.log_now = step % stride == 0 or step + 1 == total
                self.roles.schedule(step, total)
                for chunk in range(self.accumulate):
                    self.roles.chunk = chunk
                    if collective:
                        # Gradients wait for the last chunk where a role is alone: what reaches another one must be dropped at once.
                        for role in self.roles.values():
                            self.engine.synchronise(role.net, self.last_chunk or len(self.roles) > 1)
                    self._seed(first + step * _STEP, chunk * _CHUNK + self.rank * _RANK)
                    yield step
                if bar is not None:
                    bar.update()
                if self.log_now:
                    self._log.write(name, step)
                due = time.monotonic() - saved > self.save_seconds
                if collective:  # clocks and signals differ between processes; saving is a joint act
                    if (step + 1) % 16 and step + 1 < total:
                        continue
                    either = torch.tensor([due, stop.is_set()], dtype=torch.float32, device=self.device)
                    due, stopped = (bool(x) for x in self.engine.sum(either))
                else:
                    stopped = stop.is_set()
                if due or stopped or step + 1 == total:
                    self.save(step + 1, name)
                    saved = time.monotonic()
                if stopped:
                    where = f"stopped after step {step + 1} of {total} ({name}); state saved in {self.folder}."
                    raise Interrupted(f"{where} Give the same command to continue.")
        if bar is not None:
            bar.close()
        self.roles.chunk = 0
        self._seed(self._number(name, "end"))  # what is drawn after the loop must not depend on whether the loop ran or was reloaded

    def update(self, optimizer: Any, loss: torch.Tensor | None = None, *, count: Any = None, **parts: torch.Tensor) -> torch.Tensor:
        """Backward, normalise, clip, check, step and clear, for the role (or tuple of roles) of `optimizer`.

        loss, parts: scalars, or vectors with one value per sample or token (averaged); their sum is minimised, and each is logged.
        count: the number of samples or tokens that the mean is over: of vectors with masked entries (by default all count), or of scalars
            that are means already (by default each weighs one).
        With several chunks or processes the gradient is the mean over the whole effective batch: each chunk weighs as much as its count.
        Only the given role learns: gradients that reach other roles are dropped.
        Returns the detached loss of this chunk. UserError naming step, role and part when it is not finite; nothing is saved then.
        """
        given = {"loss": loss, **parts} if loss is not None else parts
        learners = [self.roles.of(o) for o in (optimizer if isinstance(optimizer, tuple) else (optimizer,))]
        means, weight = averages(given, count)
        total = functools.reduce(torch.add, means.values())
        who = learners[0].name
        self.finite.check(who, total, means)
        if self.log_now:
            self._log.record |= {f"{who}/{part}": value.detach() for part, value in means.items()}
        self.roles.backward(learners, total, weight)
        if self.last_chunk:
            for role in learners:
                if (norm := self.roles.prepare(role)) is not None:
                    self.finite.check(role.name, norm, {"gradient norm": norm})
                    self.log(**{f"{role.name}/gradient norm": norm})
                role.optimizer.step()
                role.optimizer.zero_grad(set_to_none=True)
        return total.detach()

    def restart(self, optimizer: torch.optim.Optimizer, source: nn.Module) -> None:
        """Give the role of `optimizer` the weights of `source`, a network of this run and of the same form, and an optimizer without
        memory."""
        role = self.roles.of(optimizer)
        self.engine.load(role.net, None, self.engine.state(source, None))
        optimizer.state.clear()

    @property
    def last_chunk(self) -> bool:
        """Whether the step is whole after this chunk: what happens once a step waits for it."""
        return self.roles.last_chunk

    def shard(self, batch: B) -> B:
        """This process's and chunk's share of a global batch: a tensor, or a (named) tuple, list or dict of them, cut along dimension 0."""
        parts, own = self.world * self.accumulate, self.rank * self.accumulate + self.roles.chunk

        def share(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if len(value) % parts:
                cut = f"{self.world} processes times {self.accumulate} chunks"
                raise UserError(f"a batch of {len(value)} does not divide into {cut}.", code=2)
            value = value.tensor_split(parts)[own] if parts > 1 else value
            return value.to(self.device, non_blocking=True) if value.device != self.device else value

        return tree_map(share, batch)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """All processes' tensors in rank order, so that state kept per sample stays equal everywhere."""
        return self.engine.gather(tensor)

    def unwrap(self, net: Any) -> Any:
        """The plain network: without what DDP wraps around it, whole if FSDP2 sharded it (a copy then). For evaluation, attributes and
        saving; call the one that `trainable` returned to train. All processes call this together."""
        return self.engine.unwrap(net)

    def save(self, step: int, name: str = "train") -> None:
        """Write the loop's checkpoint atomically. UserError, and the old checkpoint stays, if a parameter is not finite."""
        self.finite.pending()
        self.finite.parameters(self.roles)
        facts = {"step": step, "log_size": 0 if self.rank else self._log.flush(sync=True), "seconds": self._clock.seconds()}
        checkpoint.save(self.folder / f"{name}.pt", self.engine, self.roles, self._tracked, **facts)

    def _restore(self, name: str, total: int) -> int:
        state = checkpoint.restore(self.folder / f"{name}.pt", self.engine, self.roles, self._tracked)
        if state is None:
            self._log.truncate()
            return 0
        if state["step"] < total:
            self._log.truncate(state["log_size"])
        else:
            self._log.size = state["log_size"]  # what a later loop wrote after this one is for that loop to judge
        self._clock.earlier = max(self._clock.earlier, state["seconds"])
        return state["step"]

    def _number(self, *place: Any) -> int:
        return int.from_bytes(hashlib.blake2b(repr((self.seed, self._stream, place)).encode(), digest_size=8).digest(), "little")

    def _seed(self, number: int, place: int = 0) -> None:
        self.common.manual_seed((number ^ _COMMON) & 0x7FFFFFFFFFFFFFFF)
        number = number + place & 0x7FFFFFFFFFFFFFFF
        torch.default_generator.manual_seed(number)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(number)

    # -- what people see ---------------------------------------------------------------------------------------------------------
    def log(self, **values: Any) -> None:
        """Numbers of this step for metrics.jsonl and the report's curves. About 200 evenly spaced steps of a loop are kept, those
        where `run.log_now`: what is worth a computation only to be logged waits for them."""
        if self.log_now:
            self._log.record |= values

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of this run so far, those of earlier, interrupted processes included."""
        return self._clock.seconds()

    def row(self, name: str, **metrics: float) -> None:
        """A line of the final table: teacher, student alone, student."""
        self.rows.append({"name": name, **metrics})

    def image(self, name: str, images: torch.Tensor, columns: int = 8) -> None:
        """A grid of images (N, C, H, W) in [0, 1] as samples/NAME.png."""
        self._sample(f"{name}.png", lambda: pictures.png(images, columns))

    def figure(self, name: str, draw: Callable[[Any], None]) -> None:
        """`draw(axes)` on matplotlib axes, kept as samples/NAME.svg in colours that follow the page's light or dark theme."""
        self._sample(f"{name}.svg", lambda: pictures.svg(draw))

    def html(self, name: str, fragment: str) -> None:
        """A self-contained HTML fragment (it may hold SVG, style and script) across the report's whole width, as samples/NAME.html."""
        self._sample(f"{name}.html", lambda: fragment)

    def _sample(self, name: str, content: Callable[[], Any]) -> None:
        if self.plots and not self.rank:
            (self.folder / "samples").mkdir(exist_ok=True)
            write_atomic(self.folder / "samples" / name, content())

    def save_student(self, net: N, save: Callable[[N, Path], None]) -> None:
        """`save(net, folder)` fills student/ with the plain network, at once or not at all (`saving.save_classifier`, or a function that
        calls `save_pretrained`)."""
        whole = self.unwrap(net)
        if not self.rank:
            try:
                with replacing(self.folder / "student") as fresh:
                    save(whole, fresh)
            except (OSError, SafetensorError) as error:
                raise UserError(f"could not save the student to {self.folder}: {error}. Free space, and give the same command.") from None
        self.engine.barrier()
