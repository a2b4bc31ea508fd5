"""The exception that users read."""

from __future__ import annotations


class RefusedError(ValueError):
    """Refusal of input or configuration, which names the place, the value and the remedy.

    The command line ends with exit code 2 and prints the message without a traceback.

    Attributes:
        code: Short name of the kind of problem, for programs; stable across releases.
        field: Field of a row that is wrong, if a row is refused.
        missing: Name of the missing image file, if a row is refused because of one.
    """

    def __init__(
        self, message: str, *, code: str = "refused", field: str = "", missing: str = ""
    ) -> None:
        super().__init__(message)
        self.code, self.field, self.missing = code, field, missing
