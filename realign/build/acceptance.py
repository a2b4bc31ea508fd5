"""Whether a completion is a rejected answer, and if not, why."""

from __future__ import annotations

from dataclasses import dataclass

from realign.build.masking import fits_mask
from realign.build.prompts import MASK_TOKEN
from realign.build.similarity import Similarity
from realign.generate.answer import Answer
from realign.records import IMAGE_TOKEN


@dataclass(frozen=True)
class Acceptance:
    """Settings of acceptance.

    Attributes:
        similarity: Compares answers with completions.
        threshold: Completions as similar as this or more are refused (tau of the paper).
        keep_unmasked: Refuse completions that changed a word outside the mask.
        special: The model's special tokens.
    """

    similarity: Similarity
    threshold: float
    keep_unmasked: bool
    special: tuple[str, ...] = ()


def refusal(
    answer: str, masked: str, said: Answer, similarity: float, acceptance: Acceptance
) -> str:
    """Why a completion is not a rejected answer; empty when it is one."""
    completion = said.text
    if said.problem:
        return said.problem
    if said.is_cut:
        # half a sentence is a worse answer for a reason that has nothing to do with the image
        return "cut at max_new_tokens"
    if not completion:
        return "empty"
    if MASK_TOKEN in completion:
        return "mask left unfilled"
    if any(token in completion for token in (*acceptance.special, IMAGE_TOKEN) if token):
        return "special token"  # written out in ordinary tokens; training would refuse the row
    if completion == answer:
        return "identical"
    if acceptance.keep_unmasked and not fits_mask(masked, completion):
        return "unmasked words changed"
    if similarity >= acceptance.threshold:
        return "too similar"
    return ""
