"""The one exception for a user's mistake: it says what was wrong, where, and what to do, and is shown without a traceback."""


class UserError(Exception):
    """Bad input, not a bug. The command line prints the message and exits with `code` (1: failed, 2: usage)."""

    def __init__(self, message: str, *, code: int = 1):
        super().__init__(message)
        self.code = code
