"""What a model's folder says about itself, checked before anything is built from it: JSON files, their fields, and where weights lie.

Folders are downloaded and edited by hand. Every message names the file, and the field if there is one.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.overrides import TorchFunctionMode

from stillroom.core.errors import UserError

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
INDEX = ".safetensors.index.json"
BYTES = 2**26
"""No JSON file is larger: the index of the largest models has 2^23."""
SIZES = {
    "hidden_size", "hidden_sizes", "embedding_size", "intermediate_size", "image_size", "patch_size", "num_channels", "vocab_size",
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "depths",
}  # fmt: skip
"""Fields of transformers configs that are sizes in every model that has them: whole numbers from 1, or lists of such."""
LAYERS, LARGEST = 2**12, 2**24
"""No model has more layers, nor a larger one of the `SIZES`."""


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. UserError for anything else, and for what is no regular file."""
    if not file.is_file():
        raise UserError(f"{file} is not a file.")
    if file.stat().st_size > BYTES:
        raise UserError(f"{file} has {file.stat().st_size} bytes, which no such file needs.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not readable JSON ({error}).") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds {reprlib.repr(found)}, where a JSON object was expected.")
    return found


@dataclass(frozen=True)
class Fields:
    """The fields of a JSON object, each taken by what it must be. UserError that names the file and the field."""

    file: Path | str
    values: Any
    inside: str = ""
    """The field of the file that holds these."""

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping):
            raise UserError(f"{self.file}: {self.inside or 'the content'} is {reprlib.repr(self.values)}, where an object was expected.")

    def wrong(self, field: str, wanted: str) -> UserError:
        path = f"{self.inside}.{field}" if self.inside else field
        if field not in self.values:
            return UserError(f"{self.file}: {path} is missing, where {wanted} was expected.")
        return UserError(f"{self.file}: {path} is {reprlib.repr(self.values[field])}, where {wanted} was expected.")

    def only(self, *fields: str) -> None:
        """UserError for a field of another name."""
        if others := sorted(map(str, set(self.values) - set(fields))):
            raise UserError(f"{self.file}: {self.inside or 'the content'} has an unknown field {reprlib.repr(others[0])}.")

    def text(self, field: str) -> str:
        value = self.values.get(field)
        if not isinstance(value, str):
            raise self.wrong(field, "a text")
        return value

    def flag(self, field: str, default: bool) -> bool:
        """True, false, or null or absent for the default."""
        value = self.values.get(field)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(field, "true or false")
        return default if value is None else value

    def whole(self, field: str, most: int) -> int:
        value = self.values.get(field)
        if not is_whole(value, most):
            raise self.wrong(field, f"a whole number from 1 to {most}")
        return value  # type: ignore[return-value]

    def choice(self, field: str, options: Sequence[str], default: str) -> str:
        """One of the options, or null or absent for the default."""
        value = self.values.get(field)
        if value is not None and value not in options:
            raise self.wrong(field, f"one of {', '.join(options)}")
        return default if value is None else value

    def texts(self, field: str) -> list[str]:
        """A list of texts, none of them empty and no two alike."""
        value = self.values.get(field)
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value) or len(set(value)) < len(value):
            raise self.wrong(field, "a list of texts, each once,")
        return value

    def numbers(self, field: str, count: int, positive: bool = False) -> tuple[float, ...]:
        """`count` finite numbers."""
        value = self.values.get(field)
        if not isinstance(value, list | tuple) or len(value) != count or not all(is_number(v, positive) for v in value):
            raise self.wrong(field, f"a list of {count} {'positive ' if positive else ''}numbers")
        return tuple(map(float, value))


