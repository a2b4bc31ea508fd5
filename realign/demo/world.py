"""A seeded world of drawn scenes in which objects occur in pairs, so that a model trained on it
hallucinates.

Every object has a partner (house and tree, boat and fish, ...). In *habitual* scenes the partner is
present 85 % of the time, so a model learns to name it without looking; in *half* scenes, half of
the time. The objects of *free* scenes are drawn independently; there the model's habit shows as
hallucination. This module defines scenes and sentences; :mod:`realign.demo.drawing` draws them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from random import Random

PAIRS = (
    ("house", "tree"),
    ("boat", "fish"),
    ("star", "moon"),
    ("cup", "plate"),
    ("key", "lock"),
    ("flower", "butterfly"),
)
# How often a pair is drawn in habitual scenes: POPE's "popular" split needs objects that are more
# common than others.
PAIR_WEIGHTS = (3.0, 2.5, 2.0, 1.5, 1.25, 1.0)
KINDS = tuple(itertools.chain.from_iterable(PAIRS))
PARTNER = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
POPULAR = KINDS[:4]
COLORS = ("red", "green", "blue", "yellow", "purple", "black")
PLACES = (
    "at the top left",
    "at the top",
    "at the top right",
    "on the left",
    "in the middle",
    "on the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)
HABIT = 0.85
HALF_HABIT = 0.5

DESCRIBE = "Describe the image."


@dataclass(frozen=True, slots=True)
class Thing:
    """One drawn object: its kind, its colour, and its cell (0 to 8, in reading order)."""

    kind: str
    color: str
    cell: int

    @property
    def place(self) -> str:
        """Name of the cell."""
        return PLACES[self.cell]

    def __str__(self) -> str:
        return f"a {self.color} {self.kind} {self.place}"


@dataclass(frozen=True, slots=True)
class Scene:
    """Things in reading order, except that a partner follows its thing directly."""

    things: tuple[Thing, ...]
    tint: int  # which of the pale backgrounds

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(thing.kind for thing in self.things)

    def caption(self) -> str:
        """Return the true description, such as "There is a red house at the top and a blue boat in
        the middle.".
        """
        *most, last = map(str, self.things)
        return f"There is {', '.join(most)} and {last}." if most else f"There is {last}."

    def answer(self, kind: str) -> str:
        """Return the true answer to :func:`question`."""
        if kind in self.kinds:
            return f"Yes, there is a {kind} in the image."
        return f"No, there is no {kind} in the image."


def question(kind: str) -> str:
    """Return the POPE question about one kind of object."""
    return f"Is there a {kind} in the image?"


def habitual_scene(rng: Random, habit: float = HABIT) -> Scene:
    """Draw a scene as in the model's pretraining: one or two objects, each with its partner with
    probability ``habit``, otherwise with another object.
    """
    kinds: list[str] = []
    for _ in range(rng.choice((1, 2, 2))):
        free = [i for i, pair in enumerate(PAIRS) if not set(pair) & set(kinds)]
        pair = PAIRS[rng.choices(free, [PAIR_WEIGHTS[i] for i in free])[0]]
        anchor = rng.choice(pair)
        kinds.append(anchor)
        if rng.random() < habit:
            kinds.append(PARTNER[anchor])
        else:
            kinds.append(rng.choice([k for k in KINDS if k not in kinds and k != PARTNER[anchor]]))
    return _place(kinds, rng)


def half_scene(rng: Random) -> Scene:
    """Draw a scene in which each object has its partner half of the time."""
    return habitual_scene(rng, HALF_HABIT)


def free_scene(rng: Random) -> Scene:
    """Draw a scene of two to four objects; a partner is as likely as any other object."""
    return _place(rng.sample(KINDS, rng.choice((2, 3, 4))), rng)


def _place(kinds: list[str], rng: Random) -> Scene:
    kinds = list(dict.fromkeys(kinds))
    cells = rng.sample(range(9), len(kinds))
    by_cell = sorted(
        (Thing(kind, rng.choice(COLORS), cell) for kind, cell in zip(kinds, cells, strict=True)),
        key=lambda thing: thing.cell,
    )
    ordered: list[Thing] = []
    for thing in by_cell:
        if thing not in ordered:
            ordered.append(thing)
            ordered += [other for other in by_cell if other.kind == PARTNER[thing.kind]]
    return Scene(tuple(ordered), tint=rng.randrange(4))


def absent_kinds(scene: Scene) -> dict[str, list[str]]:
    """Return the kinds that are absent from a scene by split of POPE: all of them, the most common
    ones, and the partners of present ones.
    """
    absent = [kind for kind in KINDS if kind not in scene.kinds]
    return {
        "random": absent,
        "popular": [kind for kind in POPULAR if kind in absent],
        "adversarial": [kind for kind in absent if PARTNER[kind] in scene.kinds],
    }
