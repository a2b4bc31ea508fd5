"""Draw a :class:`~realign.demo.world.Scene` of 96 x 96 pixels, with at most one object in each cell
of a 3 x 3 grid.
"""

from __future__ import annotations

import io
import math
from functools import cache
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

from realign.demo.world import Scene
from realign.runtime.files import replacing

SIZE = 96
CELL = SIZE // 3
# Sprites are drawn larger by this factor and then reduced, since Pillow has no other anti-aliasing.
SUPERSAMPLE = 4

RGB = {
    "red": (214, 48, 49),
    "green": (39, 154, 75),
    "blue": (45, 92, 214),
    "yellow": (238, 190, 20),
    "purple": (142, 60, 190),
    "black": (40, 40, 46),
}
BACKGROUNDS = ((250, 248, 242), (238, 244, 250), (242, 250, 240), (250, 240, 244))
INK = (250, 250, 250)
WOOD = (120, 82, 48)


def draw(scene: Scene) -> Image.Image:
    """Return the scene as an RGB image. The same scene gives the same pixels."""
    image = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS[scene.tint])
    for thing in scene.things:
        # every object is shifted a little, depending on the object and the scene, so that equal
        # objects do not always have equal pixels
        jitter = Random(f"{thing.kind}{thing.color}{thing.cell}{scene.tint}{len(scene.things)}")
        row, column = divmod(thing.cell, 3)
        at = (column * CELL + jitter.randint(-2, 2), row * CELL + jitter.randint(-2, 2))
        sprite = _sprite(thing.kind, thing.color)
        image.paste(sprite, at, sprite)
    return image


def png(scene: Scene) -> bytes:
    """Return the picture of a scene as the bytes of a PNG file."""
    buffer = io.BytesIO()
    draw(scene).save(buffer, "PNG")
    return buffer.getvalue()


def save(scene: Scene, path: Path) -> None:
    """Draw a scene into a PNG file, unless the file exists."""
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(png(scene))


@cache
def _sprite(kind: str, color: str) -> Image.Image:
    side = CELL * SUPERSAMPLE
    canvas = Image.new("RGBA", (side, side), (*RGB[color], 0))
    _SHAPES[kind](_Pen(ImageDraw.Draw(canvas), side), RGB[color])
    return canvas.resize((CELL, CELL), Image.Resampling.LANCZOS)


class _Pen:
    """ImageDraw in unit coordinates."""

    def __init__(self, pen: ImageDraw.ImageDraw, side: int) -> None:
        self._pen, self._side = pen, side

    def _scale(self, *xy: float) -> list[float]:
        return [v * self._side for v in xy]

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: tuple[int, ...]) -> None:
        self._pen.rectangle(self._scale(x0, y0, x1, y1), fill=fill)

    def disc(
        self, x: float, y: float, r: float, fill: tuple[int, ...], squash: float = 1.0
    ) -> None:
        self._pen.ellipse(self._scale(x - r, y - r * squash, x + r, y + r * squash), fill=fill)

    def ring(self, x: float, y: float, r: float, width: float, fill: tuple[int, ...]) -> None:
        self._pen.ellipse(
            self._scale(x - r, y - r, x + r, y + r), outline=fill, width=round(width * self._side)
        )

    def polygon(self, *xy: float, fill: tuple[int, ...]) -> None:
        self._pen.polygon(self._scale(*xy), fill=fill)


Color = tuple[int, int, int]


def _house(pen: _Pen, color: Color) -> None:
    pen.polygon(0.5, 0.08, 0.95, 0.48, 0.05, 0.48, fill=color)
    pen.box(0.17, 0.48, 0.83, 0.92, color)
    pen.box(0.42, 0.62, 0.58, 0.92, INK)


def _tree(pen: _Pen, color: Color) -> None:
    pen.box(0.44, 0.66, 0.56, 0.95, WOOD)
    pen.polygon(0.5, 0.04, 0.80, 0.42, 0.20, 0.42, fill=color)
    pen.polygon(0.5, 0.24, 0.88, 0.72, 0.12, 0.72, fill=color)


def _boat(pen: _Pen, color: Color) -> None:
    pen.polygon(0.05, 0.62, 0.95, 0.62, 0.75, 0.90, 0.25, 0.90, fill=color)
    pen.box(0.47, 0.10, 0.53, 0.62, WOOD)
    pen.polygon(0.56, 0.12, 0.88, 0.54, 0.56, 0.54, fill=color)


def _fish(pen: _Pen, color: Color) -> None:
    pen.disc(0.42, 0.5, 0.36, color, squash=0.62)
    pen.polygon(0.66, 0.5, 0.96, 0.24, 0.96, 0.76, fill=color)
    pen.disc(0.24, 0.44, 0.06, INK)


def _star(pen: _Pen, color: Color) -> None:
    points: list[float] = []
    for i in range(10):
        radius, angle = (0.46 if i % 2 == 0 else 0.19), math.pi * (i / 5 - 0.5)
        points += [0.5 + radius * math.cos(angle), 0.53 + radius * math.sin(angle)]
    pen.polygon(*points, fill=color)


def _moon(pen: _Pen, color: Color) -> None:
    pen.disc(0.46, 0.5, 0.42, color)
    pen.disc(0.66, 0.42, 0.36, (*INK, 0))


def _cup(pen: _Pen, color: Color) -> None:
    pen.ring(0.72, 0.50, 0.20, 0.08, color)
    pen.polygon(0.10, 0.20, 0.72, 0.20, 0.64, 0.85, 0.18, 0.85, fill=color)


def _plate(pen: _Pen, color: Color) -> None:
    pen.disc(0.5, 0.5, 0.44, color)
    pen.ring(0.5, 0.5, 0.30, 0.05, INK)


def _key(pen: _Pen, color: Color) -> None:
    pen.ring(0.26, 0.5, 0.22, 0.10, color)
    pen.box(0.46, 0.44, 0.95, 0.56, color)
    pen.box(0.70, 0.56, 0.77, 0.72, color)
    pen.box(0.86, 0.56, 0.93, 0.76, color)


def _lock(pen: _Pen, color: Color) -> None:
    pen.ring(0.5, 0.36, 0.26, 0.10, color)
    pen.box(0.16, 0.44, 0.84, 0.92, color)
    pen.disc(0.5, 0.64, 0.09, INK)
    pen.box(0.47, 0.64, 0.53, 0.80, INK)


def _flower(pen: _Pen, color: Color) -> None:
    for i in range(6):
        angle = math.pi * i / 3
        pen.disc(0.5 + 0.27 * math.cos(angle), 0.5 + 0.27 * math.sin(angle), 0.19, color)
    pen.disc(0.5, 0.5, 0.15, INK)


def _butterfly(pen: _Pen, color: Color) -> None:
    pen.polygon(0.5, 0.46, 0.04, 0.10, 0.12, 0.56, fill=color)
    pen.polygon(0.5, 0.46, 0.96, 0.10, 0.88, 0.56, fill=color)
    pen.polygon(0.5, 0.50, 0.16, 0.62, 0.30, 0.92, fill=color)
    pen.polygon(0.5, 0.50, 0.84, 0.62, 0.70, 0.92, fill=color)
    pen.box(0.47, 0.22, 0.53, 0.84, WOOD)


_SHAPES = {
    "house": _house,
    "tree": _tree,
    "boat": _boat,
    "fish": _fish,
    "star": _star,
    "moon": _moon,
    "cup": _cup,
    "plate": _plate,
    "key": _key,
    "lock": _lock,
    "flower": _flower,
    "butterfly": _butterfly,
}
