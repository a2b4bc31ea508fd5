"""Safetensors files with a hash of their arrays and of the arrays' origin, so that every changed
byte is noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from realign.runtime.files import canonical_json, content_sha256

SCHEMA = 2
ORIGIN = "origin"  # one entry of metadata: safetensors writes several in an order that changes
Arrays = Mapping[str, NDArray[Any]]


def encode_arrays(arrays: Arrays, origin: Mapping[str, Any]) -> bytes:
    """Return the content of a file; equal arrays of the same origin give equal bytes.

    Args:
        arrays: Arrays by name.
        origin: Everything that the arrays depend on; anything that JSON can hold.
    """
    return save(dict(arrays), {ORIGIN: canonical_json(_sealed(arrays, origin))})


def load_arrays(
    path: Path, origin: Mapping[str, Any], differences: Mapping[str, str]
) -> Arrays | str:
    """Return the arrays of a file, or the reason why it cannot be used.

    Args:
        path: The file.
        origin: Origin that the arrays must have.
        differences: Reason to return if a field of ``origin`` differs, by the field's name.
    """
    if not path.is_file():
        return "it does not exist"
    try:
        found = read_origin(path)
        if found["schema"] != SCHEMA:
            return f"it is of schema {found['schema']}, this version reads {SCHEMA}"
        for name, difference in differences.items():
            if found[name] != origin[name]:
                return difference
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        return f"it is damaged ({error})"
    if found != _sealed(arrays, origin):
        return "it is damaged (its bytes are not those of its hash)"
    return arrays


def read_origin(path: Path) -> dict[str, Any]:
    """Return the origin of a file's arrays, without reading them.

    Raises:
        SafetensorError, OSError, KeyError, ValueError, TypeError: The file is missing or damaged.
    """
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
    # the first schema named the entry after the arrays
    return json.loads(metadata[ORIGIN]) if ORIGIN in metadata else {"schema": 1}


def _sealed(arrays: Arrays, origin: Mapping[str, Any]) -> dict[str, Any]:
    parts = [
        part
        for name in sorted(arrays)
        for part in (
            name,
            str(arrays[name].dtype),
            str(arrays[name].shape),
            array_sha256(arrays[name]),
        )
    ]
    return {**origin, "schema": SCHEMA, "content": content_sha256(*parts)}


def array_sha256(array: np.ndarray) -> str:
    """Return the SHA-256 of an array's bytes."""
    return hashlib.sha256(array.tobytes()).hexdigest()
