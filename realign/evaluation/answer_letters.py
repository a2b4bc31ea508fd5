"""The letter of a multiple-choice answer, as several programs find it."""

from __future__ import annotations

import re
from collections.abc import Mapping

NO_LETTER = "Z"  # VLMEvalKit's word for an answer without a choice
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 5  # a letter before them is taken for a word
_STATED = re.compile(r"answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_LLAVA_STATED = re.compile(r"The answer is ([A-Z]).")
_NO_REPLY = "Failed to obtain answer via API"  # what VLMEvalKit stores where a request failed
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def llava_letter(answer: str) -> str | None:
    """Return the letter that LLaVA's ScienceQA script finds; None where it fails."""
    letters = "ABCDE"
    if answer in letters and len(answer) == 1:
        return answer
    if len(answer) >= 3 and answer[0] in letters and answer[1:3] == ". ":
        return answer[0]
    found = _LLAVA_STATED.findall(answer)
    return found[0] if len(found) == 1 else None


def vlmevalkit_letter(answer: str, choices: Mapping[str, str]) -> str:
    """Return the letter that VLMEvalKit finds without a judge.

    Args:
        answer: Any text.
        choices: Letter to the text of the choice.
    Returns:
        letter: One of the choices, or ``Z``.
    """
    if any(refusal in answer for refusal in _REFUSALS):
        return NO_LETTER
    if _NO_REPLY not in answer and (letter := _named_letter(answer, choices)):
        return letter
    lower = answer.lower()
    if len(lower) <= 2 * sum(len(choice) for choice in choices.values()):
        quoted = [letter for letter, choice in choices.items() if choice.lower() in lower]
        if len(quoted) == 1:
            return quoted[0]
    return NO_LETTER


def names_no_choice(reply: str) -> bool:
    """Return whether a judge's reply says that an answer is none of the choices, with the letter Z
    alone.
    """
    return reply.translate(_SEPARATORS).split() == [NO_LETTER]


def _named_letter(answer: str, choices: Mapping[str, str]) -> str | None:
    """Return the only letter among the last words, or the stated one; None without either."""
    words = answer.translate(_SEPARATORS).split()
    named = [letter for letter in choices if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - _LAST_WORDS:
        return named[0]
    if not named and NO_LETTER in words:
        return NO_LETTER
    stated = _STATED.search(answer)
    return stated.group(1).upper() if stated and stated.group(1).upper() in choices else None
