"""Readings of short answers that several benchmarks share."""

from __future__ import annotations

import re

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


def strip_punctuation(text: str, *, periods: int = 0) -> str:
    """Remove punctuation as the scorer of VQA does, whose copy many programs have.

    A mark is deleted where it stands beside a space anywhere in the text, or where the text has a
    comma between two digits; otherwise a space takes its place. A period goes unless a digit
    follows.

    Args:
        text: Any text.
        periods: How many periods are removed at most; 0 for all.
    """
    result = text
    has_number = _DIGIT_COMMA_DIGIT.search(text) is not None
    for mark in _MARKS:
        is_beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if is_beside_space or has_number else " ")
    return _PERIOD.sub("", result, count=periods)


def yes_or_no(answer: str) -> bool | None:
    """Return whether an answer has the word yes and not no (True), or no and not yes (False).

    This is how VLMEvalKit reads answers; None is its "Unknown".
    """
    words = strip_punctuation(answer.lower()).split()
    has_yes, has_no = "yes" in words, "no" in words
    return has_yes if has_yes != has_no else None
