"""Search for the objects that a caption names, by lists of their words.

The caption is read from left to right, and the longest phrase of any object that begins at a word
takes its words: "hot dog" is no dog where both are objects. Case, width and composition of letters,
the shape of apostrophes and a possessive ending do not count; a hyphen or an underscore is a space.
A phrase does not cross the end of a line, nor punctuation that it does not have. Its last word may
be in the plural, by the rules of English, unless the plural is itself a phrase.

Chinese characters and hiragana are words of one character each, so that phrases of them are found
within a sentence; a run of katakana is one word. Thai, Lao, Burmese, Khmer, Javanese and scripts
like them write no spaces and no such words, and are refused.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from realign.errors import RefusedError

Synonyms = Mapping[str, Sequence[str]]

_UNSPACED = re.compile(
    r"[\u3005-\u3007\u3041-\u309f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_KATAKANA = re.compile(r"[\u30a1-\u30fa\u30fc-\u30ff]")
_REFUSED = re.compile(  # Thai and Lao, Burmese, Khmer, and others of their family
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\ua980-\ua9ff\uaa60-\uaadf]"
)
# between the words of a phrase; nothing where one of them is of an unspaced script
_SPACE = re.compile(r"[ \t]*|[-\u2010_]")
_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\u2032`\u00b4", "'"))
_IRREGULAR = {
    "child": "children",
    "person": "people",
    "man": "men",
    "mouse": "mice",
    "goose": "geese",
    "foot": "feet",
    "tooth": "teeth",
    "ox": "oxen",
}


class Word(NamedTuple):
    """A word of a text in the form that is compared, and its place."""

    text: str
    start: int
    stop: int


def mentioned(caption: str, synonyms: Synonyms) -> set[str]:
    """Return the objects that a caption names.

    Args:
        caption: Any text.
        synonyms: Words and phrases of each object; its name counts only if it is listed.
    """
    return {name for _, names in mentions(caption, synonyms) for name in names}


def mentions(caption: str, synonyms: Synonyms) -> Iterator[tuple[str, frozenset[str]]]:
    """Yield each phrase of a caption that names objects, in order and in lower case, with the
    objects that it names.
    """
    phrases, longest = _phrases(tuple((name, tuple(words)) for name, words in synonyms.items()))
    text = _plain(caption)
    words = [*_words(text)]
    i = 0
    while i < len(words):
        keys = [*_keys(text, words[i : i + longest.get(words[i].text, 0)])]
        length = max((n for n, key in enumerate(keys, start=1) if key in phrases), default=0)
        if length:
            yield text[words[i].start : words[i + length - 1].stop], phrases[keys[length - 1]]
        i += length or 1


def check_words(name: str, words: Sequence[str], where: str) -> None:
    """Refuse words of an object that no caption could name.

    Raises:
        RefusedError: There are no words, a word is only punctuation, or a word is of a script
            without spaces between words.
    """
    if not words:
        raise RefusedError(
            f"{where} must list words for {name!r}, got none, so that no caption could name it. "
            "Add its name at least."
        )
    for word in words:
        if found := _REFUSED.search(word):
            script = unicodedata.name(found.group()).split()[0].title()
            raise RefusedError(
                f"{where} must have words of a script with spaces, or Chinese or Japanese ones, "
                f"got {word!r} for {name!r}: {script} writes no spaces, and its words are not told "
                "apart. Translate the captions and the objects."
            )
        if not _phrase(word):
            raise RefusedError(
                f"{where} must have words of letters or digits, got {word!r} for {name!r}. "
                "Correct it."
            )


def object_of(name: str, synonyms: Synonyms) -> str | None:
    """Return the object that a name stands for, by the rule for captions; None if there is none or
    more than one.
    """
    if name in synonyms:
        return name
    words = tuple((key, (key, *others)) for key, others in synonyms.items())
    found = _phrases(words)[0].get(_phrase(name))
    return next(iter(found)) if found and len(found) == 1 else None


@functools.lru_cache(maxsize=8)
def _phrases(
    synonyms: tuple[tuple[str, tuple[str, ...]], ...],
) -> tuple[dict[str, frozenset[str]], dict[str, int]]:
    """Return the objects by phrase, and the number of words of the longest phrase by first word."""
    listed: dict[str, set[str]] = {}
    for name, words in synonyms:
        for word in words:
            if phrase := _phrase(word):
                listed.setdefault(phrase, set()).add(name)
    plural: dict[str, set[str]] = {}
    for phrase, names in listed.items():
        for form in _plurals(phrase):
            plural.setdefault(form, set()).update(names)
    phrases = {phrase: frozenset(names) for phrase, names in (plural | listed).items()}
    longest: dict[str, int] = {}
    for phrase in phrases:
        first, *others = _words(phrase)
        longest[first.text] = max(longest.get(first.text, 0), 1 + len(others))
    return phrases, longest


def _phrase(text: str) -> str:
    """Return a phrase of a list with one spelling; empty where it has no word."""
    plain = _plain(text)
    *_, key = ["", *_keys(plain, [*_words(plain)])]
    return key


def _keys(text: str, words: Sequence[Word]) -> Iterator[str]:
    """Yield the first word, the first two words, and so on, with one space between words that
    spaces, a hyphen or nothing separates, and any other separator as it is.
    """
    key = ""
    for i, word in enumerate(words):
        if i:
            gap = text[words[i - 1].stop : word.start]
            key += " " if _SPACE.fullmatch(gap) else gap
        key += word.text
        yield key


def _plain(text: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return folded.translate(_APOSTROPHES)


def _words(text: str) -> Iterator[Word]:
    """Yield the words of a plain text. An apostrophe within a word belongs to it."""
    kinds = [*map(_kind, text), ""]
    for i, letter in enumerate(text):
        if i and (kinds[i] == "mark" or (letter == "'" and kinds[i - 1] == kinds[i + 1] == "word")):
            kinds[i] = kinds[i - 1]
    start = 0
    for stop in range(1, len(kinds)):
        if kinds[stop] != kinds[start] or kinds[start] == "unspaced":
            if kinds[start] not in ("", "mark"):
                yield Word(text[start:stop].removesuffix("'s"), start, stop)
            start = stop


def _kind(letter: str) -> str:
    """Return the kind of letters that a letter forms words with; empty if it forms none."""
    if letter.isascii():
        return "word" if letter.isalnum() else ""
    if _UNSPACED.match(letter):
        return "unspaced"
    if _KATAKANA.match(letter):
        return "katakana"
    return {"L": "word", "N": "word", "M": "mark"}.get(unicodedata.category(letter)[0], "")


def _plurals(word: str) -> Iterator[str]:
    """Yield possible plurals of a word; some of them are not English words."""
    yield f"{word}s"
    yield f"{word}es"
    if re.search(r"[^aeiou]y\Z", word):
        yield f"{word[:-1]}ies"
    if re.search(r"fe?\Z", word):
        yield re.sub(r"fe?\Z", "ves", word)
    for singular, plural in _IRREGULAR.items():
        if word.endswith(singular):
            yield word.removesuffix(singular) + plural
