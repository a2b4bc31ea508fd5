"""Readings of short answers that several benchmarks share."""

from __future__ import annotations

import re

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIOD_NOT_BESIDE_DIGIT = re.compile(r"(?<!\d)\.(?!\d)")
_MOST_PERIODS = 32  # a flag of regular expressions is passed where the number belongs


def strip_punctuation(text: str, *, keeps_after_digit: bool) -> str:
    """Remove punctuation as the scorer of VQA does, whose copy many programs have.

    A mark is deleted if it is beside a space anywhere in the text, or if the text has a comma
    between two digits; otherwise a space replaces it. A period goes unless a digit follows.

    Args:
        text: Any text.
        keeps_after_digit: Whether a period after a digit stays, as in VLMEvalKit; the official
            scorer intends it too, but has a typing error in its pattern.
    """
    result = text
    has_number = _DIGIT_COMMA_DIGIT.search(text) is not None
    for mark in _MARKS:
        is_beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if is_beside_space or has_number else " ")
    pattern = _PERIOD_NOT_BESIDE_DIGIT if keeps_after_digit else _PERIOD
    return pattern.sub("", result, count=_MOST_PERIODS)


def yes_or_no(answer: str) -> bool | None:
    """Return whether an answer has the word yes and not no (True), or no and not yes (False).

    This is how VLMEvalKit reads answers; None is its "Unknown".
    """
    words = strip_punctuation(answer.lower(), keeps_after_digit=True).split()
    has_yes, has_no = "yes" in words, "no" in words
    return has_yes if has_yes != has_no else None
