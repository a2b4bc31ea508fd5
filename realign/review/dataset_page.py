"""The page of a dataset: where its rows went, how they are distributed, and a gallery of pairs."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from markupsafe import Markup

from realign.data.build_folder import (
    Counts,
    candidate_lines,
    read_funnel,
    read_outcomes,
    row_lines,
    taken_rows,
    tried_before,
)
from realign.data.dataset import dataset_title, read_records
from realign.data.decisions import Decision, RowKey, decided_rows, decisions_path, read_decisions
from realign.data.records import texts_of
from realign.data.unrelated_answers import induced_answers, induced_similarities, unrelated_answers
from realign.errors import RefusedError
from realign.review.page import Tile, shown_pair, spread, tile, write_page
from realign.review.pair_view import PairFacts
from realign.review.plots import compared_histogram, histogram, rank_plot
from realign.runtime.strict_json import read_json

EXAMPLES = 4  # for each reason
MAX_PAIRS = 300  # about 6 MB of photographs


@dataclass(frozen=True)
class Example:
    """One refused completion."""

    row: str
    masked: str
    completion: str


@dataclass
class Refused:
    """All refused candidates of a build folder.

    Attributes:
        similarities: Similarities of completions to the given answers, where the shards hold them.
        cosines: Cosines of retrieved to original images, where the shards hold them.
        examples: Reason to its first few completions, each from a different row.
    """

    similarities: array[float] = field(default_factory=lambda: array("d"))
    cosines: array[float] = field(default_factory=lambda: array("d"))
    examples: dict[str, list[Example]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def read(cls, folder: Path) -> Refused:
        """Read the shards of a build folder, one line at a time."""
        refused = cls()
        for outcome in read_outcomes(folder):
            for attempt in outcome["refused"]:
                refused._add(outcome, attempt)
        return refused

    def _add(self, outcome: dict[str, Any], attempt: dict[str, Any]) -> None:
        for name, values in (("similarity", self.similarities), ("cosine", self.cosines)):
            value = attempt.get(name)
            # a candidate without a completion was not compared
            if isinstance(value, int | float) and isfinite(value) and attempt.get("completion"):
                values.append(value)
        examples = self.examples[attempt["reason"]]
        is_new = not examples or examples[-1].row != outcome["id"]
        if len(examples) < EXAMPLES and is_new and attempt.get("completion"):
            examples.append(Example(outcome["id"], outcome["masked"], attempt["completion"]))


def dataset_page(data: Path, out: Path, images: Path | None = None) -> Path:
    """Write the page and return its path.

    Args:
        data: Build folder, parquet file or JSON file.
        out: File to write.
        images: Folder of the images that a JSON file names.
    Raises:
        RefusedError: There is no such dataset, or it has no rows.
    """
    records = read_records(data, images)
    if not len(records):
        raise RefusedError(f"data {data} must have at least one row, got none. Give another.")
    folder = data if data.is_dir() else data.parent
    is_built = data.is_dir() or data.name == "dataset.parquet"
    counts = read_funnel(folder) if is_built else None
    refused = Refused.read(folder) if is_built else Refused()
    reasons = tried_before(folder) if is_built else {}
    facts = [PairFacts.of(text) for text in texts_of(records)]
    decisions = read_decisions(decisions_path(data))
    decided = {
        row: decisions[row] for row in decided_rows(records, decisions).values() if row in decisions
    }
    pairs: list[dict[str, Any]] = [
        shown_pair(record)
        | {
            "reasons": reasons.get(record.id, ()),
            "decision": decided.get(RowKey(record.id, record.key)),
        }
        for record in spread(records, MAX_PAIRS)
    ]
    is_induced = any("masked" in text.meta for text in texts_of(records))
    threshold = _threshold(folder) if is_built and is_induced else None
    page: dict[str, Any] = {
        "title": dataset_title(data),
        "is_induced": is_induced,
        "subtitle": _subtitle(folder, is_induced) if is_built else "",
        "warning": unrelated_answers(induced_similarities(induced_answers(texts_of(records)))),
        "tiles": [*_tiles(facts, counts), *_decision_tiles([*decided.values()])],
        "rows": row_lines(counts) if counts else [],
        "candidates": candidate_lines(counts) if counts else [],
        "plots": list(_plots(facts, refused, threshold)),
        "examples": {reason: found for reason, found in refused.examples.items() if found},
        "pairs": pairs,
        "num_rows": len(records),
        "ranks": sorted({fact.rank for fact in _of(pairs) if fact.rank is not None}),
        "reasons": sorted({reason for pair in pairs for reason in pair["reasons"]}),
    }
    return write_page(out, "dataset.html.j2", page, script="gallery.js")


def _of(pairs: Sequence[dict[str, Any]]) -> Iterator[PairFacts]:
    return (pair["view"].facts for pair in pairs)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "build.json"
    config = read_json(path).get("config") if path.is_file() else None
    return config if isinstance(config, dict) else {}


def _subtitle(folder: Path, is_induced: bool) -> str:
    config = _config(folder)
    names = ("mask", "threshold", "top_k", "seed") if is_induced else ()
    return ", ".join(f"{name} {config[name]}" for name in names if name in config)


def _threshold(folder: Path) -> float | None:
    value = _config(folder).get("threshold")
    return value if isinstance(value, int | float) else None


def _tiles(facts: Sequence[PairFacts], counts: Counts | None) -> Iterator[Tile]:
    yield from pair_tiles(len(facts), counts)
    # the cosines of retrieved images often agree to two decimals
    for name, of, decimals in (("similarity", "answers", 2), ("cosine", "images", 3)):
        if values := [v for fact in facts if (v := getattr(fact, name)) is not None]:
            shown = _middle_half(values, decimals)
            yield tile(f"{median(values):.{decimals}f}", f"median {name} of the {of}", shown)


def pair_tiles(num_pairs: int, counts: Counts | None) -> Iterator[Tile]:
    """Yield the number of pairs, and the share of rows that gave a pair, equal to the funnel's.

    Args:
        num_pairs: Pairs in the dataset.
        counts: Counts of the build; None for a dataset that `realign build` did not make.
    """
    rows = taken_rows(counts) if counts else 0
    whole = "sample" if counts and counts["unsampled"] else "source"
    yield tile(f"{num_pairs:,}", f"pairs from {rows:,} rows of the {whole}" if rows else "pairs")
    if counts and rows:
        share = 100 * counts["accepted"] / rows
        label = f"of the {whole}'s rows gave a pair: {counts['accepted']:,} of {rows:,}"
        yield tile(f"{share:.1f} %", label)


def _middle_half(values: Sequence[float], decimals: int) -> tuple[str, ...]:
    if len(values) < 2:
        return ()
    low, _, high = quantiles(values, n=4, method="inclusive")
    return ("half of them", f"from {low:.{decimals}f} to {high:.{decimals}f}")


def _decision_tiles(decisions: Sequence[Decision]) -> Iterator[Tile]:
    if decisions:
        counts = Counter(decision.decision for decision in decisions)
        yield tile(
            f"{len(decisions):,}",
            f"decided: {counts['keep']:,} keep, {counts['drop']:,} drop, {counts['flag']:,} flag",
        )


def _plots(
    facts: Sequence[PairFacts], refused: Refused, threshold: float | None
) -> Iterator[Markup]:
    similarities = [fact.similarity for fact in facts if fact.similarity is not None]
    if similarities:
        yield histogram(
            "Similarity of rejected to chosen",
            {"accepted": similarities, "refused": refused.similarities},
            "similarity",
            line=None if threshold is None else (threshold, f"threshold {threshold:g}"),
        )
    if cosines := [fact.cosine for fact in facts if fact.cosine is not None]:
        yield histogram(
            "Cosine of the retrieved image",
            {"accepted": cosines, "refused": refused.cosines},
            "cosine",
        )
    if ranks := Counter(fact.rank for fact in facts if fact.rank is not None):
        yield rank_plot(ranks)
    yield compared_histogram(
        "Length of the answers",
        {
            "chosen": [fact.words for fact in facts],
            "rejected": [fact.rejected_words for fact in facts],
        },
        "words",
    )
