"""Lexicons: phrases that name something visual, by category, and the search for them in a text.

A lexicon is a YAML file of categories (objects, attributes, relations, ...), each a list of
phrases. Phrases of the category ``kept`` are matched like the others but not masked. Whole words
are matched, the longest phrase wins, case is ignored, regular plurals are included, a space stands
for spaces or a hyphen, and ``#`` for a number of up to three digits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from realign.building.masking.sentences import WORD
from realign.errors import RefusedError
from realign.runtime.strict_yaml import read_yaml

KEPT = "kept"
NUMBER = "#"
_GAP = re.compile(r"[ \t\u00a0]+|[-\u2010\u2011]")  # no line end: a phrase does not cross lines
# not digits of a year, an id or "3D"; "10:30" and "1,200" are one number each
_NUMBER = re.compile(r"[0-9]{1,3}(?:[.,:][0-9]{1,3})*(?!\w)")
_SEPARATORS = str.maketrans(".,:", "   ")
_LIST_MARKER = re.compile(r"(?m)^[ \t]*([0-9]+)[.)](?=\s)")


class Lexicon:
    """Finder of visual phrases, in time linear in the length of the text.

    Args:
        categories: Phrases by category.
    Raises:
        RefusedError: A phrase has no word, or is in two categories.
    """

    def __init__(self, categories: Mapping[str, Sequence[str]]) -> None:
        self.categories = sorted(set(categories) - {KEPT})
        self._category: dict[str, str] = {}  # by phrase, as _key() writes it
        for name, phrases in categories.items():
            for phrase in phrases:
                self._add(phrase, name)
        for key, name in list(self._category.items()):
            for plural in _plurals(key):
                self._category.setdefault(plural, name)
        # first word to the number of words of the longest phrase that begins with it
        self._longest: dict[str, int] = {}
        for key in self._category:
            first, *others = WORD.findall(key) or [key]
            self._longest[first] = max(self._longest.get(first, 0), 1 + len(others))

    def _add(self, phrase: str, category: str) -> None:
        key = NUMBER if phrase == NUMBER else _key(phrase)
        if not key:
            raise RefusedError(
                f"lexicon must have phrases that begin and end with a word, got {phrase!r} in "
                f"{category}. Correct it."
            )
        earlier = self._category.setdefault(key, category)
        if earlier != category:
            raise RefusedError(
                f"lexicon must have {phrase!r} in one category, got {earlier} and {category}. "
                "Drop one."
            )

    @classmethod
    def load(cls, path: Path) -> Lexicon:
        """Read a lexicon file.

        Raises:
            RefusedError: There is no such file, it has a category twice, or it does not map
                categories to lists of phrases.
        """
        raw = read_yaml(path, "lexicon")
        if not isinstance(raw, dict) or not set(raw) - {KEPT}:
            raise RefusedError(
                f"{path} must map each category to a list of phrases, got {type(raw).__name__}. "
                "Write them as in realign/building/masking/lexicon.yaml."
            )
        for name, phrases in raw.items():
            if not isinstance(phrases, list) or not phrases:
                raise RefusedError(
                    f"{path} must map each category to a list of phrases, got "
                    f"{type(phrases).__name__} for {name!r}. Write them as in "
                    "realign/building/masking/lexicon.yaml."
                )
            if wrong := [phrase for phrase in phrases if not isinstance(phrase, str)]:
                raise RefusedError(
                    f"{path} must have phrases in {name!r}, got {wrong[0]!r}. Quote it: YAML reads "
                    "a bare yes, no, on or off as true or false, and digits as a number."
                )
        return cls(raw)

    def check_rates(self, rates: Mapping[str, float]) -> None:
        """Refuse rates of categories that the lexicon does not have."""
        for name in rates:
            if name not in self.categories:
                raise RefusedError(
                    f"mask_rates must name categories of {self.categories}, got {name!r}. "
                    "Rename it."
                )

    def segments(self, text: str) -> list[tuple[int, int, str]]:
        """Return start, end and category of every visual segment of ``text``, in order."""
        found = []
        words = [
            (match.start(), match.end(), match.group().lower()) for match in WORD.finditer(text)
        ]
        counts, i = self._category.get(NUMBER, ""), 0
        markers = {match.start(1) for match in _LIST_MARKER.finditer(text)} if counts else set()
        while i < len(words):
            start, _, word = words[i]
            longest = self._longest.get(word)
            length, category = self._match(text, words, i, longest) if longest else (0, "")
            if not length and counts and word[0] in "0123456789" and start not in markers:
                length, category = _number_words(text, words, i), counts
            if length and category != KEPT:
                found.append((start, words[i + length - 1][1], category))
            i += length or 1
        return found

    def _match(
        self, text: str, words: list[tuple[int, int, str]], first: int, longest: int
    ) -> tuple[int, str]:
        """Return the number of words and the category of the longest phrase that begins with word
        ``first``; 0 words if there is none.
        """
        key, stop, best = "", words[first][0], (0, "")
        for length, (start, end, word) in enumerate(words[first : first + longest], start=1):
            key += _gap(text[stop:start]) + word
            stop = end
            if category := self._category.get(key):
                best = length, category
        return best


def _number_words(text: str, words: list[tuple[int, int, str]], first: int) -> int:
    """Return the number of words of a number that begins at word ``first``: two of "10:30"."""
    match = _NUMBER.match(text, words[first][0])
    return match.group().translate(_SEPARATORS).count(" ") + 1 if match else 0


def _gap(text: str) -> str:
    """Return the text between two words, with one space for hyphens and runs of spaces."""
    return " " if text == " " or _GAP.fullmatch(text) else text


def _key(phrase: str) -> str:
    """Return a phrase in lower case with single spaces; empty if it does not consist of words."""
    words = list(WORD.finditer(phrase))
    if not words or words[0].start() or words[-1].end() != len(phrase):
        return ""
    key = words[0].group()
    for before, word in pairwise(words):
        key += _gap(phrase[before.end() : word.start()]) + word.group()
    return key.lower()


def _plurals(key: str) -> list[str]:
    """Return regular plurals; irregular ones are separate phrases."""
    if key == NUMBER:
        return []
    regular = [f"{key}s", f"{key}es"]
    return [*regular, f"{key[:-1]}ies"] if re.search(r"[^aeiou]y$", key) else regular
