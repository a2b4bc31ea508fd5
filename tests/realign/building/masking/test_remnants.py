"""Remnants of masks in completions are found, and text that only looks like them is not."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
import yaml

from realign.building.acceptance import has_unfilled
from realign.building.masking.remnants import remnants
from realign.building.prompts import completion_request
from realign.demo.drawing import draw
from realign.demo.world import DESCRIBE, free_scene
from realign.generation.generator import Request
from realign.generation.transformers_generator import TransformersGenerator

KINDS = yaml.safe_load(Path(__file__).with_name("remnants.yaml").read_text(encoding="utf-8"))
ANSWER = "A red dog sits on a couch."


@pytest.mark.parametrize("kind", KINDS["remnants"])
def test_remnants_of_masks_are_found(kind: str) -> None:
    texts = KINDS["remnants"][kind]
    assert [text for text in texts if not has_unfilled(text, ANSWER)] == []


@pytest.mark.parametrize("kind", KINDS["prose"])
def test_ordinary_prose_has_no_remnants(kind: str) -> None:
    assert {text: found for text in KINDS["prose"][kind] if (found := remnants(text))} == {}


def test_remnants_and_prose_have_at_least_100_examples_each() -> None:
    for group in KINDS.values():
        assert len({text for texts in group.values() for text in texts}) >= 100


def test_mask_like_text_of_the_answer_is_not_a_remnant() -> None:
    form = "A form with ____ and [object] on it."
    assert remnants(form)
    assert not has_unfilled("A form with ____ and [object] under it.", form)
    assert has_unfilled("A ____ with ____ and [object] under it.", form)
    assert has_unfilled("A [MASK with [object] on it.", form)


def test_remnants_in_completions_of_the_embedded_model_are_found(
    tmp_path: Path, model_dir: Path
) -> None:
    """Sentences unlike those that it knows make it write pieces of masks."""
    masked = [
        "A [MASK] with a slice of [MASK], a [MASK] and a glass of [MASK] [MASK] [MASK] on a table.",
        "A large white truck is parked [MASK] a brick building with [MASK] [MASK].",
        "A [MASK] [MASK] [MASK] is [MASK] [MASK] a [MASK] [MASK] with [MASK] [MASK].",
        "The [MASK] has a [MASK] refrigerator, a [MASK] on the [MASK] and [MASK] walls.",
    ]
    requests = []
    for number in range(3):
        draw(free_scene(Random(number))).save(tmp_path / f"{number}.png")
        path = tmp_path / f"{number}.png"
        requests += [Request(completion_request(DESCRIBE, text), path) for text in masked]
    answers = TransformersGenerator.load(model_dir, torch.float32, 40, 12)(requests)
    has_piece = [any(mark in answer.text for mark in ("[", "]", "MASK")) for answer in answers]
    assert 0 < sum(has_piece) < len(answers)
    assert [has_unfilled(answer.text, ANSWER) for answer in answers] == has_piece


@pytest.mark.parametrize(
    "unit",
    [
        *(
            "[",
            "]",
            "[MASK ",
            "MASK ",
            "maskmask",
            "mask ",
            "_",
            "_ ",
            "<mask",
            "<mask ",
            "( ",
            "()",
        ),
        *(
            ". ",
            "- ",
            " ....",
            "[a ",
            "[]",
            "<> ",
            "\\",
            "\u200b",
            '"MASK" ',
            "says ",
            "A ",
            "MASK\n",
        ),
    ],
)
def test_long_completions_are_read_without_backtracking(unit: str) -> None:
    remnants(unit * (20000 // len(unit)))
    remnants("[" * 9000 + unit + "]" * 9000)
    remnants(f"[{unit.replace(']', '') * (20000 // len(unit))}]")
