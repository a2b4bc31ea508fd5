"""Reference log-probabilities, computed once a row and never used for anything else than they were
computed from.

    <root>/<identity16>/identity.json    what the numbers depend on: semantics and numerics
    <root>/<identity16>/shards/00003.safetensors   key u8[n, 32], logps f64[n, C], num_tokens i32[n,
    C]
    <root>/<identity16>/manifest.json    written last: every shard with its SHA-256

A row is found by the hash of its content, never by its position, so order, filtering and repetition
do not matter. Learning rate, beta, batch size, seed and output folder are not part of the identity:
they change nothing here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from accelerate.utils import send_to_device
from safetensors.torch import load_file, save_file
from torch import Tensor

from realign.check.rows import check_rows
from realign.collate import PreferenceCollator
from realign.config import CacheConfig
from realign.dataset import read_kept_records
from realign.errors import RefusedError
from realign.files import canonical_json, content_sha256, file_sha256, replacing, write_json
from realign.modeling import choose_dtype, load_model, load_processor, model_identity, resolve_model
from realign.numerics import numerics
from realign.progress import Progress
from realign.records import Record
from realign.run_folder import check_out
from realign.shared_prefix import why_not_shared

SCHEMA = 2
# what computes pixels and log-probabilities
Identity = dict[str, Any]


def reference_identity(
    folder: Path, *, cells: int, rejected_scoring: str, dtype: torch.dtype
) -> Identity:
    """Everything outside a row that its reference log-probabilities depend on."""
    return {
        "schema": SCHEMA,
        "semantics": {
            "cells": cells,
            "rejected_scoring": rejected_scoring,
            "scored": "last assistant turn and its end-of-turn token",
            "files": model_identity(folder),
        },
        "numerics": {
            "dtype": str(dtype).removeprefix("torch."),
            "attention": "sdpa",
            # the same configuration is another class, with other pixels, where torchvision is
            "image_processor": type(load_processor(folder).image_processor).__name__,
            **numerics(),
        },
    }


def identity_folder(root: Path, identity: Identity) -> Path:
    """Where the values of one identity live."""
    return root / content_sha256(canonical_json(identity))[:16]


def identity_differences(stored: Identity, needed: Identity, prefix: str = "") -> list[str]:
    """Fields that differ, each as ``name: stored, needed``."""
    lines = []
    for name in sorted(stored.keys() | needed.keys()):
        old, new = stored.get(name), needed.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += identity_differences(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name}: cached {_short(old)}, needed {_short(new)}")
    return lines


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


def build_cache(
    records: Sequence[Record],
    folder: Path,
    root: Path,
    *,
    cells: int,
    rejected_scoring: str,
    dtype: torch.dtype,
    batch_size: int,
    shard_size: int,
    max_length: int | None = None,
) -> Path:
    """Compute what is missing and return the identity's folder; a killed build continues where it
    stopped.

    Raises:
        RefusedError: A stored shard is damaged or a row is too long.
        FloatingPointError: A log-probability is not finite; nothing of its shard is stored.
    """
    identity = reference_identity(
        folder, cells=cells, rejected_scoring=rejected_scoring, dtype=dtype
    )
    place = identity_folder(root, identity)
    stored = _read_shards(place)
    missing: dict[str, int] = {}  # key to position; equal rows are computed once
    for index, record in enumerate(records):
        if record.key not in stored:
            missing.setdefault(record.key, index)
    if missing:
        model = load_model(folder, dtype)
        collator = PreferenceCollator(
            load_processor(folder),
            cells,
            max_length=max_length,
            shared_prefix=why_not_shared(model) is None,
        )
        write_json(place / "identity.json", identity)
        first = 1 + max(
            (int(path.stem) for path in (place / "shards").glob("*.safetensors")), default=-1
        )
        indices = list(missing.values())
        with Progress("cache", len(indices)) as progress:
            for number, start in enumerate(range(0, len(indices), shard_size), start=first):
                shard = [records[index] for index in indices[start : start + shard_size]]
                _write_shard(
                    place / "shards" / f"{number:05d}.safetensors",
                    shard,
                    model,
                    collator,
                    rejected_scoring,
                    batch_size,
                    progress,
                )
    shards = sorted((place / "shards").glob("*.safetensors"))
    manifest = {
        "rows": len(_read_shards(place)),
        "shards": {path.name: file_sha256(path) for path in shards},
    }
    write_json(place / "manifest.json", manifest)
    return place


@torch.inference_mode()
def _write_shard(
    path: Path,
    rows: Sequence[Record],
    model: torch.nn.Module,
    collator: PreferenceCollator,
    rejected_scoring: str,
    batch_size: int,
    progress: Progress,
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).eval()
    logps, num_tokens = [], []
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        batch = collator(chunk)
        ids = batch.pop("ids")
        output = model(**send_to_device(batch, device), rejected_scoring=rejected_scoring)
        bad = ~torch.isfinite(output.logps).all(dim=0)
        if bad.any():
            raise FloatingPointError(
                f"reference log-probabilities of row {ids[int(bad.nonzero()[0])]} are not finite."
            )
        logps.append(output.logps.double().T.cpu())
        num_tokens.append(output.num_tokens.int().T.cpu())
        progress.advance(len(chunk))
    keys = torch.tensor([list(bytes.fromhex(row.key)) for row in rows], dtype=torch.uint8)
    tensors = {
        "key": keys,
        "logps": torch.cat(logps).contiguous(),
        "num_tokens": torch.cat(num_tokens).contiguous(),
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary)


def _read_shards(place: Path) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for path, tensors in _shards(place):
        for key, logps in zip(tensors["key"].numpy(), tensors["logps"], strict=True):
            values[key.tobytes().hex()] = logps
            if not math.isfinite(logps.sum()):
                raise RefusedError(
                    f"{path} holds a log-probability that is not finite. Delete the file and rerun."
                )
    return values


def _shards(place: Path) -> Iterator[tuple[Path, Mapping[str, Tensor]]]:
    manifest_path = place / "manifest.json"
    known = json.loads(manifest_path.read_text())["shards"] if manifest_path.is_file() else {}
    for name in known:
        if not (place / "shards" / name).is_file():
            raise RefusedError(
                f"{place} lacks shard {name} of its manifest. Delete manifest.json and rerun the "
                f"cache."
            )
    for path in sorted((place / "shards").glob("*.safetensors")):
        if path.name in known and file_sha256(path) != known[path.name]:
            raise RefusedError(
                f"{path} was changed after it was written. Delete it and manifest.json, and rerun."
            )
        try:
            yield path, load_file(path)
        except safetensors.SafetensorError as error:
            raise RefusedError(
                f"{path} is not a readable shard ({error}). Delete it and rerun."
            ) from None


def read_cache(root: Path, records: Sequence[Record], identity: Identity) -> dict[str, Tensor]:
    """Return ``record.key`` to reference log-probabilities, shape ``(C,)`` float64, for all
    records.

    Raises:
        RefusedError: The cache is of another model, template, scoring or numerics (each difference
            is named), it does not exist, is unfinished, damaged, or lacks a row.
    """
    if not root.is_dir():
        raise RefusedError(
            f"cache must be a folder of `realign cache`, got {root}, which does not exist. Check "
            "--cache, or leave it out to have the references computed."
        )
    # what `realign cache` prints is one identity's folder; --out, which may hold several, is above
    is_identity = (root / "identity.json").is_file()
    place = root if is_identity else identity_folder(root, identity)
    fits = not is_identity or json.loads((root / "identity.json").read_text()) == identity
    if not fits or not (place / "manifest.json").is_file():
        others = [
            json.loads(path.read_text())
            for path in sorted(root.glob("identity.json" if is_identity else "*/identity.json"))
            if not fits or path.parent != place
        ]
        nearest = min(
            (identity_differences(other, identity) for other in others), key=len, default=[]
        )
        why = (
            "it is unfinished"
            if fits and place.is_dir()
            else "it was computed from something else"
            if others
            else "it is empty"
        )
        detail = "".join(f"\n  {line}" for line in nearest) if why != "it is unfinished" else ""
        raise RefusedError(
            f"cache {root} does not fit this run: {why}.{detail}\nRun `realign cache` for this "
            f"model."
        )
    values = _read_shards(place)
    found: dict[str, Tensor] = {}
    missing = []
    for record in records:  # once: it may read them from the disk
        if record.key in values:
            found[record.key] = values[record.key]
        else:
            missing.append(record.id)
    if missing:
        raise RefusedError(
            f"cache {root} lacks {len(missing)} of {len(records)} rows, first: row {missing[0]}. "
            "The row was edited or added since; run `realign cache` again."
        )
    return found


def cache(config: CacheConfig) -> Path:
    """The verb ``realign cache``: compute the reference log-probabilities of a dataset. Returns
    the cache's folder.
    """
    check_out(config.out)
    folder = resolve_model(config.model)
    records = read_kept_records(config.data, config.images)
    check_rows(records, load_processor(folder), cells=config.cells, max_length=config.max_length)
    return build_cache(
        records,
        folder,
        config.out,
        cells=config.cells,
        rejected_scoring=config.rejected_scoring,
        dtype=choose_dtype(config.dtype),
        batch_size=config.batch_size,
        shard_size=config.shard_size,
        max_length=config.max_length,
    )
