"""Everything that can be wrong with a dataset for a model, found before the model is loaded and
anything is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realign.data.records import Record, check_records, refuse_problems, sized_row
from realign.errors import RefusedError
from realign.modeling.chat_template import Renderer
from realign.modeling.collate import PreferenceCollator
from realign.modeling.identity import Identity, version_of
from realign.modeling.lengths import RowLengths
from realign.runtime.files import canonical_json, content_sha256, write_json
from realign.runtime.progress import Progress, announce
from realign.runtime.strict_json import read_json


@dataclass
class CheckedRows:
    """A file that knows the lengths of rows that were good, by what they were found good for.

    Args:
        path: The file.
        identity: Everything that the check depends on, as a hash.
        lengths: What was found, once the rows are known to be good.
    """

    path: Path
    identity: str
    lengths: RowLengths | None = None

    @classmethod
    def of(cls, path: Path, keys: Sequence[str], model: Identity) -> CheckedRows:
        """The file for rows, by their keys as they are read now, and the model that scores them,
        whose processor is part of it.
        """
        return cls(path, content_sha256(canonical_json(model), version_of("jinja2"), *keys))

    def restore(self, lengths: RowLengths) -> bool:
        """Put in the lengths of the same rows; False where there are none, or damaged ones."""
        try:
            stored = read_json(self.path)
            rows, images = stored["rows"], {int(key): n for key, n in stored["images"].items()}
        except (OSError, RefusedError, LookupError, TypeError, AttributeError, ValueError):
            return False
        if stored != self._content(rows, images):
            return False
        lengths.rows, lengths.images = rows, Counter(images)
        return True

    def keep(self) -> None:
        """Write the file, once the run has its folder."""
        if self.lengths is not None:
            write_json(self.path, self._content(self.lengths.rows, self.lengths.images))

    def _content(self, rows: list[int], images: dict[int, int]) -> dict[str, Any]:
        found = {"rows": rows, "images": {str(tokens): images[tokens] for tokens in sorted(images)}}
        return {**found, "sha256": content_sha256(self.identity, canonical_json(found))}


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
