"""What is wrong with one row of a dataset, in a form that people and programs can read."""

from __future__ import annotations

from dataclasses import dataclass

from realign.errors import RefusedError


@dataclass(frozen=True)
class Problem:
    """One reason to refuse one row.

    Attributes:
        row: The row's id, or its number from 1 where it has none.
        place: File and line or row, as messages name it.
        field: What of the row is wrong: ``image``, ``chosen``, ...; empty for the whole row.
        code: Short name of the kind of problem, such as ``empty``; stable across releases.
        message: Place, value and remedy, as a sentence for people.
    """

    row: str
    place: str
    field: str
    code: str
    message: str

    @classmethod
    def of(cls, error: RefusedError, row: str, place: str) -> Problem:
        """The problem that a refusal of a row names."""
        return cls(row, place, error.field, error.code, str(error))
