"""Copies of an image have nearly the same hash, and other images do not."""

from __future__ import annotations

import io
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from realign.data.perceptual_hash import NEAR_BITS, hamming, perceptual_hash


def photo(seed: int) -> Image.Image:
    """Noise with the spectrum of photographs, which falls with the frequency."""
    rng = np.random.default_rng(seed)
    height, width = 240, 320
    spectrum = np.fft.rfft2(rng.standard_normal((height, width, 3)), axes=(0, 1))
    rows = np.fft.fftfreq(height)[:, None, None] * height
    columns = np.fft.rfftfreq(width)[None, :, None] * width
    spectrum /= (1 + np.hypot(rows, columns)) ** 1.5
    pixels = np.fft.irfft2(spectrum, s=(height, width), axes=(0, 1))
    pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()) * 255
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    return [photo(seed) for seed in range(50)]


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def resized(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)))


COPIES = {
    "jpeg 50": lambda image: jpeg(image, 50),
    "jpeg 90": lambda image: jpeg(image, 90),
    "quarter": lambda image: resized(image, 0.25),
    "half": lambda image: resized(image, 0.5),
    "larger": lambda image: resized(image, 1.7),
    "half, jpeg 50": lambda image: jpeg(resized(image, 0.5), 50),
    "brighter": lambda image: image.point(lambda value: value * 0.8 + 40),
    "grey": lambda image: image.convert("L"),
}


@pytest.mark.parametrize("copy", COPIES)
def test_copies_of_an_image_have_near_hashes(photos: list[Image.Image], copy: str) -> None:
    for image in photos:
        bits = hamming(perceptual_hash(image), perceptual_hash(COPIES[copy](image)))
        assert bits <= NEAR_BITS


def test_other_images_have_far_hashes(photos: list[Image.Image]) -> None:
    hashes = [perceptual_hash(image) for image in photos]
    distances = [hamming(a, b) for a, b in combinations(hashes, 2)]
    assert min(distances) > 2 * NEAR_BITS
    assert 28 < np.mean(distances) < 36  # half of the bits, as of random numbers


def test_a_uniform_image_has_a_hash_free_of_rounding_noise() -> None:
    hashes = {perceptual_hash(Image.new("RGB", (64, 48), level)) for level in ("red", "grey")}
    assert hashes == {0}


def test_the_transform_is_the_orthonormal_cosine_transform() -> None:
    from realign.data.perceptual_hash import _cosines

    cosines = _cosines()
    assert np.allclose(cosines @ cosines.T, np.eye(9))
    place = np.arange(32)
    assert np.allclose(cosines[3] * 4, np.cos(np.pi * 3 * (place + 0.5) / 32))


def test_the_distance_counts_differing_bits() -> None:
    assert hamming(0b1011, 0b0010) == 2
    assert hamming((1 << 64) - 1, 0) == 64
