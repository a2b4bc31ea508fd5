"""A server that decodes the data URL as servers do sees what training sees."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from realign.data.images import decode_image
from realign.errors import RefusedError
from realign.generation.endpoint_generator import image_url


def received(url: str) -> tuple[str, bytes]:
    head, _, data = url.partition(";base64,")
    return head, base64.b64decode(data, validate=True)


def noise(mode: str, size: tuple[int, int] = (24, 16)) -> Image.Image:
    pixels = Random(0).randbytes(size[0] * size[1] * 4)
    image = Image.frombytes("RGBA", size, pixels)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


@pytest.mark.parametrize(
    ("mode", "form", "head"),
    [
        ("RGB", "PNG", "data:image/png"),
        ("L", "PNG", "data:image/png"),
        ("RGB", "JPEG", "data:image/jpeg"),
        ("RGB", "WEBP", "data:image/webp"),
    ],
)
def test_plain_image_files_are_sent_unchanged(
    tmp_path: Path, mode: str, form: str, head: str
) -> None:
    path = tmp_path / "image"
    noise(mode).save(path, form)
    assert received(image_url(path)) == (head, path.read_bytes())


@pytest.mark.parametrize(
    ("mode", "form"),
    [("RGBA", "PNG"), ("RGBA", "WEBP"), ("P", "PNG"), ("1", "PNG"), ("CMYK", "JPEG")],
)
def test_other_image_files_are_sent_as_training_decodes_them(
    tmp_path: Path, mode: str, form: str
) -> None:
    path = tmp_path / "image"
    noise(mode).save(path, form)
    assert_same_picture(path)


def test_a_transparent_colour_is_sent_as_white(tmp_path: Path) -> None:
    path = tmp_path / "image"
    Image.new("RGB", (4, 4), "red").save(path, "PNG", transparency=(255, 0, 0))
    assert_same_picture(path)
    with Image.open(io.BytesIO(received(image_url(path))[1])) as sent:
        assert sent.getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_images_are_sent_scaled(tmp_path: Path) -> None:
    path = tmp_path / "image"
    Image.new("I;16", (4, 4), 257 * 100).save(path, "PNG")
    assert_same_picture(path)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_photo_with_exif_rotation_is_sent_upright(tmp_path: Path, orientation: int) -> None:
    path = tmp_path / "image"
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise("RGB").save(path, "JPEG", exif=exif)
    assert_same_picture(path)


def assert_same_picture(path: Path) -> None:
    head, raw = received(image_url(path))
    assert head == "data:image/png"
    assert raw != path.read_bytes()
    with Image.open(io.BytesIO(raw)) as sent:
        expected = decode_image(path.read_bytes(), "image")
        assert sent.convert("RGB").tobytes() == expected.tobytes()


def test_the_size_of_a_sent_image_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "image"
    noise("RGB", (200, 200)).save(path, "PNG")
    size = path.stat().st_size
    head, raw = received(image_url(path, max_bytes=size - 1))
    assert head == "data:image/jpeg"
    assert len(raw) < size
    assert decode_image(raw, "").size == (200, 200)
    with pytest.raises(RefusedError, match=r"image: image must fit into 1000 bytes .* Shrink it"):
        image_url(path, max_bytes=1000)


def test_a_damaged_image_is_not_sent(tmp_path: Path) -> None:
    path = tmp_path / "image"
    noise("RGB").save(path, "PNG")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(RefusedError, match="image is damaged"):
        image_url(path)
