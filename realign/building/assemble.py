"""Preference records from outcomes, with their provenance, and counts of rows by outcome."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

from realign.building.corpus import Corpus
from realign.data.formats.source_row import SourceRow
from realign.data.images import read_image
from realign.data.records import Record
from realign.errors import RefusedError


def assemble(
    rows: Sequence[SourceRow],
    outcomes: Iterable[Mapping[str, Any]],
    corpus: Corpus,
    provenance: Mapping[str, Any],
) -> Iterator[Record]:
    """Yield the records of the accepted outcomes, whose images are read one by one.

    Args:
        rows: The source's rows with answers.
        outcomes: One outcome per row, see :class:`~realign.building.induction.Outcome`.
        corpus: The source's images.
        provenance: ``encoder``, ``similarity``, ``generator``, ``source`` (the source's file name)
            and, if they were asked, ``annotator`` and ``masker``.
    Raises:
        RefusedError: An image file has changed since it was inspected.
    """
    places = {name: place for place, name in enumerate(corpus.names)}
    for row, outcome in zip(rows, outcomes, strict=True):
        if not outcome["reason"]:
            retrieved = places[outcome["image"]]
            yield Record(
                id=row.id,
                images=(_read(corpus, corpus.position[row.path]),),
                prompt=row.prompt,
                chosen=row.answer,
                rejected=outcome["completion"],
                rejected_images=(_read(corpus, retrieved),),
                meta=_meta(row, outcome, corpus.own_names[retrieved], provenance),
            )


def _read(corpus: Corpus, place: int) -> bytes:
    path = corpus.paths[place]
    raw = read_image(path, path.name)
    if sha256(raw).hexdigest() != corpus.facts[place].sha256:
        raise RefusedError(
            f"{path.name} must not change during a build, and its content has changed. Restore it, "
            "or build into another folder."
        )
    return raw


def _meta(
    row: SourceRow, outcome: Mapping[str, Any], retrieved: str, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "retrieval": {
            "rank": outcome["rank"],
            "cosine": outcome["cosine"],
            "encoder": provenance["encoder"],
        },
        "similarity": {"model": provenance["similarity"], "value": outcome["similarity"]},
        "source": {
            "file": provenance["source"],
            "image": row.image,
            **row.source,
            "retrieved_image": retrieved,
        },
    }
    if not row.rejected:
        meta |= {
            "masked": outcome["masked"],
            "masked_by": outcome["masked_by"],
            "attempts": len(outcome["refused"]) + 1,
            "generator": provenance["generator"],
        }
        if outcome["masked_by"].startswith("model"):
            meta["masker"] = provenance["masker"]
    if row.is_annotated:
        meta["annotator"] = provenance["annotator"]
    return meta


def funnel(
    outcomes: Iterable[Mapping[str, Any]],
    *,
    rejected: Mapping[str, int],
    unsampled: int,
    annotated: int,
    excluded: Mapping[str, int],
) -> dict[str, Any]:
    """Return the counts of ``funnel.json``.

    Args:
        outcomes: One outcome per row, see :class:`~realign.building.induction.Outcome`; read once.
        rejected: Number of bad rows of the source by code; they are not among ``outcomes``.
        unsampled: Number of good rows that are not in the sample; they are not among ``outcomes``.
        annotated: Number of rows whose answer was generated.
        excluded: Number of neighbours that were excluded as candidates, by reason.
    """
    rows = 0
    masked_by: Counter[str] = Counter()
    ranks: Counter[int] = Counter()
    dropped: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for outcome in outcomes:
        rows += 1
        masked_by[outcome["masked_by"]] += bool(outcome["masked"])
        if outcome["reason"]:
            dropped[outcome["reason"]] += 1
        else:
            ranks[outcome["rank"]] += 1
        refused.update(attempt["reason"] for attempt in outcome["refused"])
    return {
        "rows": rows,
        "rejected": _most_first(Counter(rejected)),
        "unsampled": unsampled,
        "annotated": annotated,
        "masked_by": _most_first(masked_by),
        "excluded_neighbours": dict(excluded),
        "accepted": ranks.total(),
        "accepted_by_rank": {str(rank): count for rank, count in sorted(ranks.items())},
        "dropped": _most_first(dropped),
        "refused_candidates": _most_first(refused),
    }


def _most_first(counts: Counter[str]) -> dict[str, int]:
    """Return the counts above zero, the most frequent first."""
    return {
        reason: count
        for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if count
    }
