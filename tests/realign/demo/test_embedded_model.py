"""The embedded model uses the image and also follows habits, which is the case of the demo."""

from __future__ import annotations

from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
import torch

from realign.demo.drawing import draw
from realign.demo.run import MODEL
from realign.demo.world import DESCRIBE, KINDS, Scene, free_scene, question
from realign.generation.generator import Request
from realign.generation.transformers_generator import TransformersGenerator

SCENES = 60


@pytest.fixture(scope="module")
def generator() -> TransformersGenerator:
    return TransformersGenerator.load(MODEL, torch.float32, 72, batch_size=SCENES)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = Random("a seed of its own")
    return [free_scene(rng) for _ in range(SCENES)]


def ask(generator: TransformersGenerator, scenes: list[Scene], prompts: list[str]) -> list[str]:
    with TemporaryDirectory() as folder:
        requests = []
        for number, (scene, prompt) in enumerate(zip(scenes, prompts, strict=True)):
            draw(scene).save(path := Path(folder) / f"{number}.png")
            requests.append(Request(prompt, path))
        return [answer.text for answer in generator(requests)]


@pytest.mark.parametrize(("present", "least"), [(True, 0.85), (False, 0.6)])
def test_the_embedded_model_answers_from_the_image(generator, scenes, present, least) -> None:
    rng = Random(1)
    kinds = [
        rng.choice([kind for kind in KINDS if (kind in scene.kinds) == present]) for scene in scenes
    ]
    answers = ask(generator, scenes, [question(kind) for kind in kinds])
    right = [s.answer(kind) == text for s, kind, text in zip(scenes, kinds, answers, strict=True)]
    assert sum(right) / SCENES > least


def test_the_embedded_model_names_most_objects_and_hallucinates_some(generator, scenes) -> None:
    captions = ask(generator, scenes, [DESCRIBE] * SCENES)
    named = [{kind for kind in KINDS if kind in caption} for caption in captions]
    found = sum(len(names & s.kinds) for names, s in zip(named, scenes, strict=True))
    absent = sum(len(names - s.kinds) for names, s in zip(named, scenes, strict=True))
    assert found / sum(len(scene.kinds) for scene in scenes) > 0.75
    assert 0.02 < absent / (found + absent) < 0.4
