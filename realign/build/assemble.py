"""From outcomes to preference records with their provenance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from realign.build.row import SourceRow
from realign.records import Record


def assemble(
    rows: Sequence[SourceRow],
    outcomes: Iterable[Mapping[str, Any]],
    files: Mapping[str, Path],
    provenance: Mapping[str, Any],
) -> Iterator[Record]:
    """The records of the accepted outcomes, one by one, images read when they are asked for.

    Args:
        rows: The source's rows with answers.
        outcomes: One a row, see :class:`~realign.build.induction.Outcome`.
        files: Image name to file.
        provenance: ``encoder``, ``similarity``, ``generator`` and, where they were asked,
            ``annotator`` and ``masker``; ``source``, the source's file name.
    """
    for row, outcome in zip(rows, outcomes, strict=True):
        if not outcome["reason"]:
            yield Record(
                id=row.id,
                images=(row.path.read_bytes(),),
                prompt=row.prompt,
                chosen=row.answer,
                rejected=outcome["completion"],
                rejected_images=(files[outcome["image"]].read_bytes(),),
                meta=_meta(row, outcome, provenance),
            )


def _meta(
    row: SourceRow, outcome: Mapping[str, Any], provenance: Mapping[str, Any]
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
            **row.source,
            "image": row.image,
            "retrieved_image": outcome["image"],
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
