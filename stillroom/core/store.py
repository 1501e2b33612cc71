"""Results shared by runs (trained teachers, teacher signals, noise-image pairs), addressed by the content that made them.

An entry's folder is named by a fingerprint of everything that went into it, so that a changed config, builder or data set is
another entry and never a stale one.  One process builds an entry, others that want it wait; an entry appears at once or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import hashlib
import inspect
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from stillroom import __version__
from stillroom.core.errors import UserError


def folder_of_store(flag: str | Path | None = None) -> Path:
    """Where the store lives: the flag, else $STILLROOM_CACHE, else the platform's cache folder."""
    import platformdirs

    return Path(flag or os.environ.get("STILLROOM_CACHE") or platformdirs.user_cache_dir("stillroom"))


def fingerprint(*inputs: Any) -> str:
    """A hex digest of values by content: scalars, containers, dataclasses, tensors, modules (their state), functions (their module's
    source), and objects with a `fingerprint()` method. TypeError for anything else: what cannot be told apart must not be cached."""
    digest = hashlib.blake2b(digest_size=16)
    for piece in _pieces(inputs):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(value: Any) -> Iterator[Any]:
    yield type(value).__qualname__.encode() + b":"
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | Path | torch.dtype | torch.Size):
        yield repr(value).encode() + b";"
    elif isinstance(value, torch.Tensor):
        tensor = value.detach().to("cpu").contiguous()
        yield f"{tensor.dtype}{tuple(tensor.shape)}".encode()
        if tensor.numel():
            yield tensor.flatten().view(torch.uint8).numpy().data
    elif callable(getattr(value, "fingerprint", None)):
        yield value.fingerprint().encode()
    elif isinstance(value, nn.Module):
        yield repr(value).encode()
        yield from _pieces(dict(value.state_dict()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _pieces({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    elif isinstance(value, Mapping):
        yield from _pieces(sorted(((str(k), v) for k, v in value.items()), key=lambda item: item[0]))
    elif isinstance(value, list | tuple):
        yield str(len(value)).encode()
        for item in value:
            yield from _pieces(item)
    elif inspect.isfunction(value):
        yield value.__qualname__.encode() + _source(value).encode()
    else:
        raise TypeError(f"cannot fingerprint a {type(value).__name__}: pass plain values, tensors, modules, dataclasses or functions")


@functools.cache
def _source(function: Callable) -> str:
    """The whole module's source where there is one (helpers of a builder matter as much as the builder), else the function's."""
    with contextlib.suppress(OSError, TypeError):
        return Path(inspect.getsourcefile(function) or "").read_text()
    try:
        return inspect.getsource(function)  # of a notebook's cell
    except OSError as error:
        raise TypeError(f"cannot read the source of {function.__qualname__}, so its result cannot be cached") from error


TENSORS = "tensors.safetensors"


class Store:
    """A folder of entries `NAME-FINGERPRINT/`."""

    def __init__(self, folder: str | Path | None = None):
        self.folder = folder_of_store(folder)

    def entry(self, name: str, *inputs: Any) -> Path:
        """The folder of the entry that these inputs make (it may not exist yet)."""
        return self.folder / f"{name}-{fingerprint(name, __version__, torch.__version__, inputs)}"

    def cached(self, name: str, build: Callable[..., Mapping[str, torch.Tensor]], *inputs: Any) -> dict[str, torch.Tensor]:
        """`build(*inputs)` as a dict of tensors, computed once for equal inputs and equal source.

        `build` must not close over variables: what it reads has to be among the inputs, or the key would not see it change.
        Its random draws are seeded by the key, and leave the caller's generators as they were. What does not match its checksum is made
        anew, with a warning.
        """
        if inspect.getclosurevars(build).nonlocals:
            raise TypeError(f"{build.__qualname__} closes over {sorted(inspect.getclosurevars(build).nonlocals)}: pass them as inputs")
        folder = self.entry(name, build, *inputs)
        if (found := _intact(folder)) is None:
            with self.lock(folder):
                if (found := _intact(folder)) is None:
                    if folder.exists():
                        warnings.warn(f"the store's entry {folder} is damaged, and is made anew", stacklevel=2)
                    for leftover in self.leftovers(folder):
                        shutil.rmtree(leftover)
                    with _draws(folder.name[-15:]):
                        tensors = {k: v.detach().to("cpu").contiguous() for k, v in build(*inputs).items()}
                    try:
                        with replacing(folder) as fresh:
                            save_file(tensors, fresh / TENSORS)
                            entry = {"name": name, "kind": "tensors", "made": time.time(), "digest": _digest(fresh / TENSORS)}
                            (fresh / "entry.json").write_text(json.dumps(entry))
                    except (OSError, SafetensorError) as error:
                        raise UserError(
                            f"cannot write to the store {self.folder} ({error}): free space, or choose another --cache."
                        ) from None
                    found = load_file(folder / TENSORS)  # where they lie in memory can decide the last bit of what is made of them
        os.utime(folder)  # the time of last use, shown by `stillroom cache`
        return found

    def lock(self, folder: Path) -> Any:
        """An inter-process lock on an entry; the operating system frees it when its holder dies."""
        from filelock import FileLock

        folder.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(folder.with_name(folder.name + ".lock"))

    def leftovers(self, folder: Path) -> list[Path]:
        """Half-written folders of builders that were killed; only for who holds the entry's lock."""
        return list(self.folder.glob(f".{glob.escape(folder.name)}.*.tmp"))


def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "blake2b").hexdigest()


def _intact(folder: Path) -> dict[str, torch.Tensor] | None:
    """An entry's tensors; None when there are none, or other bytes than were written."""
    try:
        entry = json.loads((folder / "entry.json").read_text())
        return load_file(folder / TENSORS) if _digest(folder / TENSORS) == entry["digest"] else None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


@contextlib.contextmanager
def _draws(key: str) -> Iterator[None]:
    """Random draws inside depend on the hex `key` alone, and the generators are restored at the end."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = range(torch.accelerator.device_count()) if accelerator else ()
    with torch.random.fork_rng(devices, device_type=accelerator.type if accelerator else "cuda"):
        torch.manual_seed(int(key, 16))
        yield


class replacing:
    """`with replacing(path) as fresh:` fills `fresh`, a folder beside `path`, which takes its place only when the block ends well."""

    def __init__(self, path: Path):
        self.path, self.fresh = path, path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        shutil.rmtree(self.fresh, ignore_errors=True)
        self.fresh.mkdir(parents=True)
        return self.fresh

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if kind is not None:
            shutil.rmtree(self.fresh, ignore_errors=True)
            return
        shutil.rmtree(self.path, ignore_errors=True)
        os.replace(self.fresh, self.path)


def write_atomic(path: Path, content: bytes | str | Callable[[Any], None]) -> None:
    """Write a file so that readers, and a process killed at any instant, see the old content or the new one and nothing between."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(fresh, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
