"""500 malformed images of ten kinds: no crash, no hang, limited memory and the right code."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from realign.data.image_pool import ImagePool
from realign.data.images import MAX_PIXELS, ImageFacts, RefusedImage

KINDS = ("JPEG", "PNG", "WEBP")
TIMES = 50
Malformed = tuple[bytes, set[str]]  # and the codes that are right; "" for an image all the same


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(rng: Random, mode: str = "RGB") -> Image.Image:
    width, height = rng.randrange(16, 80), rng.randrange(16, 80)
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.frombuffer(rng.randbytes(width * height * channels), dtype=np.uint8)
    return Image.fromarray(pixels.reshape(height, width, channels), mode)


def good(rng: Random) -> bytes:
    return encoded(noise(rng), rng.choice(KINDS))


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A grey PNG that says it has that size, and the given chunks."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, body in ((b"IHDR", head), *chunks, (b"IEND", b"")):
        parts.append(struct.pack(">I", len(body)) + name + body)
        parts.append(struct.pack(">I", zlib.crc32(name + body)))
    return b"".join(parts)


def jpeg(width: int, height: int) -> bytes:
    """A JPEG whose header was given another size."""
    raw = bytearray(encoded(Image.new("RGB", (32, 32)), "JPEG"))
    start = raw.index(b"\xff\xc0")
    raw[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(raw)


def webp(width: int, height: int) -> bytes:
    """A WebP whose canvas was given another size."""
    raw = bytearray(encoded(Image.new("RGBA", (32, 32), (1, 2, 3, 4)), "WEBP", exif=b"Exif\0\0"))
    start = raw.index(b"VP8X")
    raw[start + 12 : start + 18] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(
        3, "little"
    )
    return bytes(raw)


def of_size(rng: Random, width: int, height: int) -> bytes:
    kinds = [png, *([jpeg] if max(width, height) < 65536 else [])]
    return rng.choice(kinds)(width, height)


def truncated(rng: Random, number: int) -> Malformed:
    raw = good(rng)
    return raw[: rng.randrange(len(raw) - 20)], {"format", "damaged"}


def bit_flips(rng: Random, number: int) -> Malformed:
    """JPEG and WebP have no checksum: what decodes to other pixels cannot be known."""
    kind = KINDS[number % 3]
    raw = bytearray(encoded(noise(rng), kind))
    for _ in range(rng.randrange(1, 9)):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    codes = {"format", "damaged", "too-many-pixels", "side", "frames", "metadata"}
    return bytes(raw), codes | {""}


def zero_bytes(rng: Random, number: int) -> Malformed:
    return bytes(rng.choice((0, 1, 12, 5000))), {"format"}


def wrong_extension(rng: Random, number: int) -> Malformed:
    texts = (b"<html><body>404</body></html>", b'{"a": 1}', b"PK\x03\x04", b"\x80\x04\x95", b"%PDF")
    return rng.choice(texts) + rng.randbytes(rng.randrange(2000)), {"format"}


def bombs_by_header(rng: Random, number: int) -> Malformed:
    width = rng.randrange(4500, 20_001)
    height = rng.randrange(min(20_000, MAX_PIXELS // width + 1), 20_001)
    make = (png, jpeg, webp)[number % 3]
    # of a canvas and a frame that differ, libwebp says that the file is damaged
    codes = {"too-many-pixels"} if make is not webp else {"too-many-pixels", "damaged", "format"}
    return make(width, height), codes if width * height > MAX_PIXELS else {"damaged", *codes}


def sides(rng: Random, number: int) -> Malformed:
    """One pixel wide, or wider than any picture; where the area is a bomb too, either is right."""
    if number % 2:
        size = [1, rng.randrange(1, 500)]
        rng.shuffle(size)
        return encoded(Image.new("RGB", tuple(size)), rng.choice(KINDS)), {"side"}
    size = [rng.randrange(20_001, 2**31 if number % 4 else 65_000), rng.randrange(2, 2000)]
    rng.shuffle(size)
    return of_size(rng, *size), {"side", "too-many-pixels"}


def animated(rng: Random, number: int) -> Malformed:
    frames = [noise(rng).resize((20, 20)) for _ in range(rng.randrange(2, 6))]
    kind = ("PNG", "WEBP", "GIF")[number % 3]
    raw = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    return raw, {"format" if kind == "GIF" else "frames"}


def other_formats(rng: Random, number: int) -> Malformed:
    kinds = ("GIF", "TIFF", "BMP", "EPS", "PPM", "ICO", "TGA", "PCX", "SGI", "JPEG2000")
    if kinds[number % 10] == "EPS":
        return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n" + rng.randbytes(99), {"format"}
    return encoded(noise(rng), kinds[number % 10]), {"format"}


def huge_metadata(rng: Random, number: int) -> Malformed:
    body = zeros(rng.choice((8, 20, 100)))
    pixels = (b"IDAT", zlib.compress((b"\0" + bytes(8)) * 8))
    if number % 5 == 0:
        return png(8, 8, (b"zTXt", b"a\0\0" + body), pixels), {"metadata"}
    if number % 5 == 1:
        return png(8, 8, (b"iTXt", b"a\0\1\0\0\0" + body), pixels), {"metadata"}
    if number % 5 == 2:  # a profile is not used, and not unpacked further than allowed
        return png(8, 8, (b"iCCP", b"a\0\0" + body), pixels), {"metadata", "damaged", ""}
    if number % 5 == 3:
        raw = encoded(noise(rng), "JPEG", comment=rng.randbytes(60_000), icc_profile=bytes(400_000))
        return raw, {""}
    # each allowed, together too much
    return png(8, 8, *[(b"zTXt", b"a\0\0" + zeros(1))] * 70, pixels), {"metadata"}


@cache
def zeros(megabytes: int) -> bytes:
    """A bomb that unpacks to so much."""
    return zlib.compress(bytes((megabytes << 20) - 1))


def garbage_after_magic(rng: Random, number: int) -> Malformed:
    magic = (
        b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0",
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b"RIFF\xff\xff\0\0WEBPVP8 ",
        b"RIFF\xff\xff\0\0WEBPVP8X\x0a\0\0\0",
        b"\xff\xd8\xff\xe1\xff\xffExif\0\0II*\0\x08\0\0\0\xff\xff",
    )[number % 5]
    codes = {"format", "damaged", "side", "too-many-pixels", "metadata"}
    return magic + rng.randbytes(rng.randrange(4000)), codes


CLASSES: tuple[Callable[[Random, int], Malformed], ...] = (
    *(truncated, bit_flips, zero_bytes, wrong_extension, bombs_by_header),
    *(sides, animated, other_formats, huge_metadata, garbage_after_magic),
)


@pytest.fixture(scope="module")
def pool():
    with ImagePool(2) as pool:
        yield pool


@pytest.mark.parametrize("make", CLASSES, ids=lambda make: make.__name__)
def test_malformed_images_have_the_right_code(make, pool: ImagePool) -> None:
    cases = [make(Random(f"{make.__name__} {number}"), number) for number in range(TIMES)]
    asked = [pool.submit(raw, f"{make.__name__} {number}") for number, (raw, _) in enumerate(cases)]
    for number, (future, (_, codes)) in enumerate(zip(asked, cases, strict=True)):
        found = future.result()
        if isinstance(found, RefusedImage):
            assert found.code in codes, (number, str(found))
            assert str(found).startswith(f"{make.__name__} {number}: image ")
            assert " at 0x" not in str(found)
        else:
            assert isinstance(found, ImageFacts)
            assert "" in codes, number
    # no worker has ever taken two gigabytes, which are two million kB
    processes = [worker._process for worker in pool._crew if worker._process is not None]
    assert processes
    for process in processes:
        status = Path(f"/proc/{process.pid}/status").read_text()
        (most,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
        assert 0 < int(most.split()[1]) < 2 << 20


def test_five_hundred_malformed_images_are_tested() -> None:
    assert len(CLASSES) * TIMES == 500
