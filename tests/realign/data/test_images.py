"""Images from untrusted datasets."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from realign.data import images as images_module
from realign.data.image_names import resolve_image
from realign.data.images import decode_image, image_size
from realign.errors import RefusedError


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_plain_rgb_is_unchanged() -> None:
    image = Image.new("RGB", (4, 3), (10, 20, 30))
    assert decode_image(encoded(image), "row 0").tobytes() == image.tobytes()


def test_transparent_pixels_are_composited_on_white() -> None:
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert decode_image(encoded(image), "row 0").getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_saturated() -> None:
    grey = np.full((2, 2), 257 * 100, dtype=np.uint16)
    decoded = decode_image(encoded(Image.fromarray(grey)), "row 0")
    assert decoded.getpixel((0, 0)) == (100, 100, 100)


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate a quarter
    image = Image.new("RGB", (20, 10))
    assert decode_image(encoded(image, "JPEG", exif=exif), "row 0").size == (10, 20)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_in_the_header_is_that_of_the_decoded_image(
    tmp_path: Path, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encoded(Image.new("RGB", (20, 10)), "JPEG", exif=exif)
    (tmp_path / "a.jpg").write_bytes(raw)
    assert image_size(tmp_path / "a.jpg") == decode_image(raw, "row 0").size


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "row 7: image must be a readable JPEG, PNG, WEBP file, got no bytes. Replace"),
        (b"not an image", "row 7: image must be a readable .*got 12 bytes that begin with b'not"),
        (encoded(Image.new("RGB", (4, 4)), "GIF"), "row 7: image must be a readable"),
        (encoded(Image.new("RGB", (64, 64), (1, 2, 3)), "JPEG")[:300], "row 7: image is damaged"),
    ],
    ids=["empty", "text", "gif", "cut"],
)
def test_unreadable_images_are_refused(raw: bytes, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        decode_image(raw, "row 7")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_image_always_gives_the_same_message(kind: str) -> None:
    rng = np.random.default_rng(0)
    raw = encoded(Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)), kind)
    for length in range(0, len(raw) - 20, 7):
        messages = set()
        for _ in range(2):
            with pytest.raises(RefusedError, match=r"^row 1, a\.png: image .*or remove") as refused:
                decode_image(raw[:length], "row 1, a.png")
            messages.add(str(refused.value))
        assert len(messages) == 1
        assert " at 0x" not in messages.pop()


def test_animations_are_refused() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    raw = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    with pytest.raises(RefusedError, match="must have one frame, got 2"):
        decode_image(raw, "row 0")


def photograph(orientation: int = 1) -> tuple[bytes, Image.Image]:
    """A JPEG as phones write it, with a smaller picture behind it; and its first picture."""
    noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    first = Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112] = orientation
    preview = Image.new("RGB", (20, 10), "blue")
    raw = encoded(first, "MPO", save_all=True, append_images=[preview], exif=exif)
    with Image.open(io.BytesIO(raw)) as image:
        assert (image.format, image.n_frames) == ("MPO", 2)
    alone = decode_image(encoded(first, "JPEG", exif=exif), "row 0")
    return raw, alone


@pytest.mark.parametrize("orientation", [1, 6])
def test_the_first_picture_of_a_multi_picture_jpeg_is_used(orientation: int) -> None:
    raw, alone = photograph(orientation)
    decoded = decode_image(raw, "row 0")
    assert decoded.size == ((40, 30) if orientation == 1 else (30, 40))
    assert decoded.size == image_size(io.BytesIO(raw))
    assert decoded.tobytes() == alone.tobytes()


def test_a_multi_picture_jpeg_is_read_without_its_later_pictures_or_index() -> None:
    raw, alone = photograph()
    behind = raw.index(b"\xff\xd8\xff", 3)
    index = raw.index(b"MPF\0") + 4
    broken_index = raw[:index] + b"\xff" * 40 + raw[index + 40 :]
    for changed in (raw[: behind + 200], raw[:behind], raw + b"a film" * 99, broken_index):
        assert decode_image(changed, "row 0").tobytes() == alone.tobytes()
        assert image_size(io.BytesIO(changed)) == alone.size
    with pytest.raises(RefusedError, match="row 0: image is damaged"):
        decode_image(raw[: behind - 200], "row 0")


@pytest.mark.parametrize(
    ("begins", "kind"),
    [
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"\0\0\0\x18ftypmif1", "HEIC"),
        (b"\0\0\0\x18ftypavif", "AVIF"),
        (b"\0\0\0\x18ftypcrx ", "TIFF or camera raw"),
        (b"II*\0", "TIFF or camera raw"),
        (b"GIF89a", "GIF"),
        (b"BM", "BMP"),
        (b"\xff\x4f\xff\x51", "JPEG 2000 or XL"),
    ],
)
def test_unsupported_formats_are_refused_with_a_remedy(begins: bytes, kind: str) -> None:
    with pytest.raises(RefusedError, match=f"got a file of the format {kind}. Convert it to JPEG"):
        decode_image(begins + bytes(100), "row 0")


def test_a_cmyk_jpeg_is_converted_to_rgb() -> None:
    raw = encoded(Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK"), "JPEG")
    pixel = decode_image(raw, "row 0").getpixel((8, 8))
    assert np.abs(np.subtract(pixel, (200, 30, 60))).max() <= 3


def test_phone_photographs_are_within_the_pixel_limit() -> None:
    raw = encoded(Image.new("L", (8064, 6048)), "JPEG")  # 48 megapixels
    assert decode_image(raw, "row 0").size == (8064, 6048)


def test_images_beyond_the_size_limits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = encoded(Image.new("RGB", (20, 20)))
    monkeypatch.setattr(images_module, "MAX_PIXELS", 399)
    with pytest.raises(RefusedError, match=r"at most 399 pixels, got \(20, 20\)"):
        decode_image(raw, "row 0")
    monkeypatch.setattr(images_module, "MAX_BYTES", 10)
    with pytest.raises(RefusedError, match="at most 10 bytes"):
        decode_image(raw, "row 0")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("http://example.org/a.png", "must be a file name, got the URL"),
        ("data:image/png;base64,AAAA", "must be a file name, got the URL"),
        ("../secret.png", "must lie inside"),
        ("/etc/hostname", "must lie inside"),
        ("link.png", "must lie inside"),
        ("missing.png", "'missing.png' does not exist"),
    ],
)
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "secret.png").write_bytes(b"x")
    root = tmp_path / "images"
    root.mkdir()
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(RefusedError, match=f"^row 3: .*{message}"):
        resolve_image(root, name, "row 3")
