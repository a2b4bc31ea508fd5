"""Search for remnants of masks in a completion, in any spelling that a model may use.

The rules, with examples of each in ``tests/realign/building/masking/remnants.yaml``:

- Brackets that hold only a name for a gap (``gaps.yaml``) are a remnant: ``[mask]``, ``<unk>``,
  ``{MASK_1}``, ``[insert color]``, ``[...]``, ``[ ]``. Brackets that hold a description are prose,
  for a model may fill a mask and keep its brackets: ``[red]``, ``[masked man]``.
- A square bracket without its partner is a remnant, since prose has none: ``[MASK dog``, ``[M``,
  ``ASK]``. So is the word mask after any opening bracket that is not closed, or before a closing
  bracket that was not opened.
- Round brackets belong to prose, ``(masked)``, unless they are empty, ``( )``, or give an order,
  ``(insert color)``.
- ``MASK`` in capitals is a remnant even without brackets, unless it is a text in the image: in
  quotation marks, after a verb such as "reads", or among words in capitals, ``WEAR A MASK``. In
  small letters it is prose: "a gas mask".
- A blank is a remnant: ``____``, and dashes, dots, stars or question marks where a word would be.
"""

from __future__ import annotations

import functools
import html
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from realign.runtime.files import read_utf8

GAPS = Path(__file__).with_name("gaps.yaml")
_PAIRS = ("[]", "<>", "{}", "【】", "〔〕", "〖〗", "⟨⟩", "()")
_OPENING, _CLOSING = (re.escape("".join(pair[i] for pair in _PAIRS[:-1])) for i in (0, 1))
_BRACKETED = {
    pair: re.compile(rf"\{pair[0]}([^\{pair[0]}\{pair[1]}]*)\{pair[1]}") for pair in _PAIRS
}
MAX_RUN = 8  # number of words that are examined on either side of a word in capitals
MAX_NESTED = 3  # nested brackets of one kind; deeper ones count as without partner

# what models write around the word inside its brackets; Ġ and ▁ are spaces of tokenizers
_DECORATION = r"[\s*_`\"'|:/#.Ġ▁-]{0,5}"
_MASK = r"(?:mask(?:ed|ing)?[\s_-]?){1,9}"
_BEHIND_BRACKET = re.compile(rf"[{_OPENING}]{_DECORATION}MASK")
_AT_BRACKET = re.compile(
    rf"[{_OPENING}]{_DECORATION}{_MASK}(?![^\W_])|(?<![^\W_]){_MASK}[0-9]{{0,3}}[{_CLOSING}]",
    re.IGNORECASE,
)
# not in a smiley, and not after the number of a list item
_SQUARE = re.compile(r"(?<![:;=])(?<![:;=]['^-])[\[\]]|[:;=]['^-]?[\[\]](?=\w)")
_LIST_MARKER = re.compile(r"^[ \t]*(?:[0-9]{1,2}|[a-z])\]", re.MULTILINE)
_NUMBERED = re.compile(r"(?<![^\W_Ġ])mask(?:ed)?_?[0-9]{1,3}(?![^\W_])", re.IGNORECASE)
_QUOTED = re.compile(r"[\"“«„][^\"“”«»„\n]{1,80}[\"”»]")
_MARKED_UP = re.compile(r"(?:[|%$~^]|__)mask(?:ed)?(?![^\W_])", re.IGNORECASE)
_BLANK = re.compile(
    r"_{3,}|(?<![^\W_])__(?![^\W_])|[█□▁]{2,}|(?<!\S)_(?=[\s.,;:!?]|\Z)"
    r"|(?<=\S )(?:\.{4,}|-{4,}|—{3,}|\*{3,}|\?{2,})(?=[ .,;]|\Z)"
)
_CAPITALS = re.compile(r"(?:MASK)+(?:ED|ING|S)?(?:[0-9]{1,3})?")
_WORD = re.compile(r"[^\W_Ġ]+")
_LETTERS = re.compile(r"[^\W\d_]+")
_BEFORE_WRITING = re.compile(
    r"\b(?:sa(?:y|ys|ying|id)|read(?:s|ing)?|spell(?:s|ed|ing)?|written|labell?ed|titled|marked"
    r"|printed|named|called|words?|text|letters|lettering|label|title|inscription|caption)"
    r"\W{0,5}\Z",
    re.IGNORECASE,
)


class _Gaps(NamedTuple):
    """Words that name a gap if brackets hold nothing else."""

    names: frozenset[str]
    beside: frozenset[str]
    orders: frozenset[str]
    fragments: frozenset[str]


