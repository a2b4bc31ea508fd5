"""Words and sentences of a text."""

from __future__ import annotations

import re

Span = tuple[int, int]
# a run of end marks is matched only from its beginning, which keeps the search linear
_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]*_]*+(?=\s|\Z)|[。！？]+|\n")
_LEAD = re.compile(r"\s*(?:(?:[-*•–]|[0-9]+[.)])[ \t]+)?")
_LAST_WORD = re.compile(r"\w+\Z")
_TITLES = frozenset(["mr", "mrs", "ms", "dr", "st", "prof", "mt", "vs"])
_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff"  # Japanese and Chinese write no spaces
# a letter and the accents written after it belong together; an unspaced character is a word
WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:[\u0300-\u036f]+[^\W{_UNSPACED}]*)*")


def sentences(text: str) -> list[Span]:
    """Return start and stop of every sentence, without list markers, end marks and spaces."""
    spans, start = [], 0
    for match in _END.finditer(text):
        if not _is_inner(text, start, match):
            spans.append(_trimmed(text, start, match.start()))
            start = match.end()
    spans.append(_trimmed(text, start, len(text)))
    return [(start, stop) for start, stop in spans if start < stop]


def _is_inner(text: str, start: int, end: re.Match[str]) -> bool:
    """Return whether a full stop belongs to an abbreviation or a list's number: "Mr. Smith", "J.
    Smith", "at 5 p.m. on", "1. A dog".
    """
    if end.group() != ".":
        return False
    if end.start() - start < 10 and text[start : end.start()].strip().isdigit():
        return True
    # titles and initials are shorter than this
    last = _LAST_WORD.search(text, max(start, end.start() - 20), end.start())
    word = last.group() if last else ""
    if word.lower() in _TITLES or (len(word) == 1 and word.isalpha() and word.isupper()):
        return True
    following = text[end.end() : end.end() + 2].strip()
    return following[:1].islower()


def _trimmed(text: str, start: int, stop: int) -> Span:
    lead = _LEAD.match(text, start, stop)
    start = lead.end() if lead else start
    return start, start + len(text[start:stop].rstrip())
