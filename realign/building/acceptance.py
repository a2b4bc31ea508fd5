"""The decision whether a completion is a rejected answer, with the reason if it is not.

The checks come in a fixed order and the first that fails is the reason, so counts of reasons can be
compared between runs: what the generator says of itself, what is no answer at all, what is an
answer to something else, what is not the masked answer refilled, what differs too little.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from realign.building.masking.masks import fits_mask
from realign.building.masking.remnants import remnants
from realign.building.similarity import Similarity
from realign.building.speech import chats, echoes, refuses, words
from realign.data.formats.source_row import SourceRow
from realign.data.records import IMAGE_TOKEN
from realign.generation.generator import Answer

CUT = "cut at max_new_tokens"
EMPTY = "empty"
UNFILLED = "mask left unfilled"
SPECIAL = "special token"
REFUSED = "refused to answer"
ECHO = "prompt echo"
CHATTER = "chatter"
IDENTICAL = "identical"
CHANGED = "unmasked words changed"
TOO_FEW_WORDS = "too few words"
TOO_MANY_WORDS = "too many words"
TOO_SIMILAR = "too similar"
# In the order of the checks; before them comes a generator's own problem, in its words.
REASONS = (
    CUT, EMPTY, UNFILLED, SPECIAL, REFUSED, ECHO, CHATTER, IDENTICAL, CHANGED, TOO_FEW_WORDS,
    TOO_MANY_WORDS, TOO_SIMILAR,
)  # fmt: skip


@dataclass(frozen=True)
class Acceptance:
    """Settings of acceptance.

    Attributes:
        similarity: Compares answers with completions.
        threshold: Completions as similar as this or more are refused (tau of the paper).
        keep_unmasked: Refuse completions that changed a word outside the mask.
        special: The model's special tokens.
        min_length_ratio: Fewest words of a completion, relative to the answer's.
        max_length_ratio: Most words.
    """

    similarity: Similarity
    threshold: float
    keep_unmasked: bool
    special: tuple[str, ...] = ()
    min_length_ratio: float = 1 / 3
    max_length_ratio: float = 3.0


def refusal(
    row: SourceRow, masked: str, completed: Answer, similarity: float, acceptance: Acceptance
) -> str:
    """Return why a completion is not a rejected answer, one of ``REASONS`` or the generator's own
    problem; empty when it is one.

    Args:
        row: What was answered well.
        masked: The masked answer.
        completed: Answer of the generator, unwrapped.
        similarity: Of the answer and the completion.
        acceptance: What passes.
    """
    answer, completion = row.answer, completed.text
    if completed.problem:
        return completed.short_problem
    if completed.is_cut:
        # half a sentence is a worse answer for a reason that has nothing to do with the image
        return CUT
    if not completion:
        return EMPTY
    if has_unfilled(completion, answer):
        return UNFILLED
    if any(token in completion for token in (*acceptance.special, IMAGE_TOKEN) if token):
        return SPECIAL  # written out in ordinary tokens; training would refuse the row
    if refuses(completion, answer):
        return REFUSED
    if echoes(completion, answer, row.instruction):
        return ECHO
    if chats(completion, answer):
        return CHATTER
    said_words, good_words = words(completion), words(answer)
    if completion == answer or (said_words and said_words == good_words):
        return IDENTICAL
    if acceptance.keep_unmasked and not fits_mask(masked, completion):
        return CHANGED
    if len(said_words) < acceptance.min_length_ratio * len(good_words):
        return TOO_FEW_WORDS
    if good_words and len(said_words) > acceptance.max_length_ratio * len(good_words):
        return TOO_MANY_WORDS
    return "" if similarity < acceptance.threshold else TOO_SIMILAR  # not a number is too


def has_unfilled(completion: str, answer: str) -> bool:
    """Return whether a completion has more remnants of masks than the answer has."""
    return bool(Counter(remnants(completion)) - Counter(remnants(answer)))
