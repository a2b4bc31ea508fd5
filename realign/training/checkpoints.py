"""Checkpoint folders that are whole or absent, and the search for the newest intact one.

    steps/checkpoint-12/model.safetensors, ...   what transformers.Trainer writes
    steps/checkpoint-12/state/                   optimizer, schedule and random state, no pickle
    steps/checkpoint-12/manifest.json            written last: every file with its size and SHA-256
    steps/.saving/                               a checkpoint that is being written

A folder is written under another name, every file and folder is synced, and the folder is renamed:
``kill -9``, power loss or a full disk at any moment leaves the older checkpoints unchanged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from realign.runtime.files import file_sha256, json_text, publish, remove_folder, write_text

MANIFEST = "manifest.json"
SAVING = ".saving"
SCHEMA = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_HASHING_THREADS = 4  # hashing releases the interpreter lock; a large model has several files


def checkpoint_step(path: Path) -> int:
    """Return the step of a checkpoint folder, from its name.

    Raises:
        ValueError: Its name is not ``checkpoint-STEP``.
    """
    found = _NAME.fullmatch(path.name)
    if not found:
        raise ValueError(f"a checkpoint folder must be called checkpoint-STEP, got {path.name!r}.")
    return int(found[1])


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders in a folder, intact or not, oldest step first."""
    found = (path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name))
    return sorted((path for path in found if path.is_dir()), key=checkpoint_step)


def seal(written: Path, place: Path) -> None:
    """Turn a written folder into a checkpoint: sync it, write its manifest and rename it.

    Args:
        written: The folder as it was written, on the same disk as ``place``.
        place: ``.../checkpoint-STEP``, which is replaced if it exists.
    Raises:
        OSError: Something could not be written; ``place`` is unchanged.
    """
    files = sorted(path for path in written.rglob("*") if path.is_file())

    def entry(path: Path) -> tuple[str, dict[str, int | str]]:
        facts: dict[str, int | str] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        return path.relative_to(written).as_posix(), facts

    with ThreadPoolExecutor(_HASHING_THREADS) as threads:
        entries = dict(threads.map(entry, files))
    manifest = {"schema": SCHEMA, "step": checkpoint_step(place), "files": entries}
    write_text(written / MANIFEST, _rendered(manifest))
    publish(written, place)


def _rendered(manifest: dict[str, Any]) -> str:
    """Return the canonical text of a manifest, so that any changed byte is noticed."""
    return json_text(manifest, indent=2, ensure_ascii=True) + "\n"


def damage(checkpoint: Path) -> str | None:
    """Return how a damaged checkpoint differs from its manifest; None if it is intact."""
    manifest = checkpoint / MANIFEST
    try:
        text = manifest.read_text(encoding="utf-8")
        content = json.loads(text)
        schema, step, files = content["schema"], content["step"], content["files"]
        known = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is not readable ({type(error).__name__}: {error})"
    if text != _rendered(content):
        return f"{MANIFEST} was changed after it was saved"
    if schema != SCHEMA:
        return f"{MANIFEST} has schema {schema}, this version reads {SCHEMA}"
    if step != checkpoint_step(checkpoint):
        return f"{MANIFEST} is of step {step}"
    if not files:
        return f"{MANIFEST} names no file"

    def check(item: tuple[str, tuple[int, str]]) -> str | None:
        name, (size, digest) = item
        path = checkpoint / name
        try:
            if (found := path.stat().st_size) != size:
                return f"{name} has {found} bytes, {size} were written"
            return None if file_sha256(path) == digest else f"{name} was changed after it was saved"
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, ValueError) as error:
            return f"{name} is not readable ({error})"

    with ThreadPoolExecutor(_HASHING_THREADS) as threads:
        return next(filter(None, threads.map(check, known.items())), None)


def newest_checkpoint(folder: Path, warn: Callable[[str], None] = lambda _: None) -> Path | None:
    """Return the newest intact checkpoint, or None.

    Args:
        folder: Folder of a run's checkpoints.
        warn: Called with a sentence for every damaged checkpoint that is skipped.
    """
    for path in reversed(checkpoints(folder)):
        if (problem := damage(path)) is None:
            return path
        warn(f"checkpoint {path} is damaged: {problem}. An older one is used; it will be replaced.")
    return None


def prune(folder: Path, newest: Path, keep: int | None) -> None:
    """Remove the checkpoints that a new one replaces: all but the last ``keep``, and all of later
    steps, which are damaged or were written before the run was resumed from an earlier step.

    Args:
        folder: Folder of a run's checkpoints.
        newest: The checkpoint that was just written.
        keep: Number of checkpoints that stay, the new one included; None for all.
    """
    step = checkpoint_step(newest)
    older = [path for path in checkpoints(folder) if checkpoint_step(path) <= step]
    later = [path for path in checkpoints(folder) if checkpoint_step(path) > step]
    for path in later + (older[:-keep] if keep else []):
        remove_folder(path)
