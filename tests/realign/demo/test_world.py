"""The drawn world: repeatable by seed, true, and biased as documented."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from realign.building.masking.lexicon import Lexicon
from realign.building.masking.masks import fits_mask, mask_by_rule
from realign.demo.data import write_eval_data, write_training_data
from realign.demo.drawing import draw
from realign.demo.tasks import LEXICON_PATH, pretraining_example
from realign.demo.world import (
    KINDS,
    PARTNER,
    Scene,
    Thing,
    absent_kinds,
    free_scene,
    habitual_scene,
    question,
)


def test_captions_name_partners_one_after_the_other() -> None:
    scene = Scene((Thing("tree", "red", 0), Thing("house", "blue", 8), Thing("cup", "black", 4)), 0)
    assert scene.caption() == (
        "There is a red tree at the top left, a blue house at the bottom right and a black cup "
        "in the middle."
    )
    assert scene.answer("cup") == "Yes, there is a cup in the image."
    assert scene.answer("key") == "No, there is no key in the image."
    assert question("key") == "Is there a key in the image?"


def partner_rate(scenes: list[Scene]) -> float:
    present = [PARTNER[thing.kind] in scene.kinds for scene in scenes for thing in scene.things]
    return sum(present) / len(present)


def test_partners_appear_together_only_in_habitual_scenes() -> None:
    rng = Random(0)
    assert 0.75 < partner_rate([habitual_scene(rng) for _ in range(2000)]) < 0.9
    assert partner_rate([free_scene(rng) for _ in range(2000)]) < 0.25


@pytest.mark.parametrize("make", [habitual_scene, free_scene])
def test_scenes_have_distinct_kinds_in_distinct_cells(make) -> None:
    rng = Random(1)
    for _ in range(500):
        scene = make(rng)
        assert len(scene.kinds) == len(scene.things)
        assert len({thing.cell for thing in scene.things}) == len(scene.things)


def test_absent_kinds_follow_the_split() -> None:
    scene = Scene((Thing("house", "red", 0), Thing("star", "red", 1)), 0)
    absent = absent_kinds(scene)
    assert absent["adversarial"] == ["tree", "moon"]
    assert absent["popular"] == ["tree", "boat", "fish"]
    assert len(absent["random"]) == len(KINDS) - 2


def test_every_kind_is_drawn_and_looks_different() -> None:
    pictures = {kind: draw(Scene((Thing(kind, "red", 4),), 0)).tobytes() for kind in KINDS}
    assert len(set(pictures.values())) == len(KINDS)


def test_pretraining_masks_fit_their_answers() -> None:
    rng, lexicon = Random(0), Lexicon.load(LEXICON_PATH)
    examples = [pretraining_example(habitual_scene(rng), lexicon, rng) for _ in range(300)]
    with_masks = [example for example in examples if "filling in the masked" in example.prompt]
    assert len(with_masks) > 30
    for example in with_masks:
        masked = example.prompt.splitlines()[-1]
        assert "[MASK]" in masked
        assert fits_mask(masked, example.answer)


def test_yes_and_no_are_masked_as_one_segment() -> None:
    lexicon = Lexicon.load(LEXICON_PATH)
    rates = {"objects": 0.0}
    masked = mask_by_rule("No, there is no key in the image.", lexicon, rates, Random(0))
    assert masked == "[MASK] key in the image."


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_written_files_depend_only_on_the_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_training_data(tmp_path / name, 5, seed)
        write_eval_data(tmp_path / name, 5, seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_training_and_evaluation_scenes_differ(tmp_path: Path) -> None:
    write_training_data(tmp_path, 300, 0)
    write_eval_data(tmp_path, 300, 0)
    images = {path.name: path.read_bytes() for path in (tmp_path / "images").iterdir()}
    train = {raw for name, raw in images.items() if name.startswith("train")}
    assert not train & {raw for name, raw in images.items() if name.startswith("eval")}


def test_eval_questions_are_balanced_and_true(tmp_path: Path) -> None:
    write_eval_data(tmp_path, 40, 0)
    truth = {}
    for line in (tmp_path / "eval" / "chair.jsonl").read_text().splitlines():
        row = json.loads(line)
        truth[row["image"]] = set(row["objects"])
    for split in ("random", "popular", "adversarial"):
        lines = (tmp_path / "eval" / f"pope_{split}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["label"] for row in rows].count("yes") == len(rows) / 2
        for row in rows:
            (kind,) = [kind for kind in KINDS if f" {kind} " in row["text"]]
            assert (kind in truth[row["image"]]) == (row["label"] == "yes")
            if split == "adversarial" and row["label"] == "no":
                assert PARTNER[kind] in truth[row["image"]]
