"""A warning about induced answers that have little to do with the chosen ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import median
from typing import NamedTuple

from realign.data.lexical import lexical
from realign.data.records import Record

# Lexical similarity of LLaVA-1.5's published answers to LLaVA-Bench and MM-Vet (272 of 7B, 272 of
# 13B). Answers to different questions: median 0.00 to 0.02, 95 of 100 below 0.08. Answers to the
# same question: median 0.33 to 0.43, 95 of 100 above 0.15. With 7 of 10 content words replaced:
# median 0.14 to 0.16. Cosines of encoders have no common bound, so the filter's own similarity
# cannot be used here.
UNRELATED = 0.1
FEWEST = 10  # pairs for a meaningful median


class InducedAnswer(NamedTuple):
    """A chosen answer and the rejected answer that was induced from it.

    Attributes:
        chosen: The chosen answer.
        masked: The masked answer.
        rejected: The answer with its masks filled in.
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

    An answer that is masked almost as a whole is left out, since a good filling shares next to
    nothing with it: a single word, or a text that is written without spaces.
    """
    return [
        lexical(chosen, rejected)
        for chosen, masked, rejected in answers
        if lexical(chosen, masked.replace("[MASK]", " ")) >= UNRELATED
    ]


def unrelated_answers(similarities: list[float]) -> str:
    """Return a warning if induced answers share next to nothing with the chosen ones, although only
    masked words should differ; otherwise an empty text.

    Args:
        similarities: From :func:`induced_similarities`.
    """
    if len(similarities) < FEWEST or median(similarities) >= UNRELATED:
        return ""
    return (
        "the rejected answers share next to nothing with the chosen ones: the median lexical "
        f"similarity of {len(similarities):,} pairs is {median(similarities):.2f}, as between "
        f"answers to different questions ({UNRELATED:g} and more is usual). The model may not know "
        "such pictures. Look at some pairs with `realign browse`; then set "
        "build.keep_unmasked=true, which refuses answers that change other words than the masked "
        "ones, or align a model that knows such pictures"
    )
