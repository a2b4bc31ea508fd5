"""Scenes of the experiment: those that pairs are made from, and those that models are measured on,
with the questions about them.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from realign.demo.drawing import draw
from realign.demo.world import (
    KINDS,
    PARTNER,
    Scene,
    absent_kinds,
    free_scene,
    habitual_scene,
    question,
)
from realign.runtime.files import replacing

HALF_HABIT = 0.5
SPLITS: Mapping[str, tuple[str, ...]] = {
    "free": ("random", "popular", "adversarial"),
    "half": ("partner",),
}


class Question(NamedTuple):
    """A yes/no question about one scene of a set.

    Attributes:
        scene: Number of the scene.
        kind: The object that is asked for.
        label: ``yes`` or ``no``.
        splits: Splits of POPE that it belongs to.
    """

    scene: int
    kind: str
    label: str
    splits: tuple[str, ...]

    @property
    def text(self) -> str:
        """The question in words."""
        return question(self.kind)


class Draw:
    """The scenes of one evaluation draw, in the sets ``free`` and ``half``.

    Args:
        seed: Of the draw.
        scenes: Scenes of each set.
    """

    def __init__(self, seed: int, scenes: int) -> None:
        self.seed = seed
        self.scenes: dict[str, list[Scene]] = {}
        self.questions: dict[str, list[Question]] = {}
        for name, make in (("free", free_scene), ("half", half_scene)):
            rng = Random(f"experiment eval {name} {seed}")
            self.scenes[name] = [make(rng) for _ in range(scenes)]
            ask = _free_questions if name == "free" else _partner_questions
            self.questions[name] = [
                asked
                for number, scene in enumerate(self.scenes[name])
                for asked in ask(number, scene, rng)
            ]

    def images(self, folder: Path) -> dict[str, list[Path]]:
        """Return the image file of every scene; those that are not there are drawn."""
        place = folder / f"eval-{self.seed}"
        return {name: write_images(scenes, place / name) for name, scenes in self.scenes.items()}

    @cached_property
    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """The facts of each scene that CHAIR's rule reads."""
        synonyms = {kind: [kind] for kind in KINDS}
        return {
            name: [{"objects": sorted(scene.kinds), "synonyms": synonyms} for scene in scenes]
            for name, scenes in self.scenes.items()
        }


def half_scene(rng: Random) -> Scene:
    """Draw a scene whose objects have their partner half of the time."""
    return habitual_scene(rng, HALF_HABIT)


def training_scenes(seed: int, count: int) -> list[Scene]:
    """Return the scenes that the pairs of a seed are made from."""
    rng = Random(f"experiment train {seed}")
    return [half_scene(rng) for _ in range(count)]


def png(scene: Scene) -> bytes:
    """Return the picture of a scene as the bytes of a PNG file."""
    buffer = io.BytesIO()
    draw(scene).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(scenes: Sequence[Scene], folder: Path) -> list[Path]:
    """Draw scenes into ``folder`` and return their files; a file that is there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:05d}.png" for number in range(len(scenes))]
    for scene, path in zip(scenes, paths, strict=True):
        if not path.is_file():
            with replacing(path) as temporary:
                temporary.write_bytes(png(scene))
    return paths


def _free_questions(number: int, scene: Scene, rng: Random) -> list[Question]:
    """Return one question about an object that is there, and one for each split about one that is
    not.

    The first one counts in every split that has one of the others, so that each is half yes.
    """
    present = rng.choice(sorted(scene.kinds))
    absent = {split: rng.choice(kinds) for split, kinds in absent_kinds(scene).items() if kinds}
    questions = [Question(number, present, "yes", tuple(absent))]
    for kind in dict.fromkeys(absent.values()):
        splits = tuple(split for split, other in absent.items() if other == kind)
        questions.append(Question(number, kind, "no", splits))
    return questions


def _partner_questions(number: int, scene: Scene, rng: Random) -> list[Question]:
    """Ask for the partner of every object; it is there about half of the time."""
    partners = [PARTNER[kind] for kind in sorted(scene.kinds)]
    return [
        Question(number, kind, "yes" if kind in scene.kinds else "no", SPLITS["half"])
        for kind in partners
    ]
