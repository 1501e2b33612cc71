"""The state of a loop on disk: one file a loop, written atomically, the same under every engine, and checked when it is read."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stillroom.core.engine import Local
from stillroom.core.errors import UserError
from stillroom.core.roles import Roles
from stillroom.core.store import write_atomic


def save(file: Path, engine: Local, roles: Roles, tracked: Mapping[str, Any], **facts: Any) -> None:
    """Write roles, what is tracked and a few facts (step, seconds); all processes call it, one writes.

    UserError when there is no room; the previous checkpoint then stays.
    """
    state = {
        **facts,
        "roles": {role.name: engine.state(role.net, role.optimizer) for role in roles.values()},
        "tracked": {name: value if isinstance(value, torch.Tensor) else value.state_dict() for name, value in tracked.items()},
    }
    if not engine.rank:
        try:
            write_atomic(file, lambda out: torch.save(state, out))
        except (OSError, RuntimeError) as error:
            cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch hides why a write failed
            if not isinstance(cause, OSError):
                raise
            raise UserError(f"could not save to {file.parent}: {cause.strerror}. The previous checkpoint is intact.") from None
    engine.barrier()


def restore(file: Path, engine: Local, roles: Roles, tracked: Mapping[str, Any]) -> dict[str, Any] | None:
    """Put a saved state back in place; its facts, or None when there is none yet.

    UserError for a damaged file (torch writes a CRC beside every tensor, but does not look at it) and for another program's.
    """
    if not file.exists():
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            if (bad := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{bad} does not match its checksum")
        state = torch.load(file, map_location=engine.device, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, zipfile.BadZipFile, NotImplementedError, OSError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}). Start again: --overwrite, or another --out.") from None
    missing = set(state["roles"]) ^ set(roles) | set(state["tracked"]) ^ set(tracked)
    if missing:
        raise UserError(f"{file} was saved by another program: {sorted(missing)} do not match. Start again in a new --out folder.")
    for role in roles.values():
        engine.load(role.net, role.optimizer, state["roles"][role.name])
    for name, value in tracked.items():
        saved = state["tracked"][name]
        if isinstance(value, torch.Tensor):
            with torch.no_grad():
                value.copy_(saved)
        else:
            value.load_state_dict(saved)
    return state
