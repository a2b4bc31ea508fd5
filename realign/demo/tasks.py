"""The tasks that the built-in model is pretrained on: describe an image, answer a question,
complete a masked answer, mask an answer.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import NamedTuple

from realign.building.masking.lexicon import Lexicon
from realign.building.masking.masks import mask_by_rule
from realign.building.prompts import completion_request, masking_request
from realign.demo.world import DESCRIBE, KINDS, Scene, question

LEXICON_PATH = Path(__file__).with_name("lexicon.yaml")
LOCATION_SHARE, QUESTION_SHARE = 0.25, 0.4


class Example(NamedTuple):
    """One turn: an image, the user's prompt and the model's answer."""

    scene: Scene
    prompt: str
    answer: str


def question_pair(scene: Scene, rng: Random) -> tuple[str, str]:
    """Draw a yes/no question and its answer; the object is present with probability 1/2."""
    present = rng.random() < 0.5
    kind = rng.choice(
        sorted(scene.kinds) if present else [k for k in KINDS if k not in scene.kinds]
    )
    return question(kind), scene.answer(kind)


def location_pair(scene: Scene, rng: Random) -> tuple[str, str]:
    """Draw a question about the place of an object; the answer also names its colour."""
    thing = rng.choice(scene.things)
    return f"Where is the {thing.kind}?", f"The {thing.kind} {thing.place} is {thing.color}."


def pretraining_example(scene: Scene, lexicon: Lexicon, rng: Random) -> Example:
    """Draw a pretraining example: a description, a yes/no question or a location question.

    Location questions, which teach the model to look for the named object, are asked directly. The
    others are asked directly in 75 % of cases, as a completion of a masked answer in 18 %, and as
    the masking of an answer in 7 %.
    """
    kind = rng.random()
    if kind < LOCATION_SHARE:
        return Example(scene, *location_pair(scene, rng))
    instruction, answer = (
        question_pair(scene, rng)
        if kind < LOCATION_SHARE + QUESTION_SHARE
        else (DESCRIBE, scene.caption())
    )
    draw = rng.random()
    if draw < 0.75:
        return Example(scene, instruction, answer)
    if draw < 0.93:
        rate = rng.uniform(0.2, 1.0)
        rates = dict.fromkeys(("objects", "attributes", "relations", "polarity"), rate)
        masked = mask_by_rule(answer, lexicon, rates, rng)
        assert masked is not None, answer  # every sentence of the world names an object
        return Example(scene, completion_request(instruction, masked), answer)
    masked = mask_by_rule(answer, lexicon, {}, rng)
    assert masked is not None, answer
    return Example(scene, masking_request(answer), masked)
