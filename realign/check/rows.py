"""Everything that can be wrong with a dataset for a model, found before the model is loaded and
anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from realign.check.checked_rows import CheckedRows
from realign.check.decoding import sized_row
from realign.check.row_lengths import RowLengths
from realign.collate import PreferenceCollator
from realign.errors import RefusedError
from realign.progress import Progress, announce
from realign.records import Record, check_records, refuse_problems
from realign.rendering import Renderer
from realign_kernels import Objective


def check_rows(
    records: Sequence[Record],
    processor: Any,
    *,
    cells: int,
    max_length: int | None,
    position_limit: int | None = None,
    checked: CheckedRows | None = None,
) -> RowLengths:
    """Check every row's content, images, template and length, and return the lengths.

    Args:
        records: The rows.
        processor: The model's processor.
        cells: How many cells of a pair will be used.
        max_length: Longest row in tokens, image tokens included; None for any.
        position_limit: Longest row that the model was made for; None where that is not known.
        checked: Where it is kept that they were good, limits aside; is told the lengths.
    Raises:
        RefusedError: Naming the rows.
    """
    lengths = RowLengths(processor, {}, cells)
    if checked is not None and checked.restore(lengths):
        announce(f"{len(records):,} rows are those that were good before; not checked again")
    else:
        _measure(records, processor, lengths)
    limits = (
        ("max_length", max_length, "Raise max_length or remove them"),
        ("max_position_embeddings", position_limit, "Shorten or remove them"),
    )
    for name, limit, remedy in limits:
        if limit is not None and max(lengths.rows) > limit:
            _refuse_long(records, lengths.rows, name, limit, remedy)
    if checked is not None:
        checked.lengths = lengths
    return lengths


def _measure(records: Sequence[Record], processor: Any, lengths: RowLengths) -> None:
    """Check all but the limits, and put the lengths in."""
    check_records(records, Renderer(processor).placeholders())
    # one that alters texts alters every one
    PreferenceCollator(processor, lengths.cells).check_processor(records[0])
    problems: list[str] = []
    with Progress("check lengths", len(records)) as progress:
        for record in records:
            problems += [problem.message for problem in lengths.problems(sized_row(record))]
            progress.advance()
    refuse_problems(problems, len(records))


def announce_missing_images(without: int, num_rows: int, objective: Objective) -> None:
    """Say how many pairs have no image term; refuse an objective with one when none has it.

    Args:
        without: How many rows have no retrieved image.
        num_rows: How many rows there are.
        objective: What will be trained.
    Raises:
        RefusedError: No row has a retrieved image and the objective needs one.
    """
    if not without or objective.num_cells < 3:
        return
    if without == num_rows:
        raise RefusedError(
            f"data must have retrieved images for this objective, got none in {num_rows} rows. "
            "Fill rejected_images (retrieved_image in JSON), or pass --objective dpo."
        )
    announce(f"{without} of {num_rows} rows have no retrieved image; their image term is dropped")


def _refuse_long(
    records: Sequence[Record], lengths: Sequence[int], name: str, limit: int, remedy: str
) -> None:
    too_long = [index for index, length in enumerate(lengths) if length > limit]
    longest = max(too_long, key=lambda index: lengths[index])
    raise RefusedError(
        f"{len(too_long)} of {len(lengths)} rows are longer than {name} = {limit} tokens: first "
        f"row {records[too_long[0]].id}, longest row {records[longest].id} with "
        f"{lengths[longest]}. {remedy}; nothing is cut."
    )
