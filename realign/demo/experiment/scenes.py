"""The scenes and questions of an evaluation draw in the experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from realign.demo.drawing import save
from realign.demo.world import (
    KINDS,
    PARTNER,
    Scene,
    absent_kinds,
    free_scene,
    half_scene,
    question,
)

SPLITS: Mapping[str, tuple[str, ...]] = {
    "free": ("random", "popular", "adversarial"),
    "half": ("partner",),
}


class Question(NamedTuple):
    """A yes/no question about one scene of a set.

    Attributes:
        scene: Number of the scene.
        kind: Kind of object that the question asks about.
        label: ``yes`` or ``no``.
        splits: Splits of POPE to which the question belongs.
    """

    scene: int
    kind: str
    label: str
    splits: tuple[str, ...]

    @property
    def text(self) -> str:
        """Text of the question."""
        return question(self.kind)


class Draw:
    """The scenes of one evaluation draw, in the sets ``free`` and ``half``.

    Args:
        seed: Seed of the draw.
        scenes: Number of scenes in each set.
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
        """Return the image file of every scene; draw the missing ones."""
        place = folder / f"eval-{self.seed}"
        return {name: _files(scenes, place / name) for name, scenes in self.scenes.items()}

    @cached_property
    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """Rows of each set for the rule of CHAIR."""
        synonyms = {kind: [kind] for kind in KINDS}
        return {
            name: [{"objects": sorted(scene.kinds), "synonyms": synonyms} for scene in scenes]
            for name, scenes in self.scenes.items()
        }


def _files(scenes: Sequence[Scene], folder: Path) -> list[Path]:
    """Draw scenes into a folder and return their files."""
    paths = [folder / f"{number:05d}.png" for number in range(len(scenes))]
    for scene, path in zip(scenes, paths, strict=True):
        save(scene, path)
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
