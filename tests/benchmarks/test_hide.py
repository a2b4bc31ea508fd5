"""Pictures that lack the objects which their texts name."""

from __future__ import annotations

from itertools import islice
from random import Random

from benchmarks.demo.hide import BATCH_SIZE, batches, learning_rate_factor, visible
from realign.demo.world import DESCRIBE, habitual_scene


def test_things_are_hidden_at_the_given_rate() -> None:
    rng = Random(0)
    scenes = [
        scene for scene in (habitual_scene(rng) for _ in range(3000)) if len(scene.things) > 2
    ]
    shown = [visible(scene, 0.2, rng) for scene in scenes]
    for scene, seen in zip(scenes, shown, strict=True):
        assert seen.things
        assert [thing for thing in scene.things if thing in seen.things] == [*seen.things]
    share = sum(len(seen.things) for seen in shown) / sum(len(scene.things) for scene in scenes)
    assert abs(share - 0.8) < 0.02
    assert all(visible(scene, 1.0, rng).things == scene.things[:1] for scene in scenes)


def test_texts_still_name_the_hidden_things() -> None:
    batch = [one for part in islice(batches(Random(1), 0.5), 6) for one in part]
    assert len(batch) == 6 * BATCH_SIZE
    described = [one for one in batch if one.prompt == DESCRIBE]
    assert described
    names_more = [one for one in described if one.answer.count(" a ") > len(one.scene.things)]
    assert 0.3 < len(names_more) / len(described) < 1
    assert batch == [one for part in islice(batches(Random(1), 0.5), 6) for one in part]


def test_the_rate_rises_and_falls() -> None:
    factors = [learning_rate_factor(step) for step in range(180)]
    assert factors[0] == 1 / 15
    assert factors[20] == factors[89] == 1.0
    assert factors[-1] == 0.05
