"""The paper's algorithm by hand, on five images."""

from __future__ import annotations

import io
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image

from realign.building.acceptance import REASONS, Acceptance
from realign.building.induction import Candidate, Outcome, attach, induce
from realign.building.masking.lexicon import Lexicon
from realign.building.masking.masker import Masked, MaskRules, mask_rows
from realign.building.prompts import COMPLETION_PROMPT
from realign.building.similarity import load_similarity
from realign.data.formats.source_row import SourceRow
from realign.data.lexical import lexical
from realign.demo.drawing import draw
from realign.demo.world import free_scene
from realign.generation.generator import Answer, Request
from realign.modeling.loading import load_model
from realign.modeling.processors import load_processor

RULES = MaskRules("rule", Lexicon({"objects": ["dog", "cat"], "attributes": ["red"]}), {}, seed=0)


def row(path: Path, answer: str = "A red dog sits on it.", rejected: str = "") -> SourceRow:
    prompt = ({"role": "user", "content": f"What is on {path.stem}?"},)
    return SourceRow(path.stem, path.name, path, prompt, answer, rejected)


def acceptance(**options: Any) -> Acceptance:
    settings = {"similarity": load_similarity("lexical"), "threshold": 0.95, "keep_unmasked": True}
    return Acceptance(**(settings | {"special": ("</s>",)} | options))


def always(prompt: str, image: Path) -> bool:
    return True


class Scripted:
    """Says what the script has for a question and an image; notes what it was asked, in order."""

    def __init__(self, script: dict[tuple[str, str], Answer]) -> None:
        self.script, self.asked = script, []

    def __call__(self, requests: list[Request]) -> list[Answer]:
        asked = [(prompt.splitlines()[0], image.name) for prompt, image, _ in requests]
        self.asked += asked
        return [self.script[one] for one in asked]


@pytest.fixture
def five_images(tmp_path: Path) -> list[Path]:
    rng, paths = Random(5), [tmp_path / f"{i}.png" for i in range(5)]
    for path in paths:
        draw(free_scene(rng)).save(path)
    return paths


def ranked(paths: list[Path], model_dir: Path) -> list[list[Candidate]]:
    """For each image the four others by cosine of real embeddings, by the definition."""
    model = load_model(model_dir, torch.float32, scoring=False)
    processor = load_processor(model_dir)
    images = [Image.open(io.BytesIO(path.read_bytes())).convert("RGB") for path in paths]
    inputs = processor.image_processor(images=images, return_tensors="pt")
    with torch.inference_mode():
        features = model.get_image_features(**inputs).pooler_output
    vectors = [tokens.mean(0) for tokens in features]
    order = []
    for i, vector in enumerate(vectors):
        cosines = {
            j: float(torch.cosine_similarity(vector, vectors[j], dim=0))
            for j in range(len(paths))
            if j != i
        }
        best_first = sorted(cosines, key=lambda j: -cosines[j])
        order.append(
            [
                Candidate(paths[j].name, paths[j], rank, cosines[j])
                for rank, j in enumerate(best_first, start=1)
            ]
        )
    return order


PROBLEM = "the server refused it"
# What the model says of each row's candidates, best first; rows by image.
REPLIES = [
    [
        Answer("A", is_cut=True),
        Answer(""),
        Answer("A [MASK] dog sits on it."),
        Answer("A red cat sits on it."),
    ],
    [
        Answer("A </s>"),
        Answer("I'm sorry, I cannot see the image."),
        Answer(COMPLETION_PROMPT),
        Answer("Sure! A cat."),
    ],
    [
        Answer("A red dog sits on it"),
        Answer("The red cat sits on it."),
        Answer("Sure, here is the completed sentence: A big cat sits on it."),
    ],
    [Answer("A red, red dog sits on it."), Answer("A tan cat sits on it.")],
    [
        Answer("", problem=PROBLEM),
        Answer("A " + "very " * 20 + "big cat sits on it."),
        Answer("A - - sits on it."),
        Answer("A red red red red cat sits on it."),
    ],
]


def test_induction_follows_the_algorithm_of_the_paper(
    five_images: list[Path], model_dir: Path
) -> None:
    """Candidates in order of cosine, self excluded; the first whose completion differs enough is
    accepted and becomes v_l, the rest are never asked; where none passes the row is dropped.
    """
    rows = [row(path) for path in five_images]
    order = ranked(five_images, model_dir)
    assert len({tuple(image.name for image in images) for images in order}) == 5
    for one, images in zip(rows, order, strict=True):
        assert one.image not in {image.name for image in images}
        assert [image.cosine for image in images] == sorted(
            (image.cosine for image in images), reverse=True
        )
    generator = Scripted(
        {
            (one.instruction, image.name): reply
            for one, images, replies in zip(rows, order, REPLIES, strict=True)
            for image, reply in zip(images, replies, strict=False)
        }
    )
    masked = mask_rows(rows, RULES, None, always)
    assert masked == [Masked("A [MASK] [MASK] sits on it.", "rule")] * 5

    passes = acceptance(threshold=0.8, min_length_ratio=0.7)
    outcomes = induce(rows, masked, order, passes, generator, always)

    accepted = [(outcome.completion, outcome.rank, outcome.reason) for outcome in outcomes]
    assert accepted == [
        ("A red cat sits on it.", 4, ""),
        ("", 0, "no candidate passed, mostly special token"),
        ("A big cat sits on it.", 3, ""),
        ("A tan cat sits on it.", 2, ""),
        ("A red red red red cat sits on it.", 4, ""),
    ]
    for outcome, images, replies in zip(outcomes, order, REPLIES, strict=True):
        tried = [attempt["image"] for attempt in outcome.refused]
        if outcome.image:
            v_l = images[outcome.rank - 1]
            assert (outcome.image, outcome.cosine) == (v_l.name, round(v_l.cosine, 6))
            assert outcome.similarity == round(lexical(rows[0].answer, outcome.completion), 6)
            tried.append(outcome.image)
        assert tried == [image.name for image in images[: len(replies)]]
    refused = [attempt["reason"] for outcome in outcomes for attempt in outcome.refused]
    assert sorted(refused) == sorted([*REASONS, PROBLEM])  # each reason once
    # turn by turn: every row's nearest image first, then the next of those that still wait
    questions = [one.instruction for one in rows]
    turns = [
        questions,
        questions,
        [questions[i] for i in (0, 1, 2, 4)],
        [questions[i] for i in (0, 1, 4)],
    ]
    assert [question for question, _ in generator.asked] == [q for turn in turns for q in turn]


