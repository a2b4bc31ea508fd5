"""Every mode of an image file becomes the RGB that a person sees, by stored arrays."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from realign.data.images import STRIP, decode_image, to_rgb

A, B, C, D = (200, 30, 90), (10, 220, 60), (0, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def of(mode: str, values: list, dtype: type = np.uint8) -> Image.Image:
    """A 2 x 2 image of a mode, its pixels as Pillow stores them."""
    array = np.array(values, dtype=dtype)
    image = Image.new(mode, (2, 2))
    for index, value in enumerate(array):
        pixel = tuple(int(v) for v in value) if value.ndim else int(value)
        image.putpixel((index % 2, index // 2), pixel)
    return image


def grey(*levels: int) -> list[list[int]]:
    return [[level] * 3 for level in levels]


def palette(mode: str, values: list) -> Image.Image:
    image = Image.new("P", (2, 2))
    image.putpalette([*A, *B, *C, *D])
    for index in range(4):
        image.putpixel((index % 2, index // 2), index)
    if mode == "PA":
        image = image.convert("PA")
        image.putalpha(Image.fromarray(np.array(values, dtype=np.uint8).reshape(2, 2)))
    return image


# over white: value * alpha + 255 * (1 - alpha)
MODES = {
    "1": (of("1", [0, 255, 255, 0]), grey(0, 255, 255, 0)),
    "L": (of("L", [0, 1, 128, 255]), grey(0, 1, 128, 255)),
    "LA": (of("LA", [(0, 0), (0, 255), (100, 255), (0, 51)]), grey(255, 0, 100, 204)),
    "P": (palette("P", []), [[*A], [*B], [*C], [*D]]),
    "PA": (palette("PA", [255, 0, 51, 255]), [[*A], [255] * 3, [204] * 3, [*D]]),
    "I;16": (of("I;16", [0, 257, 257 * 100 + 100, 65535], np.uint16), grey(0, 1, 100, 255)),
    "I;16B": (of("I;16B", [0, 257, 257 * 100 + 150, 65535], np.uint16), grey(0, 1, 101, 255)),
    "I": (of("I", [0, 257, 65535, 70000], np.int32), grey(0, 1, 255, 255)),
    "RGB": (of("RGB", [A, B, C, D]), [[*A], [*B], [*C], [*D]]),
    "RGBA": (
        of("RGBA", [(*A, 255), (*B, 0), (0, 0, 0, 51), (*D, 7)]),
        [[*A], [255] * 3, [204] * 3, [*D]],
    ),
    "CMYK": (
        of("CMYK", [(0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255), (0, 255, 255, 0)]),
        [[255, 255, 255], [0, 255, 255], [0, 0, 0], [255, 0, 0]],
    ),
    "YCbCr": (
        of("YCbCr", [(0, 128, 128), (255, 128, 128), (76, 85, 255), (100, 128, 128)]),
        [[0] * 3, [255] * 3, [254, 0, 0], [100] * 3],
    ),
    "HSV": (
        of("HSV", [(0, 0, 255), (0, 255, 255), (0, 0, 0), (0, 0, 9)]),
        [[255] * 3, [255, 0, 0], [0] * 3, [9] * 3],
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_an_image_mode_converts_to_its_expected_rgb(mode: str) -> None:
    image, expected = MODES[mode]
    assert image.mode == mode
    assert np.asarray(to_rgb(image)).reshape(4, 3).tolist() == expected


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "I;16", "RGB", "RGBA"])
def test_an_image_mode_in_a_png_converts_to_its_expected_rgb(mode: str) -> None:
    image, expected = MODES[mode]
    raw = encoded(image, "PNG")
    assert Image.open(io.BytesIO(raw)).mode == mode
    assert np.asarray(decode_image(raw, "row 0")).reshape(4, 3).tolist() == expected


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_an_image_mode_in_a_lossless_webp_converts_to_its_expected_rgb(mode: str) -> None:
    image, expected = MODES[mode]
    raw = encoded(image, "WEBP", lossless=True, exact=True)
    assert np.asarray(decode_image(raw, "row 0")).reshape(4, 3).tolist() == expected


@pytest.mark.parametrize("mode", ["L", "CMYK", "YCbCr"])
def test_an_image_mode_in_a_jpeg_converts_to_its_expected_rgb(mode: str) -> None:
    value = {"L": 100, "CMYK": (0, 255, 255, 0), "YCbCr": (76, 85, 255)}[mode]
    expected = {"L": [100, 100, 100], "CMYK": [255, 0, 0], "YCbCr": [254, 0, 0]}[mode]
    raw = encoded(Image.new(mode, (16, 16), value), "JPEG", quality=100)
    assert Image.open(io.BytesIO(raw)).mode == ("RGB" if mode == "YCbCr" else mode)
    decoded = np.asarray(decode_image(raw, "row 0")).astype(int)
    assert np.abs(decoded - expected).max() <= 1


def test_all_16_bit_levels_round_to_the_nearest_8_bit_level() -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    decoded = decode_image(encoded(Image.fromarray(levels), "PNG"), "row 0")
    expected = np.rint(levels.astype(float) * 255 / 65535)
    assert np.array_equal(np.asarray(decoded)[..., 0], expected)


def test_16_bits_are_scaled_a_strip_at_a_time() -> None:
    levels = np.random.default_rng(0).integers(0, 65536, (2 * STRIP + 3, 900), dtype=np.uint16)
    levels[:, 0] = 514
    image = Image.fromarray(levels)
    image.info["transparency"] = 514
    expected = np.where(levels == 514, 255, np.rint(levels.astype(float) * 255 / 65535))
    assert np.array_equal(np.asarray(to_rgb(image))[..., 1], expected)
    large = Image.new("I;16", (1_500, 1_500))
    tracemalloc.start()
    try:
        to_rgb(large)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 1_500 * 1_500  # integers of the whole image are as many, and three of them


def test_the_transparent_colour_of_a_png_is_white() -> None:
    eight = Image.fromarray(np.array([[5, 6], [7, 255]], dtype=np.uint8))
    assert np.asarray(decode_image(encoded(eight, "PNG", transparency=6), "row 0"))[0].tolist() == (
        grey(5, 255)
    )
    sixteen = Image.fromarray(np.array([[257, 514], [771, 65535]], dtype=np.uint16))
    raw = encoded(sixteen, "PNG", transparency=514)
    assert Image.open(io.BytesIO(raw)).info["transparency"] == 514
    assert np.asarray(decode_image(raw, "row 0"))[0].tolist() == grey(1, 255)


# what the four corners (top left, top right, bottom left, bottom right) of ABCD become
TURNED = {1: "ABCD", 2: "BADC", 3: "DCBA", 4: "CDAB", 5: "ACBD", 6: "CADB", 7: "DBCA", 8: "BDAC"}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", TURNED)
def test_every_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    small = of("RGB", [A, B, C, D])
    image = small.resize((32, 48), Image.Resampling.NEAREST)
    options = {"PNG": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    decoded = decode_image(encoded(image, kind, exif=exif, **options[kind]), "row 0")
    assert decoded.size == ((32, 48) if orientation < 5 else (48, 32))
    width, height = decoded.size
    corners = [(1, 1), (width - 2, 1), (1, height - 2), (width - 2, height - 2)]
    found = np.array([decoded.getpixel(corner) for corner in corners])
    expected = np.array([{"A": A, "B": B, "C": C, "D": D}[name] for name in TURNED[orientation]])
    assert np.abs(found - expected).max() <= (4 if kind == "JPEG" else 0)
