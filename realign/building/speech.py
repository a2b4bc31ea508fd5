"""Recognition of completions in which a chat model talks about the task instead of doing it:
refusals, chatter, and echoes of the prompt.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from pathlib import Path

import yaml

from realign.building.masking.sentences import WORD
from realign.building.prompts import COMPLETION_PROMPT, MASK_PROMPT
from realign.runtime.files import read_utf8

PHRASES = Path(__file__).with_name("refusals.yaml")
# parts of prompts that no description contains by chance
_ECHOES = (
    COMPLETION_PROMPT,
    MASK_PROMPT,
    "complete the following sentence",
    "filling in the masked segments",
    "by replacing them with [MASK]",
)
MIN_ECHO_WORDS = 4  # an instruction such as "What is it?" may begin an answer


def words(text: str) -> list[str]:
    """Return the words of a text in folded case, without punctuation and compatibility forms."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def refuses(completion: str, answer: str) -> bool:
    """Return whether a sentence of ``completion``, but none of ``answer``, begins as a refusal."""
    return _begins(_phrases("refusals"), completion, answer)


def chats(completion: str, answer: str) -> bool:
    """Return whether a sentence of ``completion``, but none of ``answer``, begins with talk about
    the task.
    """
    return _begins(_phrases("chatter"), completion, answer)


def echoes(completion: str, answer: str, instruction: str) -> bool:
    """Return whether ``completion``, but not ``answer``, repeats a prompt of the pipeline or begins
    with the instruction.
    """
    text, good = f" {' '.join(words(completion))} ", f" {' '.join(words(answer))} "
    for echo in _ECHOES:
        part = f" {' '.join(words(echo))} "
        if part in text and part not in good:
            return True
    asked = words(instruction)
    beginning = f" {' '.join(asked)} "
    return (
        len(asked) >= MIN_ECHO_WORDS
        and text.startswith(beginning)
        and not good.startswith(beginning)
    )


def _begins(phrases: re.Pattern[str], completion: str, answer: str) -> bool:
    def begun(text: str) -> set[str]:
        return {match.group().casefold() for match in phrases.finditer(text.replace("’", "'"))}

    return bool(begun(completion) - begun(answer))


@functools.cache
def _phrases(kind: str) -> re.Pattern[str]:
    data = yaml.safe_load(read_utf8(PHRASES))
    phrases = data[kind]
    if kind == "refusals":
        phrases = phrases + [
            f"{unable} {task}" for unable in data["unable"] for task in data["tasks"]
        ]
    # at the beginning of a line or a sentence
    return re.compile(
        rf"(?:(?<![^\n])|(?<=[.!?] ))(?:{'|'.join(map(re.escape, phrases))})(?!\w)", re.IGNORECASE
    )
