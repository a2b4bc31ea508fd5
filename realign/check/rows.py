"""Everything that can be wrong with a dataset for a model, found before the model is loaded and
anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from realign.collate import PreferenceCollator
from realign.errors import RefusedError
from realign.progress import Progress, announce
from realign.records import Record, check_records
from realign.rendering import Renderer
from realign_kernels import Objective


def check_rows(
    records: Sequence[Record], processor: Any, *, cells: int, max_length: int | None
) -> None:
    """Check every row's content, images, template and length.

    Args:
        records: The rows.
        processor: The model's processor.
        cells: How many cells of a pair will be used.
        max_length: Longest row in tokens, image tokens included; None for any.
    Raises:
        RefusedError: Naming the rows.
    """
    renderer = Renderer(processor)
    check_records(records, renderer.placeholders())
    collator = PreferenceCollator(processor, cells)
    collator.check_processor(records[0])  # one that alters texts alters every one
    if max_length is not None:
        _check_lengths(records, collator, max_length)
        return
    for record in records:
        for answer in (record.chosen, record.rejected):
            renderer.render(record.prompt, answer, len(record.images), record.where)


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


def _check_lengths(
    records: Sequence[Record], collator: PreferenceCollator, max_length: int
) -> None:
    """Measure as training does: only the processor knows how many tokens an image becomes."""
    too_long: dict[str, int] = {}
    with Progress("check lengths", len(records)) as progress:
        for record in records:
            (length,) = collator.lengths([record])
            if length > max_length:
                too_long[record.id] = length
            progress.advance()
    if too_long:
        longest = max(too_long, key=lambda row: too_long[row])
        raise RefusedError(
            f"{len(too_long)} of {len(records)} rows are longer than max_length = {max_length} "
            f"tokens: first row {next(iter(too_long))}, longest row {longest} with "
            f"{too_long[longest]}. Raise max_length or remove them; nothing is cut."
        )
