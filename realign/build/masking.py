"""Turns an answer into a masked answer: its visual segments become ``[MASK]``, every other
character stays.

By rule, a lexicon says what a visual segment is. A lexicon is a YAML file of categories (objects,
attributes, relations, ...), each a list of phrases; the longest phrase wins, case is ignored, words
are matched whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

import yaml

from realign.build.prompts import MASK_TOKEN
from realign.errors import RefusedError
from realign.files import read_utf8


class Lexicon:
    """Phrases that name something visual, by category."""

    def __init__(self, categories: Mapping[str, Sequence[str]]) -> None:
        self._category = {
            phrase.lower(): name for name, phrases in categories.items() for phrase in phrases
        }
        longest_first = sorted(self._category, key=len, reverse=True)
        self._pattern = re.compile(
            rf"\b(?:{'|'.join(re.escape(phrase) for phrase in longest_first)})(?:e?s)?\b",
            re.IGNORECASE,
        )

    @classmethod
    def load(cls, path: Path) -> Lexicon:
        """Read a lexicon file.

        Raises:
            RefusedError: No such file, or not a mapping from category to a list of phrases.
        """
        if not path.is_file():
            raise RefusedError(
                f"lexicon must be a YAML file, got {path}, which does not exist. Check the path."
            )
        try:
            raw = yaml.safe_load(read_utf8(path))
        except yaml.YAMLError as error:
            raise RefusedError(f"lexicon {path} must be YAML ({error}). Correct it.") from None
        if not isinstance(raw, dict) or not all(
            isinstance(phrases, list) and phrases and all(isinstance(p, str) for p in phrases)
            for phrases in raw.values()
        ):
            raise RefusedError(
                f"{path} must map each category to a list of phrases, got {type(raw).__name__}. "
                "Write them as in realign/build/lexicon.yaml."
            )
        return cls(raw)

    def check_rates(self, rates: Mapping[str, float]) -> None:
        """Refuse rates of categories that the lexicon does not have, and rates outside [0, 1]."""
        known = sorted(set(self._category.values()))
        for name, rate in rates.items():
            if name not in known:
                raise RefusedError(
                    f"mask_rates must name categories of {known}, got {name!r}. Rename it."
                )
            if not 0 <= rate <= 1:
                raise RefusedError(f"mask_rates.{name} must be in [0, 1], got {rate}. Correct it.")

    def segments(self, text: str) -> list[tuple[int, int, str]]:
        """Start, end and category of every visual segment of ``text``, in order."""
        return [
            (match.start(), match.end(), self._category_of(match.group().lower()))
            for match in self._pattern.finditer(text)
        ]

    def _category_of(self, phrase: str) -> str:
        singular = (phrase, phrase.removesuffix("s"), phrase.removesuffix("es"))
        return next(self._category[form] for form in singular if form in self._category)


def mask_by_rule(
    text: str, lexicon: Lexicon, rates: Mapping[str, float], rng: Random
) -> str | None:
    """Replace visual segments of ``text`` by ``[MASK]``, each with its category's rate (1 where
    none is given).

    At least one segment is replaced. Returns None when the text has no visual segment.
    """
    segments = lexicon.segments(text)
    if not segments:
        return None
    chosen = [segment for segment in segments if rng.random() < rates.get(segment[2], 1.0)]
    pieces, end = [], 0
    for start, stop, _ in chosen or [rng.choice(segments)]:
        pieces += [text[end:start], MASK_TOKEN]
        end = stop
    return "".join([*pieces, text[end:]])


def fits_mask(masked: str, completed: str) -> bool:
    """Whether ``completed`` is ``masked`` with every ``[MASK]`` filled and the rest kept.

    Linear in the text: the first and last pieces are anchored, those between are found from the
    left.
    """
    first, *between = masked.strip().split(MASK_TOKEN)
    completed = completed.strip()
    if not between:
        return completed == first
    last = between.pop()
    end = len(completed) - len(last)
    if MASK_TOKEN in completed or not (completed.startswith(first) and completed.endswith(last)):
        return False
    position = len(first)
    for piece in between:
        found = completed.find(piece, position + 1, end)  # a filling has at least one character
        if found < 0:
            return False
        position = found + len(piece)
    return position < end


def masks_only(text: str, masked: str) -> bool:
    """Whether ``masked`` is ``text`` with at least one stretch replaced by ``[MASK]`` and nothing
    else changed.
    """
    return MASK_TOKEN in masked and fits_mask(masked, text)
