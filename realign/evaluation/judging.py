"""Judges: the replies of a model that reads answers, the verdicts of rules from them, and the
requests to such a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from realign.errors import RefusedError
from realign.evaluation.rows import Row

REPLY = "judge_reply"  # field of answer files: a string, null, or a list of them
JUDGE = "judge"  # field of answer files: the model that was asked, and the prompt


class Reply(NamedTuple):
    """A reply of a judge about one answer."""

    text: str | None
    """Text of the reply; None without one."""
    model: str | None = None
    """Name of the judge; None where the file does not state it."""
    prompt: str | None = None
    """Name of the prompt; None where the file does not state it."""
    prompt_sha256: str | None = None


def stored_replies(record: Mapping[str, Any]) -> list[Reply]:
    """Return the replies that ``realign eval judge`` stored beside an answer, one for each grading;
    none where the record has no such field.

    Raises:
        RefusedError: The field is neither a string, nor null, nor a list of them.
    """
    if REPLY not in record:
        return []
    value = record[REPLY]
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str | None) for text in texts):
        raise RefusedError(
            f"{REPLY} must be a string, null, or a list of them, got {value!r:.80}. Correct it."
        )
    about = record.get(JUDGE)
    about = about if isinstance(about, dict) else {}
    stated = [about.get(name) for name in ("model", "prompt", "prompt_sha256")]
    return [Reply(text, *(s if isinstance(s, str) else None for s in stated)) for text in texts]


@dataclass(frozen=True)
class Judging:
    """The way a rule takes verdicts from a judge's replies. The rule then scores the verdict, a
    short text, in place of the answer.
    """

    verdict: Callable[[Row, str], str | None]
    """Map a row and a reply to the verdict; None leaves the answer unjudged."""
    worst: Callable[[Row], str]
    """The verdict with the lowest score, for the bounds if answers are unjudged."""
    best: Callable[[Row], str]
    """The verdict with the highest score."""
    fault: Callable[[str], str | None] = lambda reply: None
    """The verdict of the published program for a reply without one; None if the answer stays
    unjudged.
    """
    asks_about: Callable[[Row, str], bool] = lambda row, answer: True
    """Return whether a judge has to read an answer. Other answers are scored themselves."""


@dataclass(frozen=True)
class Judge:
    """The way a judge is asked about the answers to a benchmark."""

    placeholders: tuple[str, ...]
    """Names in the prompt, each of which stands for a text."""
    values: Callable[[Row, str], Mapping[str, str]]
    """Map a row and its answer to the text of every placeholder. If the benchmark's files lack the
    text of a placeholder, this project's text is used.

    Raises:
        RefusedError: The files of the benchmark lack a text that the judge must see.
    """
    rule: str
    """The rule whose reading decides whether a reply holds a verdict."""
    temperature: float
    max_tokens: int | None
    """Longest reply; None leaves it to the server."""
    tries: int = 3
    """The largest number of times a judge is asked for a reply that holds a verdict."""
    temperature_step: float = 0.0
    """The amount that every further try adds to the temperature."""
    reminder: str = ""
    """Text that every further try appends to the prompt."""


def required(row: Row, name: str) -> str:
    """Return a text of a row that a judge must see.

    Raises:
        RefusedError: The row does not have it.
    """
    value = row.get(name)
    if not isinstance(value, str):
        raise RefusedError(
            f"{row['where']} requires {name}, which the judge is shown, got {value!r:.40}. Take "
            "the published files."
        )
    return value


def constant(verdict: str) -> Callable[[Any], str]:
    """Return a function that returns one verdict for every row or reply."""
    return lambda value: verdict


def parsed(read: Callable[[str], str | None]) -> Callable[[Row, str], str | None]:
    """Return a function of a row and a reply that reads only the reply."""
    return lambda row, reply: read(reply)


Replies = Sequence[Reply]
