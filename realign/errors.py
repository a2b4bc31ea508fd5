"""The one exception a user is meant to read."""

from __future__ import annotations


class RefusedError(ValueError):
    """Input or configuration refused before any work. The message names the place, the value and
    the remedy.

    The command line ends with exit code 2 and prints the message without a traceback.

    Attributes:
        code: Short name of the kind of problem, for programs; stable across releases.
        field: What of a row is wrong, where it is a row that is refused.
    """

    def __init__(self, message: str, *, code: str = "refused", field: str = "") -> None:
        super().__init__(message)
        self.code, self.field = code, field
