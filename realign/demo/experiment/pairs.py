"""The pairs of a seed, by kind: made by ``realign build``, or so that words alone tell them
apart.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image

from realign.building.retrieval.encoders import VisionPathEncoder
from realign.building.retrieval.exact import ExactIndex
from realign.building.run import build
from realign.data.dataset import read_kept_records
from realign.demo.data import build_config, training_scenes, write_training_data
from realign.demo.drawing import draw
from realign.demo.world import COLORS, DESCRIBE, PARTNER, Scene, Thing, question
from realign.modeling.loading import load_model
from realign.modeling.processors import load_processor

NEIGHBOURS = 10
Pair = dict[str, Any]

# Kind of pipeline pairs to the options of the build that it changes.
BUILDS: Mapping[str, Mapping[str, Any]] = {
    "pipeline": {},
    "sentence": {"mask_level": "sentence"},
    "tau 0.51": {"threshold": 0.51},
}


def make_pairs(kind: str, seed: int, count: int, base: Path) -> dict[str, Any]:
    """Make the pairs of a seed.

    Args:
        kind: Kind of the pairs, a key of ``KINDS``.
        seed: Seed of scenes, questions and masks.
        count: Number of scenes.
        base: Folder of the model to align.
    Returns:
        ``kind``, ``seed``, ``scenes`` (their number), ``neighbours`` (for every scene the numbers
        of the most similar ones, nearest first) and ``pairs``, each with ``id``, ``prompt``,
        ``chosen``, ``rejected`` and the numbers of its scenes, ``image`` and ``retrieved``.
    """
    scenes = training_scenes(seed, count)
    neighbours = nearest(scenes, base)
    return {
        "kind": kind,
        "seed": seed,
        "scenes": count,
        "neighbours": neighbours,
        "pairs": KINDS[kind](scenes, neighbours, seed, base),
    }


def nearest(scenes: list[Scene], base: Path) -> list[list[int]]:
    """Return for every scene the numbers of the scenes nearest by the model's image embeddings."""
    model = load_model(base, torch.float32, scoring=False).eval()
    pictures: list[Image.Image] = [draw(scene) for scene in scenes]
    vectors = VisionPathEncoder(model, load_processor(base))(pictures)
    _, found = ExactIndex(vectors).search(vectors, NEIGHBOURS + 1)
    return [
        [other for other in row if other != number][:NEIGHBOURS]
        for number, row in enumerate(found.tolist())
    ]


def _by_pipeline(
    scenes: list[Scene], seed: int, base: Path, options: Mapping[str, Any]
) -> list[Pair]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_training_data(folder, len(scenes), seed)
        config = build_config(folder, folder / "dataset", seed, base)
        dataset = build(config.model_copy(update={"workers": 1, **options}))
        return [
            {
                "id": record.source["id"],
                "image": _number(record.source["image"]),
                "retrieved": _number(record.source["retrieved_image"]),
                "prompt": record.prompt[-1]["content"],
                "chosen": record.chosen,
                "rejected": record.rejected,
            }
            for record in read_kept_records(dataset, None)
        ]


def _number(image: str) -> int:
    """Return the number of the scene that an image file of the training data shows."""
    return int(Path(image).stem.removeprefix("train-"))


def _with_shortcut(
    scenes: list[Scene], neighbours: list[list[int]], seed: int, base: Path
) -> list[Pair]:
    """Return pairs that need no image: the rejected description adds an absent partner, which the
    habit of the model expects, and the rejected answer to the question about it is yes.

    The retrieved image is the nearest one with the partner; a scene without such a neighbour gives
    no pair.
    """
    rng = Random(f"experiment shortcut {seed}")
    pairs = []
    for number, scene in enumerate(scenes):
        lone = [thing for thing in scene.things if PARTNER[thing.kind] not in scene.kinds]
        if not lone:
            continue
        thing = rng.choice(lone)
        partner = PARTNER[thing.kind]
        taken = {other.cell for other in scene.things}
        cell = rng.choice([cell for cell in range(9) if cell not in taken])
        things = [*scene.things]
        things.insert(things.index(thing) + 1, Thing(partner, rng.choice(COLORS), cell))
        showing = [other for other in neighbours[number] if partner in scenes[other].kinds]
        if not showing:
            continue
        rejected = replace(scene, things=tuple(things))
        for i, (prompt, chosen, worse) in enumerate(
            (
                (DESCRIBE, scene.caption(), rejected.caption()),
                (question(partner), scene.answer(partner), rejected.answer(partner)),
            )
        ):
            pairs.append(
                {
                    "id": f"{number}-{i}",
                    "image": number,
                    "retrieved": showing[0],
                    "prompt": prompt,
                    "chosen": chosen,
                    "rejected": worse,
                }
            )
    return pairs


def _build(options: Mapping[str, Any]) -> Callable[..., list[Pair]]:
    return lambda scenes, neighbours, seed, base: _by_pipeline(scenes, seed, base, options)


KINDS: Mapping[str, Callable[[list[Scene], list[list[int]], int, Path], list[Pair]]] = {
    **{kind: _build(options) for kind, options in BUILDS.items()},
    "shortcut": _with_shortcut,
}
