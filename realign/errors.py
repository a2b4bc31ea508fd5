"""The one exception a user is meant to read."""

from __future__ import annotations


class RefusedError(ValueError):
    """Input or configuration refused before any work. The message names the place, the value and
    the remedy.

    The command line ends with exit code 2 and prints the message without a traceback.

    Attributes:
        code: Short name of the kind of problem, for programs; stable across releases.
        field: What of a row is wrong, where it is a row that is refused.
        missing: Name of the image file that does not exist, where that is why.
    """

    def __init__(
        self, message: str, *, code: str = "refused", field: str = "", missing: str = ""
    ) -> None:
        super().__init__(message)
        self.code, self.field, self.missing = code, field, missing
