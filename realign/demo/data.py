"""Writes the drawn world as files: images and instructions to build from, and questions to be
measured on.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

from realign.demo.drawing import draw
from realign.demo.tasks import question_pair
from realign.demo.world import DESCRIBE, KINDS, Scene, absent_kinds, free_scene, question
from realign.runtime.files import write_json, write_jsonl


def write_training_data(folder: Path, scenes: int, seed: int) -> None:
    """Write ``images/train-*.png`` and ``train.jsonl``: one description and one question a scene,
    truly answered.
    """
    rng = Random(f"train {seed}")
    rows: list[dict[str, Any]] = []
    for number in range(scenes):
        scene = free_scene(rng)
        image = _save(scene, folder / "images", f"train-{number:05d}.png")
        pairs = ((DESCRIBE, scene.caption()), question_pair(scene, rng))
        rows += [
            {"id": f"{number:05d}-{i}", "image": image, "prompt": prompt, "answer": answer}
            for i, (prompt, answer) in enumerate(pairs)
        ]
    write_jsonl(folder / "train.jsonl", rows)


def write_eval_data(folder: Path, scenes: int, seed: int) -> None:
    """Write ``images/eval-*.png`` and ``eval/``: POPE questions in three splits and captions, on
    unseen free scenes.
    """
    rng = Random(f"eval {seed}")
    pope: dict[str, list[dict[str, Any]]] = {"random": [], "popular": [], "adversarial": []}
    captions = []
    for number in range(scenes):
        scene = free_scene(rng)
        image = _save(scene, folder / "images", f"eval-{number:05d}.png")
        present = question(rng.choice(sorted(scene.kinds)))
        for split, absent in absent_kinds(scene).items():
            if absent:  # where all partners are there, the adversarial split has no question
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


def _save(scene: Scene, folder: Path, name: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    draw(scene).save(folder / name)
    return name
