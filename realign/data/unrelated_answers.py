"""A warning of induced answers that have little to do with the chosen ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import median
from typing import NamedTuple

from realign.data.lexical import lexical
from realign.data.records import Record

# Lexical similarity of LLaVA-1.5's published answers to LLaVA-Bench and MM-Vet (272 of 7B, 272 of
# 13B). To different questions: median 0.00 to 0.02, 95 of 100 below 0.08. To the same one: median
# 0.33 to 0.43, 95 of 100 above 0.15. With 7 of 10 content words replaced: median 0.14 to 0.16.
# No bound holds for the cosines of all encoders, so the filter's similarity is not what counts.
UNRELATED = 0.1
FEWEST = 10  # pairs that a median says something about


class InducedAnswer(NamedTuple):
    """A chosen answer and what was induced from it.

    Attributes:
        chosen: The chosen answer.
        masked: The same with its masks.
        rejected: The answer with the masks filled in.
    """

    chosen: str
    masked: str
    rejected: str


def induced_answers(records: Iterable[Record]) -> Iterator[InducedAnswer]:
    """Yield the answers of the rows whose rejected answer was induced."""
    for record in records:
        if isinstance(masked := record.meta.get("masked"), str):
            yield InducedAnswer(record.chosen, masked, record.rejected)


def induced_similarities(answers: Iterable[InducedAnswer]) -> list[float]:
    """Return the lexical similarity of chosen and rejected answers.

    An answer of which the mask keeps next to no words is left out, since a good filling shares next
    to nothing with it: a single word, or a text that is written without spaces.
    """
    return [
        lexical(chosen, rejected)
        for chosen, masked, rejected in answers
        if lexical(chosen, masked.replace("[MASK]", " ")) >= UNRELATED
    ]


def unrelated_answers(similarities: list[float]) -> str:
    """Return a warning if induced answers share next to nothing with the chosen ones, which an
    answer with a few refilled words does; else an empty text.

    Args:
        similarities: Of :func:`induced_similarities`.
    """
    if len(similarities) < FEWEST or median(similarities) >= UNRELATED:
        return ""
    return (
        "the rejected answers share next to nothing with the chosen ones: the median lexical "
        f"similarity of {len(similarities):,} pairs is {median(similarities):.2f}, as of answers "
        f"to other questions ({UNRELATED:g} and more is usual). The model may not know such "
        "pictures. Look at some pairs with `realign browse`; then set build.keep_unmasked=true, "
        "which refuses answers that changed other words than the masked ones, or align a model "
        "that knows them"
    )
