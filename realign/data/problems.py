"""Problems of a dataset's rows as people read them: by kind, counted, and refused together."""

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
    """Refuse rows that would train on nothing or on wrong inputs, before anything is loaded.

    Args:
        records: The rows.
        placeholders: Image and other special tokens of the model; an answer must contain none.
        visit: Called with every row, its images decoded, and whether it is good so far; returns its
            further problems.
    Raises:
        RefusedError: The first bad rows of each kind, one a line, with id, value and remedy.
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
            "data must have at least one row, got none. Add rows or give another --data."
        )


def _image_problems(record: Record) -> Iterator[Problem]:
    for rejected in (False, True):
        try:
            record.open_images(rejected=rejected)
        except RefusedImage as error:
            yield image_problem(record, error, rejected=rejected)


def refuse_problems(problems: Sequence[Problem], num_rows: int, remedy: str = "") -> None:
    """Refuse the problems of a dataset, if any: all are counted, the first of each kind shown.

    Args:
        problems: The problems.
        num_rows: Number of rows that were read, good and bad.
        remedy: A sentence on what helps all of them.
    Raises:
        RefusedError: There is a problem.
    """
    if problems:
        last = f"\n{remedy}" if remedy else ""
        raise RefusedError(
            f"{len(problems)} problem(s) in {num_rows} rows:\n{shown_problems(problems)}{last}"
        )


def by_kind(problems: Iterable[Problem]) -> list[list[Problem]]:
    """Return problems by their kind, which differ in the row and the value alone; the most frequent
    kind first.
    """
    kinds: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        kinds.setdefault((problem.code, problem.field), []).append(problem)
    return sorted(kinds.values(), key=lambda kind: -len(kind))


def shown_problems(problems: Sequence[Problem], show: int = SHOWN) -> str:
    """Return problems as lines: the first of each kind, and how many more of it there are."""
    lines = []
    for kind in by_kind(problems):
        lines += [problem.message for problem in kind[:show]]
        if len(kind) > show:
            of = f"{kind[0].code} in {kind[0].field}" if kind[0].field else kind[0].code
            lines.append(f"... and {len(kind) - show:,} more ({of})")
    return "\n".join(lines)
