"""The instructions that the embedded model knows: describe, answer, complete a masked answer, mask
an answer.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import NamedTuple

from realign.build.masking import Lexicon, mask_by_rule
from realign.build.prompts import completion_request, masking_request
from realign.demo.world import DESCRIBE, KINDS, Scene, question

LEXICON_PATH = Path(__file__).with_name("lexicon.yaml")


class Example(NamedTuple):
    """One turn: an image, what the user says, what the model should say."""

    scene: Scene
    prompt: str
    answer: str


def question_pair(scene: Scene, rng: Random) -> tuple[str, str]:
    """A yes/no question about an object, there or not with equal chance, and the true answer."""
    present = rng.random() < 0.5
    kind = rng.choice(
        sorted(scene.kinds) if present else [k for k in KINDS if k not in scene.kinds]
    )
    return question(kind), scene.answer(kind)


def location_pair(scene: Scene, rng: Random) -> tuple[str, str]:
    """Where an object is, and its colour; one in four is not there."""
    if rng.random() < 0.25:
        kind = rng.choice([k for k in KINDS if k not in scene.kinds])
        return f"Where is the {kind}?", f"There is no {kind} in the image."
    thing = rng.choice(scene.things)
    return f"Where is the {thing.kind}?", f"The {thing.color} {thing.kind} is {thing.place}."


def pretraining_example(
    scene: Scene,
    lexicon: Lexicon,
    rng: Random,
    question_share: float = 1 / 3,
    location_share: float = 0.0,
) -> Example:
    """Draw a description, a yes/no question or a location question, and how it is asked.

    Locations are asked plainly; the others 75 % plainly, 18 % as a completion, 7 % as a masking.
    """
    kind = rng.random()
    if 1 - question_share - location_share <= kind < 1 - question_share:
        return Example(scene, *location_pair(scene, rng))
    instruction, answer = (
        question_pair(scene, rng) if kind >= 1 - question_share else (DESCRIBE, scene.caption())
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
