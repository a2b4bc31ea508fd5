"""Checks of a dataset for a model, in one pass over its rows, before the model is loaded and
anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from realign.data.problems import check_records
from realign.data.records import Problem, Record
from realign.errors import RefusedError
from realign.modeling.chat_template import Renderer
from realign.modeling.lengths import RowLengths
from realign.modeling.prefixes import Prefix, encode_prefixes
from realign.modeling.row_index import RowFacts, RowIndex
from realign.modeling.vocabulary import Vocabulary
from realign.runtime.progress import Progress, announce


def check_rows(
    records: Sequence[Record],
    processor: Any,
    *,
    cells: int,
    max_length: int | None,
    position_limit: int | None = None,
    vocabulary: Vocabulary | None = None,
    known: RowIndex | None = None,
) -> RowIndex:
    """Check every row's content, images, chat template, tokens and length. Return the facts of all
    rows.

    Args:
        records: The rows.
        processor: The model's processor.
        cells: Number of cells of a pair that will be used.
        max_length: Longest row in tokens, image tokens included; None for no limit.
        position_limit: Longest row that the model supports, in tokens; None if it is not known.
        vocabulary: The tokens that the model has; None if its configuration is not known.
        known: Facts of the same rows from an earlier check. If it was for the same number of cells,
            only the limits are checked again.
    Raises:
        RefusedError: Rows are bad; the message names them.

    Example::

        >>> from pathlib import Path
        >>> from realign import check_rows, load_processor, read_records
        >>> records = read_records(Path("pairs.parquet"), None)
        >>> facts = check_rows(records, load_processor(Path("model")), cells=3, max_length=2048)
        >>> [row.id for row in facts.rows]
        ['r0', 'r1']
    """
    if known is not None and known.cells == cells:
        announce(
            f"{len(records):,} rows were checked before and have not changed; not checked again"
        )
    else:
        known = _checked(records, processor, cells, vocabulary)
    limits = (
        ("max_length", max_length, "Raise max_length or remove them"),
        ("max_position_embeddings", position_limit, "Shorten or remove them"),
    )
    for name, limit, remedy in limits:
        if limit is not None and max(known.tokens) > limit:
            _refuse_long(known.rows, name, limit, remedy)
    return known


def _checked(
    records: Sequence[Record], processor: Any, cells: int, vocabulary: Vocabulary | None
) -> RowIndex:
    """Check everything except the limits; every row is read, hashed and decoded once."""
    lengths = RowLengths(processor, {}, cells, vocabulary)
    facts: list[RowFacts] = []
    refusals: list[RefusedError] = []

    def measure(record: Record, is_good: bool) -> list[Problem]:
        progress.advance()
        if not is_good or refusals:
            return []
        images, rejected_images = (
            tuple(image.size for image in record.open_images(rejected=rejected))
            for rejected in (False, True)
        )
        if found := [*lengths.problems(record, images, rejected_images)]:
            return found
        if not facts:  # once: a processor that alters texts alters those of every row
            try:
                check_processor(processor, record)
            except RefusedError as refusal:  # raised after the problems of the rows
                refusals.append(refusal)
                return []
        facts.append(RowFacts(record.id, record.key, images, rejected_images, lengths.rows[-1]))
        return []

    with Progress("check rows", len(records)) as progress:
        check_records(records, Renderer(processor).placeholders(), visit=measure)
    if refusals:
        raise refusals[0]
    return RowIndex(facts, cells, lengths.images)


def check_processor(processor: Any, record: Record) -> None:
    """Check that a processor changes a text only by inserting image tokens.

    Raises:
        RefusedError: It changes anything else.
    """
    renderer = Renderer(processor)
    rendered = renderer.render(record.prompt, record.chosen, len(record.images), record.where)
    prefix = Prefix(rendered.prompt, record.images)
    encoded = encode_prefixes(
        processor,
        {prefix: record.open_images},
        add_special_tokens=renderer.adds_special_tokens(prefix.text),
    )
    # compare the text after the last image, whose tokens are not known in general
    after = prefix.text.rpartition(getattr(processor, "image_token", "\0"))[2]
    found, expected = (
        "".join(processor.tokenizer.decode(ids, skip_special_tokens=True).split())
        for ids in (
            encoded.tokens[prefix]["input_ids"],
            processor.tokenizer(after, add_special_tokens=False).input_ids,
        )
    )
    if not found.endswith(expected):
        raise RefusedError(
            f"{record.where}: {type(processor).__name__} must leave the prompt as the chat "
            f"template writes it, got {found[-len(expected) :]!r} instead of {expected!r} (without "
            "spaces). Use another processor; only image tokens may be added."
        )


def _refuse_long(rows: Sequence[RowFacts], name: str, limit: int, remedy: str) -> None:
    too_long = [row for row in rows if row.tokens > limit]
    longest = max(too_long, key=lambda row: row.tokens)
    raise RefusedError(
        f"{len(too_long)} of {len(rows)} rows are longer than {name} = {limit} tokens: first "
        f"row {too_long[0].id}, longest row {longest.id} with {longest.tokens}. {remedy}; nothing "
        "is cut."
    )
