"""Measures against counting by hand and by brute force."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest

from realign.demo.experiment.scenes import Draw, Question
from realign.demo.experiment.scores import ModelAnswers, area_under_curve, object_f1, scores
from realign.demo.world import PARTNER, Scene, Thing


def brute_force(values: list[float], labels: list[int]) -> float:
    pairs = [
        (1.0 if yes > no else 0.5 if yes == no else 0.0)
        for (yes, is_yes), (no, is_no) in itertools.product(
            zip(values, labels, strict=True), repeat=2
        )
        if is_yes and not is_no
    ]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("seed", range(20))
def test_the_area_under_the_curve_equals_a_count_of_pairs(seed: int) -> None:
    rng = random.Random(seed)
    values = [rng.choice([rng.gauss(0, 1), 0.0, 1.0]) for _ in range(40)]
    labels = [0, 1, *(rng.randrange(2) for _ in range(38))]
    area = area_under_curve(np.array(values), np.array(labels))
    assert area == pytest.approx(brute_force(values, labels))


def test_weights_equal_repeated_questions() -> None:
    rng = random.Random(7)
    values, labels = [rng.gauss(0, 1) for _ in range(30)], [0, 1] * 15
    times = [rng.randrange(4) for _ in range(30)]
    repeated = [at for at, count in enumerate(times) for _ in range(count)]
    weighted = area_under_curve(np.array(values), np.array(labels), np.array(times))
    expected = brute_force([values[at] for at in repeated], [labels[at] for at in repeated])
    assert weighted == pytest.approx(expected)


def test_the_area_under_the_curve_requires_both_labels() -> None:
    assert math.isnan(area_under_curve(np.array([1.0, 2.0]), np.array([1, 1])))
    assert math.isnan(area_under_curve(np.zeros(0), np.zeros(0)))


def draw_of(scenes: list[Scene], questions: list[Question]) -> Draw:
    draw = Draw(0, 0)
    draw.scenes = {"free": scenes}
    draw.questions = {"free": questions}
    return draw


# a couple (house and tree) and a lone cup; a lone key
SCENES = [
    Scene((Thing("house", "red", 0), Thing("tree", "green", 1), Thing("cup", "blue", 2)), 0),
    Scene((Thing("key", "red", 4),), 1),
]
CAPTIONS = [
    {"text": "There is a red house at the top left and a blue plate on the left.", "is_cut": False},
    {"text": "There is a red key in the middle and a black star", "is_cut": True},
]
QUESTIONS = [
    Question(0, "house", "yes", ("random", "adversarial")),
    Question(0, "plate", "no", ("adversarial",)),
    Question(0, "fish", "no", ("random",)),
    Question(1, "key", "yes", ("random",)),
]
ANSWERS = [("Yes", 2.0), ("Yes", 3.0), ("No", -1.0), ("No", -2.0)]


def example_answers() -> ModelAnswers:
    answers = [{"text": text, "log_odds": odds} for text, odds in ANSWERS]
    one: dict[str, Any] = {"captions": {"free": CAPTIONS}, "answers": {"free": answers}}
    return ModelAnswers.of([draw_of(SCENES, QUESTIONS)], [one | {"divergence": 1.5}])


def test_scores_equal_counts_by_hand() -> None:
    found = scores(example_answers())
    # named: house, plate; key, star. Absent: plate, star. There: house, tree, cup, key.
    assert found["free.chair_i"] == 2 / 4
    assert found["free.chair_s"] == 1.0
    assert found["free.recall"] == 2 / 4
    assert found["free.recall_coupled"] == 1 / 2
    assert found["free.recall_lone"] == 1 / 2  # the key, not the cup
    assert found["free.partner"] == 1 / 2  # the plate of the cup, not the lock of the key
    assert found["free.words"] == (16 + 12) / 2
    assert found["free.cut"] == 1 / 2
    assert found["free.random.accuracy"] == pytest.approx(2 / 3)
    assert found["free.random.yes"] == pytest.approx(1 / 3)
    assert found["free.random.auc"] == 1 / 2  # 2 above -1, -2 below it
    assert found["free.adversarial.accuracy"] == 1 / 2
    assert found["free.adversarial.auc"] == 0.0
    assert math.isnan(found["free.popular.auc"])
    assert found["kl"] == 1.5
    assert object_f1(found) == 0.5


def test_scores_are_weighted_by_image() -> None:
    found = scores(example_answers(), {"free": np.array([0.0, 2.0])})
    assert found["free.chair_i"] == 1 / 2
    assert found["free.recall"] == 1.0
    assert found["free.random.accuracy"] == 0.0


def test_draws_are_pooled_by_image() -> None:
    draws = [draw_of(SCENES, QUESTIONS), draw_of(SCENES[:1], QUESTIONS[:2])]
    answers = [{"text": text, "log_odds": odds} for text, odds in ANSWERS]
    pooled = ModelAnswers.of(
        draws,
        [
            {"captions": {"free": CAPTIONS}, "answers": {"free": answers}, "divergence": 1.0},
            {
                "captions": {"free": CAPTIONS[:1]},
                "answers": {"free": answers[:2]},
                "divergence": 2.0,
            },
        ],
    )
    assert pooled.counts["free"].shape[0] == 3
    assert pooled.odds["free.adversarial"][2].tolist() == [0, 0, 2, 2]
    assert scores(pooled)["kl"] == 1.5


def test_a_draw_has_the_questions_of_pope() -> None:
    draw = Draw(3, 60)
    for question in draw.questions["free"]:
        scene = draw.scenes["free"][question.scene]
        assert (question.kind in scene.kinds) == (question.label == "yes")
        if question.label == "no" and "adversarial" in question.splits:
            assert PARTNER[question.kind] in scene.kinds
    for split in ("random", "popular", "adversarial"):
        labels = [one.label for one in draw.questions["free"] if split in one.splits]
        assert labels.count("yes") == labels.count("no") > 0
    partners = [one.label for one in draw.questions["half"]]
    assert 0.3 < partners.count("yes") / len(partners) < 0.8
    again = Draw(3, 60)
    assert (draw.scenes, draw.questions) == (again.scenes, again.questions)
    assert draw.scenes != Draw(4, 60).scenes


def test_an_empty_caption_has_an_undefined_chair() -> None:
    found = scores(example_answers(), {"free": np.zeros(2)})
    assert math.isnan(found["free.chair_i"])
    assert object_f1(found) == 0.0
