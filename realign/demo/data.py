"""Write the drawn world as files: images with prompts and answers to build pairs from, and
questions to evaluate models with.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

from realign.config import BuildConfig
from realign.demo.drawing import save
from realign.demo.tasks import LEXICON_PATH, question_pair
from realign.demo.world import (
    DESCRIBE,
    KINDS,
    Scene,
    absent_kinds,
    free_scene,
    half_scene,
    question,
)
from realign.runtime.files import write_json, write_jsonl

MODEL = Path(__file__).with_name("model")
# Fewer masks give rejected answers that are closer to the chosen ones, but then hardly any pair has
# four objects: at 40 % most pairs are of short descriptions, and training shortens all answers.
MASK_RATES = {"objects": 0.8, "attributes": 0.8, "relations": 0.8}


def training_scenes(seed: int, count: int) -> list[Scene]:
    """Return the scenes from which the pairs of a seed are made."""
    rng = Random(f"experiment train {seed}")
    return [half_scene(rng) for _ in range(count)]


def write_training_data(folder: Path, count: int, seed: int) -> list[Scene]:
    """Write ``images/train-*.png`` and ``train.jsonl``, and return the scenes.

    Every scene has a description and a yes/no question with its true answer.
    """
    scenes = training_scenes(seed, count)
    rng = Random(f"experiment questions {seed}")
    rows: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes):
        name = f"train-{number:05d}.png"
        save(scene, folder / "images" / name)
        pairs = ((DESCRIBE, scene.caption()), question_pair(scene, rng))
        rows += [
            {"id": f"{number}-{i}", "image": name, "prompt": prompt, "answer": answer}
            for i, (prompt, answer) in enumerate(pairs)
        ]
    write_jsonl(folder / "train.jsonl", rows)
    return scenes


def build_config(world: Path, out: Path, seed: int, model: Path = MODEL) -> BuildConfig:
    """Return the configuration to build pairs from the files of :func:`write_training_data`.

    Four fifths of the segments are masked, yes and no always; unmasked words are kept.

    Args:
        world: Folder of the training data.
        out: Folder of the dataset.
        seed: Seed of the masks.
        model: Folder of the model that completes masked answers.
    """
    return BuildConfig(
        source=world / "train.jsonl",
        images=world / "images",
        model=str(model),
        out=out,
        lexicon=LEXICON_PATH,
        mask_rates=MASK_RATES,
        keep_unmasked=True,
        batch_size=64,
        max_new_tokens=72,
        seed=seed,
    )


def write_eval_data(folder: Path, count: int, seed: int) -> None:
    """Write ``images/eval-*.png`` and ``eval/``: POPE questions in three splits, and images to
    describe. No pair is made from these scenes, which are free ones.
    """
    rng = Random(f"eval {seed}")
    pope: dict[str, list[dict[str, Any]]] = {"random": [], "popular": [], "adversarial": []}
    captions = []
    for number in range(count):
        scene = free_scene(rng)
        image = f"eval-{number:05d}.png"
        save(scene, folder / "images" / image)
        present = question(rng.choice(sorted(scene.kinds)))
        for split, absent in absent_kinds(scene).items():
            if absent:  # if all partners are present, the adversarial split has no question
                for text, label in ((present, "yes"), (question(rng.choice(absent)), "no")):
                    number_in_split = len(pope[split]) + 1
                    pope[split].append(
                        {
                            "question_id": number_in_split,
                            "image": image,
                            "text": text,
                            "label": label,
                        }
                    )
        captions.append(
            {"image_id": number, "image": image, "text": DESCRIBE, "objects": sorted(scene.kinds)}
        )
    for split, rows in pope.items():
        write_jsonl(folder / "eval" / f"pope_{split}.jsonl", rows)
    write_jsonl(folder / "eval" / "chair.jsonl", captions)
    write_json(folder / "eval" / "chair_objects.json", {kind: [kind] for kind in KINDS})
