"""A pipeline's folder, checked before diffusers opens anything of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillroom.core.errors import UserError
from stillroom.nets.checked import Fields, check_config, only_files, only_safetensors, read_object
from stillroom.nets.pretrained import ADAPTER

FILE = "model_index.json"
LIBRARIES = {"diffusers", "transformers"}
STEPS = 2**20
"""No scheduler has more."""


def parts_of(folder: Path, modules: Any) -> dict[str, tuple[str | None, str]]:
    """Library and class of each part of a pipeline by its name; the library is None for a part that was saved as None.

    modules: `diffusers.pipelines`, whose modules may hold parts (safety checkers). UserError, naming the file, for parts of other
    libraries, which would be imported, parts without a folder of their own, pickles, indices that lead out of their folder, adapters,
    which would be followed to whatever base they name, pipes, and sizes that no part has.
    """
    fields = Fields(folder / FILE, read_object(folder / FILE))
    fields.text("_class_name")
    only_files(folder)
    found: dict[str, tuple[str | None, str]] = {}
    for name, value in fields.values.items():
        if not isinstance(value, list):
            continue
        if value == [None, None]:
            found[name] = (None, "")
            continue
        if len(value) != 2 or not all(isinstance(part, str) and part for part in value) or "/" in name or value[1].endswith("Pipeline"):
            raise fields.wrong(name, "[library, class] of a part")
        if value[0] not in LIBRARIES and not hasattr(modules, value[0]):
            raise fields.wrong(name, "a part from diffusers or transformers")
        if not (folder / name).is_dir():
            raise UserError(f"{folder / name} is not a folder, and {folder / FILE} says that a part lies there: copy the pipeline again.")
        _check_part(folder / name)
        found[name] = (value[0], value[1])
    return found


def _check_part(folder: Path) -> None:
    only_safetensors(folder, needed=False)
    if (folder / ADAPTER).exists():
        raise UserError(f"{folder / ADAPTER}: a part of a pipeline cannot be an adapter here: merge it into its base and save that.")
    for file in sorted(folder.glob("*.json")):
        values = read_object(file)
        if file.name in ("config.json", "scheduler_config.json"):
            check_config(values, file)
        if values.get("num_train_timesteps") is not None:
            Fields(file, values).whole("num_train_timesteps", STEPS)
