"""Make the trainer's records from pairs, with the rejected image of a condition."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from realign.data.records import Record
from realign.demo.data import training_scenes
from realign.demo.drawing import draw, png
from realign.demo.experiment.pairs import Pair
from realign.demo.world import Scene

NOISE = 64.0  # standard deviation of the noise; pixels range from 0 to 255


def records(made: Mapping[str, Any], rejected_image: str) -> list[Record]:
    """Return the records of the pairs of a seed.

    Args:
        made: Result of :func:`realign.demo.experiment.pairs.make_pairs`.
        rejected_image: A key of ``REJECTED_IMAGES``.
    """
    scenes = training_scenes(made["seed"], made["scenes"])
    rng = Random(f"experiment {rejected_image} {made['seed']}")
    reject = REJECTED_IMAGES[rejected_image]
    found = []
    for pair in made["pairs"]:
        image = png(scenes[pair["image"]])
        rejected = reject(pair, made["neighbours"][pair["image"]], scenes, rng)
        found.append(
            Record(
                id=pair["id"],
                images=(image,),
                prompt=({"role": "user", "content": pair["prompt"]},),
                chosen=pair["chosen"],
                rejected=pair["rejected"],
                rejected_images=(rejected,),
            )
        )
    return found


def noised(scene: Scene, seed: int) -> bytes:
    """Return the picture of a scene with Gaussian noise, as the bytes of a PNG file."""
    clean = np.asarray(draw(scene), dtype=np.float64)
    noise = np.random.default_rng(seed).normal(0.0, NOISE, clean.shape)
    pixels = np.clip(np.rint(clean + noise), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _random(pair: Pair, neighbours: list[int], scenes: list[Scene], rng: Random) -> bytes:
    other = rng.randrange(len(scenes) - 1)
    return png(scenes[other + (other >= pair["image"])])


# Name to a function that returns the image, given a pair, its neighbours, all scenes and a random
# number generator.
REJECTED_IMAGES: Mapping[str, Callable[[Pair, list[int], list[Scene], Random], bytes]] = {
    "retrieved": lambda pair, neighbours, scenes, rng: png(scenes[pair["retrieved"]]),
    "nearest": lambda pair, neighbours, scenes, rng: png(scenes[neighbours[0]]),
    "tenth": lambda pair, neighbours, scenes, rng: png(scenes[neighbours[-1]]),
    "random": _random,
    "noised": lambda pair, neighbours, scenes, rng: noised(
        scenes[pair["image"]], rng.getrandbits(32)
    ),
}
