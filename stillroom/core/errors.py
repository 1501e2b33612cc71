"""The one exception for a user's mistake: it says what was wrong, where, and what to do, and is shown without a traceback."""

import importlib
from typing import Any


class UserError(Exception):
    """Bad input, not a bug. The command line prints the message and exits with `code` (1: failed, 2: usage)."""

    def __init__(self, message: str, *, code: int = 1):
        super().__init__(message)
        self.code = code


def needs(module: str, extra: str, what: str = "This") -> Any:
    """The imported module, or a UserError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{what} needs the package {module.split('.')[0]!r}: pip install 'stillroom[{extra}]'") from error