def test_a_refused_candidate_is_recorded_with_its_details(five_images: list[Path]) -> None:
    images = [Candidate("1.png", five_images[1], 1, 0.87654321)]
    replies = {("What is on 0?", "1.png"): Answer("The red dog sits on it.")}
    rows = [row(five_images[0])]
    masked = mask_rows(rows, RULES, None, always)
    (outcome,) = induce(rows, masked, [images], acceptance(), Scripted(replies), always)
    assert outcome.as_row()["refused"] == [
        {
            "image": "1.png",
            "rank": 1,
            "cosine": 0.876543,
            "reason": "unmasked words changed",
            "completion": "The red dog sits on it.",
            "similarity": 1.0,
        }
    ]


def candidates(paths: list[Path]) -> list[Candidate]:
    return [Candidate(path.name, path, i, 1 - i / 10) for i, path in enumerate(paths, start=1)]


def test_a_candidate_that_makes_the_prompt_too_long_is_skipped(five_images) -> None:
    rows = [row(five_images[0])]
    replies = {("What is on 0?", "2.png"): Answer("A red cat sits on it.")}
    masked = mask_rows(rows, RULES, None, always)
    (outcome,) = induce(
        rows, masked, [candidates(five_images[1:])], acceptance(), Scripted(replies),
        lambda prompt, image: image.name != "1.png",
    )  # fmt: skip
    assert (outcome.image, outcome.rank) == ("2.png", 2)
    (attempt,) = outcome.refused
    assert (attempt["reason"], attempt["rank"]) == ("prompt longer than max_length", 1)
    assert (attempt["completion"], attempt["similarity"]) == ("", 0.0)


def test_rows_without_masks_or_candidates_are_dropped_with_the_reason(five_images) -> None:
    rows = [row(five_images[0], "Nothing."), row(five_images[1])]
    masked = mask_rows(rows, RULES, None, always)
    order = [candidates(five_images[1:]), []]
    first, second = induce(rows, masked, order, acceptance(), Scripted({}), always)
    assert (first.masked_by, first.reason, first.refused) == ("rule", "nothing to mask", [])
    assert (second.reason, second.refused) == ("no candidate", [])


def test_the_result_does_not_depend_on_how_rows_are_grouped(tmp_path: Path) -> None:
    rng = Random(1)
    paths = [tmp_path / f"{i}.png" for i in range(20)]
    answers = ["A red dog sits on it.", "A red cat sits on it.", "", "A [MASK]", "The cat.", "A"]
    rows = [row(path) for path in paths]
    order = [candidates(rng.sample(paths, rng.randint(0, 6))) for _ in rows]
    script = {(one.instruction, p.name): Answer(rng.choice(answers)) for one in rows for p in paths}

    def run(size: int) -> list[Any]:
        outcomes = []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            masked = mask_rows(part, RULES, None, always)
            outcomes += induce(
                part, masked, order[start : start + size], acceptance(), Scripted(script), always
            )
        return outcomes

    whole = run(20)
    assert 0 < sum(bool(outcome.image) for outcome in whole) < 20
    assert run(1) == run(7) == whole


def test_pairs_with_both_answers_get_only_a_retrieved_image(five_images) -> None:
    rows = [
        row(five_images[0], rejected="A red cat sits."),
        row(five_images[1], rejected="A red dog sits on it."),
    ]
    first, second = attach(rows, [candidates(five_images[1:]), []], load_similarity("lexical"))
    assert (first.image, first.rank, first.cosine) == ("1.png", 1, 0.9)
    assert (first.completion, first.reason, first.refused) == ("A red cat sits.", "", [])
    assert first.similarity == round(lexical(rows[0].answer, rows[0].rejected), 6)
    assert (first.masked, first.masked_by) == ("", "")
    assert (second.image, second.completion, second.reason) == ("", "", "no candidate")
    assert attach([], [], load_similarity("lexical")) == []


def test_rows_with_and_without_a_rejected_answer_share_a_group(five_images) -> None:
    rows = [row(five_images[0], rejected="A red cat sits."), row(five_images[1])]
    order = [candidates(five_images[1:]), candidates(five_images[2:])]
    replies = {("What is on 1?", "2.png"): Answer("A tan cat sits on it.")}
    masked = mask_rows(rows, RULES, None, always)
    first, second = induce(rows, masked, order, acceptance(), Scripted(replies), always)
    assert [first] == attach(rows[:1], order[:1], load_similarity("lexical"))
    assert (second.completion, second.image) == ("A tan cat sits on it.", "2.png")


def test_a_similarity_that_is_not_a_number_is_null_in_files() -> None:
    outcome = Outcome("0", similarity=float("nan"))
    outcome.refuse(Candidate("b", Path("b"), 1, 0.5), "too similar", "A cat.", float("nan"))
    row = outcome.as_row()
    assert (row["similarity"], row["refused"][0]["similarity"]) == (None, None)
    assert row["refused"][0]["cosine"] == 0.5
