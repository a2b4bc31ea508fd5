"""The letter of a multiple-choice answer, as several programs find it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

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
        choices: Texts of the choices by letter.
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


# what may stand around a letter, in the order in which lmms-eval looks for them
_AFFIXES = (
    *(("", suffix) for suffix in (".", ",", ":", ")", ").")),
    *(("(", suffix) for suffix in (")", ").")),
    *((":", suffix) for suffix in ("", ",", ".", ")", ").")),
)
_LETTERS = "ABCDE"  # also where a question has fewer choices
_STATEMENTS = (
    *(
        f"{the}{quality}{noun} is"
        for noun, qualities in (
            ("answer", ("", "correct ", "best ")),
            ("option", ("correct ", "best ")),
            ("choice", ("", "correct ")),
        )
        for quality in qualities
        for the in ("the ", "")
    ),
    *("my answer is", "my choice is", "i choose", "i select", "i pick"),
    *("\uc635\uc158", "\uc815\ub2f5\uc740", "\ub2f5\uc740", "\ub2f5:"),  # Korean
    *(
        "\u7b54\u6848\u662f",
        "\u7b54\u6848\u4e3a",
        "\u9009",
        "\u7b54\u3048\u306f",
    ),  # Chinese, Japanese
)


def lmms_letter(answer: str, choices: Mapping[str, str]) -> str:
    """Return the letter that lmms-eval's task ``mmbench_en_dev_static`` finds: one that stands
    alone, or the text of exactly one choice, or else the best of all letters of the answer.

    Args:
        answer: Any text.
        choices: Texts of the choices by letter.
    Returns:
        letter: A to E, or empty without one.
    """
    if letter := _lmms_alone(answer):
        return letter
    lower = answer.lower()
    quoted = [letter for letter, choice in choices.items() if choice.lower() in lower]
    return quoted[0] if len(quoted) == 1 else _lmms_ranked(answer, sorted(choices))


def _lmms_alone(answer: str) -> str | None:
    """Return the only letter that is a word, perhaps with marks around it."""
    if _NO_REPLY in answer:
        return None
    words = answer.split()
    if not ("A" in words and len(words) > 3):  # which is an article then
        alone = [letter for letter in _LETTERS if letter in words]
        if len(alone) == 1:
            return alone[0]
    for prefix, suffix in _AFFIXES:
        marked = [letter for letter in _LETTERS if prefix + letter + suffix in words]
        if len(marked) == 1:
            return marked[0]
    return None


def _lmms_ranked(answer: str, letters: Sequence[str]) -> str:
    """Return the letter in the most trusted form; of several in one form, the last."""
    text = answer.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    inner, text = text.strip(), f" {text} "
    found: list[tuple[int, int, str]] = []  # trust, position, letter
    for form, trust in (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2)):
        places = [(text.rfind(form.format(letter)), letter) for letter in letters]
        found += [(trust, place, letter) for place, letter in places if place >= 0]
    for statement in _STATEMENTS:
        start = text.lower().find(statement)
        if start >= 0:
            places = [(text.find(letter, start + len(statement)), letter) for letter in letters]
            found += [(7, place, letter) for place, letter in places if place >= 0]
    for letter in letters:
        if inner.startswith(letter) and not inner[1:2].isalpha():
            found.append((10, 0, letter))
        if inner.endswith(letter) and not inner[-2:-1].isalpha():
            found.append((9, len(text) - 1, letter))
    if not found:
        found = [(0, text.rfind(letter), letter) for letter in letters if letter in text]
    # the first of equals
    return max(found, key=lambda item: item[:2], default=(0, 0, ""))[2]
