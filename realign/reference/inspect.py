"""Description and verification of caches, without loading a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from realign.errors import RefusedError
from realign.modeling.identity import Identity
from realign.modeling.memory import size
from realign.reference.shards import shard_paths
from realign.reference.store import (
    DAMAGED,
    IDENTITY,
    MANIFEST,
    Manifest,
    check_identity,
    read_committed_shard,
    read_identity,
    read_manifest,
)


def cache_folders(root: Path) -> list[Path]:
    """Return the identities' folders in a cache: ``root`` itself, or those inside it.

    Raises:
        RefusedError: There is none.
    """
    names = (IDENTITY, MANIFEST, "shards")
    if any((root / name).exists() for name in names):
        return [root]
    found = {path.parent for name in names for path in root.glob(f"*/{name}")}
    if not found:
        raise RefusedError(
            f"cache must be a folder of `realign cache`, got {root}, which holds none. Check the "
            "path."
        )
    return sorted(found)


def verify_cache(root: Path) -> list[str]:
    """Check every byte of every identity in a cache.

    Returns:
        One line per identity, each of which is intact.
    Raises:
        RefusedError: Files are damaged or missing; the message names all of them.
    """
    lines, wrong = [], []
    for place in cache_folders(root):
        if problems := list(_problems(place)):
            wrong += problems
            continue
        manifest = read_manifest(place)
        assert manifest is not None
        lines.append(
            f"{place}: whole, {manifest.rows} rows in {len(manifest.shards)} shards, root "
            f"{manifest.root}"
        )
    if wrong:
        raise RefusedError("\n".join([f"cache {root} is not whole:", *wrong, *lines]))
    return lines


def _problems(place: Path) -> Iterator[str]:
    """Yield every problem of an identity's folder."""
    try:
        manifest, identity = read_manifest(place), read_identity(place)
        if manifest is None:
            yield f"{place} is unfinished: it has no {MANIFEST}. Run `realign cache` again."
            return
        check_identity(place, identity, manifest)
    except RefusedError as error:
        yield str(error)
        return
    cells = int(identity["semantics"]["cells"])
    for entry in manifest.shards:
        try:
            read_committed_shard(place, entry, manifest, cells)
        except RefusedError as error:
            yield str(error)


def describe_cache(root: Path) -> Iterator[str]:
    """Yield lines on the identity, the size and the probe of a cache, without verifying it."""
    for place in cache_folders(root):
        identity, manifest = read_identity(place), read_manifest(place)
        yield f"{place}"
        yield from _state(place, manifest)
        yield "  computed from:"
        yield from _fields({part: identity[part] for part in ("semantics", "numerics")}, "    ")


def _state(place: Path, manifest: Manifest | None) -> Iterator[str]:
    if manifest is None:
        num_shards = len(list(shard_paths(place)))
        yield f"  unfinished: {num_shards} shards so far. Run `realign cache` again"
        return
    num_bytes = sum(shard.bytes for shard in manifest.shards)
    yield f"  {manifest.rows} rows in {len(manifest.shards)} shards, {size(num_bytes)}"
    yield f"  written by {manifest.written_by}, root {manifest.root}"
    if manifest.probe is None:
        yield "  imported: not probed"
    else:
        probe = manifest.probe
        rms, largest = (", ".join(f"{x:.2g}" for x in probe[name]) for name in ("rms", "max"))
        yield (
            f"  probe: {probe['rows']} rows computed alone differ by {rms} nats (rms, by cell), "
            f"{largest} at most"
        )
    committed = {shard.file for shard in manifest.shards}
    if uncommitted := sum(path.name not in committed for path in shard_paths(place)):
        yield f"  {uncommitted} more shards of a build that was stopped: run `realign cache` again"
    if (place / DAMAGED).is_dir():
        yield f"  damaged files were set aside in {place / DAMAGED}"


def _fields(fields: Identity, indent: str) -> Iterator[str]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from _fields(value, indent + "  ")
        else:
            yield f"{indent}{name}: {_shown(value)}"


def _shown(value: Any) -> str:
    text = str(value)
    return f"sha256 {text[:16]}" if len(text) == 64 else text
