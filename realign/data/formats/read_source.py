"""Reading of sources: the kind of file and the layout are recognised, every row is checked, and bad
ones are reported together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from realign.data.formats.json_rows import Found, is_json_list, read_lines, read_list
from realign.data.formats.layout import RefusedRowError, Turns, lone_image_pair
from realign.data.formats.layouts import FORMATS, recognise
from realign.data.formats.row_reader import ImageFiles, RowReader, object_of, one_image
from realign.data.formats.source_row import SourceRow
from realign.data.formats.table_rows import parquet_files, read_parquet_files, read_saved
from realign.data.image_names import check_image_root
from realign.data.problems import refuse_problems
from realign.data.records import Problem
from realign.errors import RefusedError
from realign.runtime.files import canonical_json
from realign.runtime.progress import announce

LOOKED_AT = 100  # number of first rows that are searched for one with a known layout


@dataclass(frozen=True)
class Source:
    """Rows and problems of a source.

    Attributes:
        rows: The good rows; those without an answer are still to be annotated.
        problems: The problem of each row that was refused.
        format: Name of the layout.
        num_read: Number of rows of the file, good and bad.
    """

    rows: list[SourceRow]
    problems: list[Problem]
    format: str
    num_read: int


def read_source(
    path: Path,
    image_root: Path | None,
    *,
    special: Iterable[str] = (),
    turns: Turns = "first",
    extract_to: Path | None = None,
    format: str | None = None,
    image_name: str = "{name}",
    extracts: bool = True,
) -> Source:
    """Read a source: JSON lines, a JSON list, parquet, a folder of parquet, or a saved dataset.

    Image files must exist, but are not opened.

    Args:
        path: The file or folder.
        image_root: Folder of the images; None if all are embedded.
        special: The model's special tokens; no text may contain one.
        turns: Answers of a LLaVA conversation that become rows: the ``first``, the ``last`` with
            the earlier turns as its prompt, or ``each`` with its earlier turns.
        extract_to: Folder for embedded images, named by their content; existing files are not
            written again.
        format: Name of the layout; by default it is recognised from the first rows.
        image_name: File name of the image that a row calls ``{name}``.
        extracts: Whether to write embedded images; :func:`extract_images` can write those of some
            rows later.
    Raises:
        RefusedError: The file does not exist, has an unknown layout or no rows, or its rows cannot
            be separated.
    """
    if turns not in ("first", "last", "each"):
        raise RefusedError(f"turns must be first, last or each, got {turns!r}. Correct it.")
    if image_root is not None:
        check_image_root(image_root)
    found = iter(open_rows(path))
    first = list(islice(found, LOOKED_AT))
    if not first:
        raise RefusedError(f"source must have at least one row, got none in {path}. Add rows.")
    if format is None and not any(isinstance(item.row, dict) for item in first):
        _refuse_rows(path, first)
    layout = recognise((item.row for item in first), format, path.name)
    announce(f"source {path.name}: read as {layout.name} ({layout.summary})")
    reader = RowReader(
        path,
        layout,
        image_root,
        special=special,
        turns=turns,
        extract_to=extract_to,
        image_name=image_name,
        extracts=extracts,
    )
    rows: list[SourceRow] = []
    problems: list[Problem] = []
    num_read = 0
    for item in chain(first, found):
        num_read += 1
        try:
            rows += reader.read(item)
        except RefusedRowError as error:
            problems.append(_problem(path, item, error))
    rows, alone = _without_image_pairs(rows)
    problems += [Problem.of(lone_image_pair().at(row.place), row.id, row.place) for row in alone]
    if reader.num_retrieved:
        announce(
            f"source {path.name}: retrieved images of the source are not used "
            f"({reader.num_retrieved} rows have some); new ones are retrieved"
        )
    if reader.left_out:
        announce(
            f"source {path.name}: not kept, because JSON cannot hold them: "
            f"{', '.join(sorted(reader.left_out))}"
        )
    return Source(rows, problems, layout.name, num_read)


def extract_images(path: Path, rows: Sequence[SourceRow], folder: Path) -> None:
    """Write the embedded images of some rows of a source, if they have any.

    Args:
        path: The file or folder.
        rows: Rows from :func:`read_source`, which did not write their images.
        folder: Folder of the images, whose names the rows have.
    """
    files = ImageFiles(None, folder)
    # equal images have the same name, so one row for each is enough
    first = {row.path.name: row for row in reversed(rows) if row.path.parent == folder}
    wanted = {row.source["index"] + 1: FORMATS[row.source["format"]] for row in first.values()}
    for item in open_rows(path) if wanted else ():
        if layout := wanted.get(item.number):
            files.find(one_image(object_of(item), layout))


def _refuse_rows(path: Path, found: list[Found]) -> None:
    """Refuse a file whose first rows are not objects, naming the reason of each."""
    problems = []
    for item in found:
        try:
            object_of(item)
        except RefusedRowError as error:
            problems.append(_problem(path, item, error))
    refuse_problems(problems, len(found))


def _without_image_pairs(rows: list[SourceRow]) -> tuple[list[SourceRow], list[SourceRow]]:
    """Return the rows that are not image pairs, and the image pairs without an answer pair.

    An image pair with an answer pair is left out: it is the second half of the same pair.
    """
    whole = [row for row in rows if not row.is_image_pair]
    halves = {_half(row) for row in whole if row.rejected}
    return whole, [row for row in rows if row.is_image_pair and _half(row) not in halves]


def _half(row: SourceRow) -> tuple[Path, str, str]:
    """Return the values that an answer pair and its image pair have in common."""
    return row.path, canonical_json(list(row.prompt)), row.answer


def open_rows(path: Path) -> Iterator[Found]:
    """Return the rows of a file or folder, whose kind is recognised from its first bytes.

    Raises:
        RefusedError: The path does not exist, or its rows cannot be separated.
    """
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return read_saved(path)
        return read_parquet_files(parquet_files(path))
    if not path.is_file():
        raise RefusedError(
            f"source must be a file or folder, got {path}, which does not exist. Check --source."
        )
    with path.open("rb") as file:
        if file.read(4) == b"PAR1":
            return read_parquet_files([path])
    return read_list(path) if is_json_list(path) else read_lines(path)


def _problem(path: Path, item: Found, error: RefusedRowError) -> Problem:
    place = item.place(path.name)
    row_id = item.row.get("id") if isinstance(item.row, dict) else None
    row = str(row_id) if isinstance(row_id, str | int) else str(item.number)
    # half a surrogate pair in a key or an id must not keep the report from being written
    row, field = (text.encode(errors="backslashreplace").decode() for text in (row, error.field))
    return Problem(row, place, field, error.code, f"{place}: {error}", error.missing)