def is_whole(value: Any, most: int = LARGEST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def is_number(value: Any, positive: bool = False) -> bool:
    """A finite number that float32 holds; a positive one can be divided by."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return (1e-30 if positive else -1e30) <= value <= 1e30


def check_config(values: Mapping[str, Any], file: Path | str) -> None:
    """UserError for what no transformers config may say: sizes that are none, numbers beyond any model's, label names that are no object.

    What a model wants of its own fields is checked by transformers when it is loaded.
    """
    fields = Fields(file, values)
    for field in ("id2label", "label2id"):
        if not isinstance(values.get(field), Mapping | None):
            raise fields.wrong(field, "an object")
    if not all(str(number).isdecimal() and isinstance(label, str) for number, label in (values.get("id2label") or {}).items()):
        raise fields.wrong("id2label", "an object of names by number")
    if "num_labels" in values:
        fields.whole("num_labels", LARGEST)
    weights = values.get("transformers_weights")
    if weights is not None and not (isinstance(weights, str) and "/" not in weights and weights.endswith((".safetensors", INDEX))):
        raise fields.wrong("transformers_weights", "the name of a .safetensors file in the same folder")
    for field in fields.values:
        if field.endswith("_implementation") and "/" in str(values[field]):  # a repository, whose code would be run
            raise fields.wrong(field, "the name of an implementation in transformers")
    _check_sizes(fields)


def _check_sizes(fields: Fields) -> None:
    for field, value in fields.values.items():
        most = LAYERS if "layers" in field or field in ("n_layer", "depths") else LARGEST if field in SIZES else 2**53
        if isinstance(value, Mapping):
            _check_sizes(Fields(fields.file, value, f"{fields.inside}.{field}" if fields.inside else field))
        for number in _leaves(value):
            if field in SIZES and not is_whole(number, most):
                raise fields.wrong(field, f"a whole number from 1 to {most}, or a list of such,")
            if isinstance(number, int) and abs(number) > most:
                raise fields.wrong(field, f"a number up to {most}")


def _leaves(value: Any) -> Iterator[Any]:
    """What lists hold, however nested, and what is neither list, object nor null."""
    if isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    elif value is not None and not isinstance(value, Mapping):
        yield value


def only_files(folder: Path) -> list[str]:
    """Names of the files in a folder, sorted. UserError for what is neither file nor folder: a pipe lets its reader wait for ever."""
    if others := sorted(path for path in folder.iterdir() if not path.is_file() and not path.is_dir()):
        raise UserError(f"{others[0]} is neither a file nor a folder (a pipe, or a link to nothing): delete it, or copy the folder again.")
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def only_safetensors(folder: Path, *, needed: bool = True) -> None:
    """UserError unless the folder holds weights as safetensors (or none at all, if none are `needed`), and its indices name nothing but
    such files in the folder itself.

    Pickles can run code when they are opened, and a name with a path leads out of the folder.
    """
    files = only_files(folder)
    if not any(name.endswith(".safetensors") for name in files):
        if pickles := [name for name in files if Path(name).suffix in PICKLES]:
            raise UserError(
                f"{folder}: {pickles[0]} is a pickle, which can run code when it is opened, and was not opened. If you trust its source, "
                "convert it once: load it in Python and save it with save_pretrained or safetensors.torch.save_file."
            )
        if needed:
            raise UserError(f"{folder}: no weights were found (*.safetensors).")
    for index in (folder / name for name in files if name.endswith(INDEX)):
        fields = Fields(index, read_object(index).get("weight_map"), "weight_map")
        for field, name in fields.values.items():
            if not isinstance(name, str) or not name.endswith(".safetensors") or name not in files:
                raise fields.wrong(field, "the name of a .safetensors file in the same folder")


def fill(net: nn.Module, file: Path, tied: Mapping[str, str] = MappingProxyType({})) -> None:
    """Put the tensors of a safetensors file into a net, all of them. UserError if it is damaged, or another net's.

    tied: names that the file leaves out, each with the name whose tensor it shares.
    """
    if not file.is_file():
        raise UserError(f"{file} is not a file.")
    try:
        state = load_file(file)
        net.load_state_dict(state | {name: state[source] for name, source in tied.items()})
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{file} could not be read ({error}). It may be damaged, or another network's: copy it again.") from error


@contextmanager
def loading(what: Path | str) -> Iterator[None]:
    """Whatever goes wrong inside as a UserError that names `what`. For calls of other libraries, which read files that can be wrong in
    more ways than they have exceptions for."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} could not be loaded ({type(error).__name__}: {error}).") from error


def room_for(folder: Path) -> int:
    """More parameters than a folder's weights can be: two a byte, and as many again as a missing head may have."""
    return 2 * sum(file.stat().st_size for file in folder.glob("*.safetensors")) + LARGEST


def check_parameters(make: Callable[[], nn.Module], most: int, what: Path | str) -> None:
    """UserError if the network that `make` makes has more than `most` parameters, found out without their memory and without draws."""
    with torch.device("meta"), _Unfilled():
        count = sum(parameter.numel() for parameter in make().parameters())
    if count > most:
        raise UserError(f"{what} describes a network of {count:.1e} parameters, where at most {most:.1e} are taken.")


class _Unfilled(TorchFunctionMode):
    """Leaves tensors as they were made: what would draw their initial values returns at once."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__"):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))
