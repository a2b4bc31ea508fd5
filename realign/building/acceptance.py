"""The decision whether a completion is a rejected answer, with the reason if it is not.

The checks have a fixed order and the first one that fails is the reason, so that counts of reasons
can be compared between runs: problems that the generator reports, completions that are no answer or
answer something else, those that are not the masked answer refilled, those that differ too little.
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
# in the order of the checks; a problem that the generator reports comes before them, in its words
REASONS = (
    CUT, EMPTY, UNFILLED, SPECIAL, REFUSED, ECHO, CHATTER, IDENTICAL, CHANGED, TOO_FEW_WORDS,
    TOO_MANY_WORDS, TOO_SIMILAR,
)  # fmt: skip


@dataclass(frozen=True)
class Acceptance:
    """Settings of acceptance.

    Attributes:
        similarity: Function that compares answers with completions.
        threshold: Similarity at and above which completions are refused (tau in the paper).
        keep_unmasked: Whether to refuse completions that changed a word outside the masks.
        special: The model's special tokens.
        min_length_ratio: Smallest number of words of a completion, relative to the answer's.
        max_length_ratio: Largest number of words of a completion, relative to the answer's.
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
    """Return the reason why a completion cannot be the rejected answer: one of ``REASONS``, or the
    generator's own problem. Return an empty text if it can.

    Args:
        row: The row, with its good answer.
        masked: The masked answer.
        completed: Answer of the generator, unwrapped.
        similarity: Similarity of the answer and the completion.
        acceptance: Settings of acceptance.
    """
    answer, completion = row.answer, completed.text
    if completed.problem:
        return completed.short_problem
    if completed.is_cut:
        # half a sentence would be a worse answer for reasons other than the image
        return CUT
    if not completion:
        return EMPTY
    if has_unfilled(completion, answer):
        return UNFILLED
    if any(token in completion for token in (*acceptance.special, IMAGE_TOKEN) if token):
        return SPECIAL  # spelled in ordinary tokens; training would refuse the row
    if refuses(completion, answer):
        return REFUSED
    if echoes(completion, answer, row.instruction):
        return ECHO
    if chats(completion, answer):
        return CHATTER
    completion_words, answer_words = words(completion), words(answer)
    if completion == answer or (completion_words and completion_words == answer_words):
        return IDENTICAL
    if acceptance.keep_unmasked and not fits_mask(masked, completion):
        return CHANGED
    if len(completion_words) < acceptance.min_length_ratio * len(answer_words):
        return TOO_FEW_WORDS
    if answer_words and len(completion_words) > acceptance.max_length_ratio * len(answer_words):
        return TOO_MANY_WORDS
    return "" if similarity < acceptance.threshold else TOO_SIMILAR  # also for NaN


def has_unfilled(completion: str, answer: str) -> bool:
    """Return whether a completion has more remnants of masks than the answer has."""
    return bool(Counter(remnants(completion)) - Counter(remnants(answer)))