@functools.cache
def _gaps() -> _Gaps:
    words = yaml.safe_load(read_utf8(GAPS))
    names = [*words["masks"], *words["gaps"], *words["tokens"], *words["kinds"]]
    lists = (names, words["beside"], words["orders"], words["fragments"])
    return _Gaps(*map(frozenset, lists))


def remnants(text: str) -> list[str]:
    """Return the remnants of masks in a text, in no particular order. One may occur twice."""
    plain = _plain(text)
    found, unpaired = [], plain
    for pair, bracketed in _BRACKETED.items():
        found += [match.group() for match in bracketed.finditer(plain) if _is_gap(pair, match)]
        unpaired = _without(pair, unpaired)
    places = [
        (_BEHIND_BRACKET, plain),
        (_AT_BRACKET, unpaired),
        (_SQUARE, _LIST_MARKER.sub(" ", _without("[]", plain))),
        *((pattern, plain) for pattern in (_NUMBERED, _MARKED_UP, _BLANK)),
    ]
    found += [match.group() for pattern, where in places for match in pattern.finditer(where)]
    return [*found, *_bare_capitals(plain)]


def _without(pair: str, text: str) -> str:
    """Return ``text`` without the brackets of one kind that have a partner, and their content."""
    for _ in range(MAX_NESTED):
        text = _BRACKETED[pair].sub(" ", text)
    return text


def _plain(text: str) -> str:
    """Return ``text`` with plain instead of full-width characters, without escapes and without
    characters that have no width.
    """
    folded = unicodedata.normalize("NFKC", html.unescape(text)).replace("\\", "")
    return "".join(letter for letter in folded if unicodedata.category(letter) != "Cf")


def _is_gap(pair: str, match: re.Match[str]) -> bool:
    """Return whether brackets hold a name for a gap, a piece of one, or nothing."""
    content = match.group(1)
    is_round = pair == "()"
    words = _LETTERS.findall(content.lower())
    if not words:
        marks = r"[\s._]*" if is_round else r"[\s._?*|~]*" if pair == "<>" else r"[\s._?*|~–—-]*"
        before = match.string[match.start() - 1 : match.start()]
        is_code = before.isascii() and before.isalnum()  # f()
        return re.fullmatch(marks, content) is not None and not is_code
    label, colon, _ = content.lower().replace("=", ":").partition(":")
    if colon:
        words = _LETTERS.findall(label) or words  # what was filled in follows the colon
    gaps = _gaps()
    is_order = words[0] in gaps.orders
    is_known = (gaps.names | gaps.beside | gaps.orders).issuperset(words)
    if is_order or is_round:
        return is_order and (is_known or not is_round)
    joined = "".join(words)
    if joined in gaps.names or re.fullmatch(rf"(?:{_MASK})+", joined):
        return True
    if joined in gaps.fragments and content.isupper():
        return True
    return is_known and not gaps.names.isdisjoint(words)


def _bare_capitals(text: str) -> Iterator[str]:
    """Yield each MASK in capitals that is not a text in the image."""
    words = list(_WORD.finditer(text))
    # quotation marks around the whole completion do not quote a text in the image
    found = (match for match in _QUOTED.finditer(text) if match.group() != text.strip())
    quoted = [match.span() for match in found]
    for i, word in enumerate(words):
        if not _CAPITALS.fullmatch(word.group()):
            continue
        before = bisect_left(quoted, word.span()) - 1
        is_quoted = before >= 0 and word.end() <= quoted[before][1]
        if not is_quoted and not _is_text_in_image(text, words, i):
            yield word.group()


def _is_text_in_image(text: str, words: list[re.Match[str]], i: int) -> bool:
    start, stop = words[i].span()
    is_quoted = f"{text[start - 1 : start]}{text[stop : stop + 1]}" in ("''", "‘’", "「」", "『』")
    if is_quoted or _BEFORE_WRITING.search(text, max(0, start - 40), start):
        return True
    return any(_is_beside_capitals(text, words, i, step) for step in (-1, 1))


def _is_beside_capitals(text: str, words: list[re.Match[str]], i: int, step: int) -> bool:
    """Return whether word ``i`` is in a run of words in capitals, within its sentence, with one
    that is not a mask.
    """
    for _ in range(MAX_RUN):
        if not 0 <= i + step < len(words):
            return False
        first, second = sorted((words[i], words[i + step]), key=re.Match.start)
        i += step
        word = words[i].group()
        if re.search(r"[.!?\n]", text[first.end() : second.start()]) or not (
            word.isupper() or word.isdigit()
        ):
            return False
        if len(word) > 1 and not word.isdigit() and not _CAPITALS.fullmatch(word):
            return True
    return False
