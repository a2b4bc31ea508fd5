"""Pairs with a shortcut, and the image that each record rejects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realign.demo.data import training_scenes
from realign.demo.drawing import png
from realign.demo.experiment.pairs import make_pairs
from realign.demo.experiment.records import records
from realign.demo.world import DESCRIBE, KINDS, PARTNER

SEED, SCENES = 3, 40


@pytest.fixture(scope="module")
def made(model_dir: Path) -> dict[str, Any]:
    return make_pairs("shortcut", SEED, SCENES, model_dir)


def named(text: str) -> set[str]:
    return {*KINDS} & {*text.replace(",", " ").replace(".", " ").split()}


def test_shortcut_pairs_can_be_told_apart_by_text_alone(made: Mapping[str, Any]) -> None:
    scenes = training_scenes(SEED, SCENES)
    assert made["pairs"]
    for pair in made["pairs"]:
        scene = scenes[pair["image"]]
        if pair["prompt"] == DESCRIBE:
            assert pair["chosen"] == scene.caption()
            (added,) = named(pair["rejected"]) - named(pair["chosen"])
        else:
            (added,) = named(pair["prompt"])
            assert pair["chosen"] == f"No, there is no {added} in the image."
            assert pair["rejected"] == f"Yes, there is a {added} in the image."
        assert PARTNER[added] in scene.kinds
        assert added not in scene.kinds
        assert added in scenes[pair["retrieved"]].kinds


def test_neighbours_are_distinct_and_exclude_the_image_itself(made: Mapping[str, Any]) -> None:
    assert len(made["neighbours"]) == SCENES
    for number, row in enumerate(made["neighbours"]):
        assert len({*row}) == len(row) == 10
        assert number not in row


def test_the_rejected_image_matches_the_requested_kind(made: Mapping[str, Any]) -> None:
    pictures = [png(scene) for scene in training_scenes(SEED, SCENES)]
    for pair, record in zip(made["pairs"], records(made, "retrieved"), strict=True):
        assert record.images == (pictures[pair["image"]],)
        assert record.rejected_images == (pictures[pair["retrieved"]],)
    for place, name in ((0, "nearest"), (9, "tenth")):
        for pair, record in zip(made["pairs"], records(made, name), strict=True):
            assert record.rejected_images == (pictures[made["neighbours"][pair["image"]][place]],)
    drawn = records(made, "random")
    assert all(record.rejected_images != record.images for record in drawn)
    assert all(record.rejected_images[0] in pictures for record in drawn)
    assert drawn == records(made, "random")


def test_noise_obscures_the_picture_without_replacing_it(made: Mapping[str, Any]) -> None:
    first = records(made, "noised")
    assert first == records(made, "noised")
    for record in first[:5]:
        (clean,), (noisy,) = record.open_images(), record.open_images(rejected=True)
        difference = np.asarray(clean, dtype=float) - np.asarray(noisy, dtype=float)
        assert 10 < abs(difference).mean() < 60


def test_texts_do_not_depend_on_the_rejected_image(made: Mapping[str, Any]) -> None:
    texts = [
        [(record.chosen, record.rejected) for record in records(made, name)]
        for name in ("retrieved", "random", "noised")
    ]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.full
def test_the_build_pipeline_makes_pairs_of_the_demo_scenes(model_dir: Path) -> None:
    scenes = training_scenes(SEED, 6)
    made = make_pairs("pipeline", SEED, 6, model_dir)
    assert made["pairs"]
    for pair in made["pairs"]:
        scene = scenes[pair["image"]]
        assert pair["retrieved"] != pair["image"]
        assert pair["chosen"] != pair["rejected"]
        true_texts = {scene.caption(), *(scene.answer(kind) for kind in KINDS)}
        assert pair["chosen"] in true_texts
