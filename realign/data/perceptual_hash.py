"""Perceptual hash of 64 bits: resized or recompressed copies of an image differ in few of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from PIL import Image

# largest number of differing bits of copies, see tests/realign/data/test_perceptual_hash.py
NEAR_BITS = 6
_SIDE = 32
_KEPT = 8  # number of lowest frequencies in each direction


def perceptual_hash(image: Image.Image) -> int:
    """Return the pHash of an image: whether each of the first 8 x 8 coefficients of the discrete
    cosine transform of its grey 32 x 32 version is above their median.

    The constant coefficient, which is only the brightness, is replaced by the next diagonal one.
    """
    grey = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    cosines = _cosines()
    frequencies = cosines @ np.asarray(grey, dtype=np.float64) @ cosines.T
    low = frequencies[:_KEPT, :_KEPT].copy()
    low[0, 0] = frequencies[_KEPT, _KEPT]
    # in an image of one colour the coefficients are rounding errors, whose order would be noise
    low = np.round(low, 3)
    bits = (low > np.median(low)).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def hamming(a: int, b: int) -> int:
    """Return the number of bits in which two hashes differ."""
    return (a ^ b).bit_count()


@cache
def _cosines() -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the first rows of the orthonormal DCT-II of 32 values."""
    angles = np.outer(np.arange(_KEPT + 1.0), 2 * np.arange(_SIDE) + 1.0) * np.pi / (2 * _SIDE)
    rows: np.ndarray[Any, np.dtype[np.float64]] = np.cos(angles) * np.sqrt(2 / _SIDE)
    rows[0] /= np.sqrt(2)
    return rows
