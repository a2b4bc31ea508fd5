"""Problems of a dataset's rows, grouped by kind, counted, and refused together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from realign.data.images import RefusedImage
from realign.data.records import (
    OpenedRecord,
    Problem,
    Record,
    content_problems,
    image_problem,
    special_tokens,
)
from realign.errors import RefusedError

SHOWN = 5  # problems of one kind that a message shows


def check_records(
    records: Sequence[Record],
    placeholders: Iterable[str],
    *,
    visit: Callable[[Record, bool], Iterable[Problem]] = lambda record, is_good: (),
) -> None:
    """Refuse rows with empty, wrong or unreadable content before anything is loaded.

    Args:
        records: The rows.
        placeholders: Image and other special tokens of the model, which no text may contain.
        visit: Function that is called with every row, its images decoded, and whether it is good so
            far; returns further problems of the row.
    Raises:
        RefusedError: Rows are bad; the message has one line for each of the first rows of each
            kind, with id, value and remedy.
    """
    special = special_tokens(placeholders)
    problems: list[Problem] = []
    for record in map(OpenedRecord.of, records):
        found = (*content_problems(record, special), *_image_problems(record))
        problems += found
        problems += visit(record, not found)
    refuse_problems(problems, len(records))
    if not records:
        raise RefusedError(
            "data must have at least one row, got none. Add rows, or name another dataset."
        )


def _image_problems(record: Record) -> Iterator[Problem]:
    for rejected in (False, True):
        try:
            record.open_images(rejected=rejected)
        except RefusedImage as error:
            yield image_problem(record, error, rejected=rejected)


def refuse_problems(problems: Sequence[Problem], num_rows: int, remedy: str = "") -> None:
    """Refuse a dataset with problems: all are counted, and the first of each kind are shown.

    Args:
        problems: The problems.
        num_rows: Number of rows that were read, good and bad.
        remedy: A sentence with a remedy for all of them, or an empty text.
    Raises:
        RefusedError: There is a problem.
    """
    if problems:
        last = f"\n{remedy}" if remedy else ""
        raise RefusedError(
            f"{len(problems)} problem(s) in {num_rows} rows:\n{shown_problems(problems)}{last}"
        )


def by_kind(problems: Iterable[Problem]) -> list[list[Problem]]:
    """Return problems grouped by code and field, the most frequent kind first."""
    kinds: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        kinds.setdefault((problem.code, problem.field), []).append(problem)
    return sorted(kinds.values(), key=lambda kind: -len(kind))


def shown_problems(problems: Sequence[Problem], show: int = SHOWN) -> str:
    """Return problems as lines: the first ones of each kind, and the number of further ones."""
    lines = []
    for kind in by_kind(problems):
        lines += [problem.message for problem in kind[:show]]
        if len(kind) > show:
            of = f"{kind[0].code} in {kind[0].field}" if kind[0].field else kind[0].code
            lines.append(f"... and {len(kind) - show:,} more ({of})")
    return "\n".join(lines)
