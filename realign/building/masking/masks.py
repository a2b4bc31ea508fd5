"""Masks of an answer: its visual segments become ``[MASK]``, and every other character stays.

The segments come from a lexicon, or from the reply of a model, of which only the places of its
masks are used. At sentence level, every sentence with a masked segment becomes one mask.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from random import Random
from typing import Literal

from realign.building.masking.lexicon import Lexicon
from realign.building.masking.sentences import WORD, Span, sentences
from realign.building.prompts import MASK_TOKEN, readings

Level = Literal["segment", "sentence"]
MAY_BE_MASKED_WHOLE = 3  # words of answers such as "Yes." or "A dog.", which may be one mask


def mask_by_rule(
    text: str,
    lexicon: Lexicon,
    rates: Mapping[str, float],
    rng: Random,
    level: Level = "segment",
) -> str | None:
    """Replace visual segments of ``text`` by ``[MASK]``, each with the probability that ``rates``
    has for its category, 1 by default.

    At least one segment is replaced. Return None if the text has no visual segment, or contains
    ``[MASK]`` itself, which no completion could keep.
    """
    segments = lexicon.segments(text)
    if not segments or MASK_TOKEN in text:
        return None
    chosen = [segment for segment in segments if rng.random() < rates.get(segment[2], 1.0)]
    spans = [(start, stop) for start, stop, _ in chosen or [rng.choice(segments)]]
    return _replaced(text, _at_level(text, spans, level))


def mask_by_reply(text: str, reply: str, level: Level = "segment") -> str | None:
    """Mask ``text`` where a model's reply has ``[MASK]``.

    The reply may differ from the text in whitespace and in the shape of quotation marks, and may be
    wrapped (``realign.building.prompts``). Masks are extended to whole words: ``d[MASK]g`` covers
    "dog", and several masks inside one word are one mask. A mask may cover several words.

    Return None if the reply changed anything else, masked nothing, masked across the end of a
    sentence, or masked every word of an answer of more than three words.
    """
    if MASK_TOKEN in text:
        return None
    for reading in readings(reply):
        spans = _whole_words(text, _masked_stretches(text, reading))
        if spans and (level == "sentence" or _are_segments(text, spans)):
            return _replaced(text, _at_level(text, spans, level))
    return None


def fits_mask(masked: str, completed: str) -> bool:
    """Return whether ``completed`` is ``masked`` with every ``[MASK]`` filled in and nothing else
    changed.
    """
    return MASK_TOKEN not in completed and _fillings(masked.strip(), completed.strip()) is not None


def _fillings(masked: str, completed: str) -> list[Span] | None:
    """Return the spans of ``completed`` in place of the masks; None if the rest differs.

    The time is linear in the text: the first and last pieces are anchored, and those in between are
    found from the left.
    """
    first, *between = masked.split(MASK_TOKEN)
    if not between:
        return [] if completed == first else None
    last = between.pop()
    end, position = len(completed) - len(last), len(first)
    if not (completed.startswith(first) and completed.endswith(last)):
        return None
    spans = []
    for piece in between:
        found = completed.find(piece, position + 1, end)  # a filling has at least one character
        if found < 0:
            return None
        spans.append((position, found))
        position = found + len(piece)
    return [*spans, (position, end)] if position < end else None


def _masked_stretches(text: str, masked: str) -> list[Span]:
    """Return spans like ``_fillings``, ignoring the form of whitespace and quotation marks."""
    folded, offsets = _folded(text)
    fillings = _fillings(_folded(masked)[0], folded) or []
    return [(offsets[start], offsets[stop - 1] + 1) for start, stop in fillings]


_SAME = str.maketrans("‘’‛“”„‟\u00a0‐‑", '\'\'\'"""" --')


def _folded(text: str) -> tuple[str, list[int]]:
    """Return ``text`` with plain quotation marks and single spaces, and each character's origin."""
    characters: list[str] = []
    offsets = []
    for offset, character in enumerate(text.translate(_SAME)):
        if not character.isspace():
            characters.append(character)
        elif characters and characters[-1] != " ":
            characters.append(" ")
        else:
            continue
        offsets.append(offset)
    return "".join(characters).rstrip(), offsets


def _whole_words(text: str, spans: Iterable[Span]) -> list[Span]:
    """Return the words that the spans touch, from first to last of each span."""
    words = [match.span() for match in WORD.finditer(text)]
    starts, stops = [start for start, _ in words], [stop for _, stop in words]
    whole: list[Span] = []
    for start, stop in spans:
        first, last = bisect_right(stops, start), bisect_left(starts, stop) - 1
        if first > last:
            continue  # the mask covers no word
        if whole and starts[first] < whole[-1][1]:
            whole[-1] = whole[-1][0], stops[last]
        else:
            whole.append((starts[first], stops[last]))
    return whole


def _are_segments(text: str, spans: Sequence[Span]) -> bool:
    """Return whether each span lies within a sentence and a part of the answer is unmasked."""
    found = sentences(text)
    for start, stop in spans:
        touched = _touched(found, (start, stop))
        if len(touched) != 1 or start < found[touched[0]][0] or stop > found[touched[0]][1]:
            return False
    masked = sum(len(WORD.findall(text[start:stop])) for start, stop in spans)
    words = len(WORD.findall(text))
    return masked < words or words <= MAY_BE_MASKED_WHOLE


def _at_level(text: str, spans: list[Span], level: Level) -> list[Span]:
    """Return the spans, or the sentences that hold them.

    If every one of several sentences would be masked, the first one stays, because the completion
    prompt requires a text to complete. An answer of one sentence becomes one mask.
    """
    if level == "segment":
        return spans
    found = sentences(text)
    touched = sorted({i for span in spans for i in _touched(found, span)})
    with_words = [i for i, span in enumerate(found) if any(map(str.isalpha, text[slice(*span)]))]
    return [
        found[i] for i in (touched[1:] if len(touched) > 1 and touched == with_words else touched)
    ]


def _touched(found: list[Span], span: Span) -> range:
    """Return the sentences of ``found`` that share a character with a span."""
    return range(
        bisect_right(found, span[0], key=lambda sentence: sentence[1]),
        bisect_left(found, span[1], key=lambda sentence: sentence[0]),
    )


def _replaced(text: str, spans: Iterable[Span]) -> str:
    pieces, end = [], 0
    for start, stop in spans:
        pieces += [text[end:start], MASK_TOKEN]
        end = stop
    return "".join([*pieces, text[end:]])
