"""Output folders that belong to one run: the same command continues the run, and any other command
is refused before it writes anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from realign.errors import RefusedError
from realign.runtime.files import canonical_json, content_sha256, is_unfinished, write_json
from realign.runtime.lock import locked

# Files that each command writes into its folder beside <verb>.json, and which another run must not
# mix with its own. Reference log-probabilities are not listed, since they are found by content.
WRITES: Mapping[str, tuple[str, ...]] = {
    "build": (
        *("rejected.jsonl", "images", "source_images", "annotated", "masked", "embeddings"),
        *("neighbours", "shards", "journal", "dataset.parquet", "funnel.json"),
    ),
    "train": (
        *("row_index.json", "accepted_numerics.json", "steps", ".checkpoint.tmp"),
        *("checkpoint.json", "checkpoint", "metrics.jsonl"),
    ),
    "eval": ("answers", "journal", "unpacked", "samples", "scores.json"),
    "demo": (
        *("world", "dataset", "train.json", "row_index.json", "steps", ".checkpoint.tmp"),
        *("checkpoint.json", "checkpoint", "metrics.jsonl"),
        *("shortcut.parquet", "compare", "logs", "eval", "summary.json", "report.html"),
    ),
    "experiment": ("pairs", "runs", "seconds"),
}

# found by their content, so they may exist before a run has its folder
WRITTEN_BEFORE = {"images", "source_images"}


def check_out(folder: Path) -> None:
    """Refuse an output folder that is a file or lies below one.

    Raises:
        RefusedError: A file is in the way; the message names it.
    """
    for place in (folder, *folder.parents):
        if place.is_dir():
            return
        if place.exists() or place.is_symlink():
            raise RefusedError(
                f"out must be a folder, got {folder}, but {place} is a file. Choose another --out."
            )


def is_begun(folder: Path, verb: str) -> bool:
    """Return whether any run of the command has claimed the folder.

    Raises:
        RefusedError: No run has claimed the folder, but it holds files of such a run.
    """
    if (folder / f"{verb}.json").is_file():
        return True
    _check_leftovers(folder, verb)
    return False


Labels = Mapping[str, Sequence[str]]


def claim(folder: Path, verb: str, facts: Mapping[str, Any], labels: Labels | None = None) -> bool:
    """Write ``<verb>.json`` into ``folder``; return whether the same run had claimed it before.

    Arguments and errors are those of :func:`is_claimed`.
    """
    if is_claimed(folder, verb, facts, labels):
        return True
    write_json(folder / f"{verb}.json", {name: _brief(value) for name, value in facts.items()})
    return False


@contextmanager
def only_run(folder: Path, verb: str) -> Iterator[None]:
    """Lock a folder, so that two processes do not do the same work. The system releases the lock
    when the process ends, even if it is killed. Unfinished files of an earlier, killed run are
    removed.

    Raises:
        RefusedError: Another process holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    refusal = (
        f"out {folder} must be written by one `realign {verb}` at a time, another one is "
        "running. Wait for it, or choose another folder."
    )
    with locked(folder / f".{verb}.lock", refusal=refusal):
        _remove_unfinished(folder, verb)
        yield


def _remove_unfinished(folder: Path, verb: str) -> None:
    """Remove the unfinished files of a killed run; the lock guarantees that no other run writes."""
    for name in {f"{verb}.json", *WRITES[verb]} - WRITTEN_BEFORE:
        for path in (*folder.glob(f".{name}.*.tmp"), *(folder / name).rglob(".*.tmp")):
            if is_unfinished(path):
                path.unlink(missing_ok=True)


def is_claimed(
    folder: Path, verb: str, facts: Mapping[str, Any], labels: Labels | None = None
) -> bool:
    """Return whether the same run has claimed ``folder``. Nothing is written, so that further
    checks can follow before :func:`claim`.

    Args:
        folder: The output folder.
        verb: The command.
        facts: Everything that the result depends on. A long list is stored as its hash.
        labels: Name of a list of hashes in ``facts`` to the names of its items in messages, such as
            row ids.
    Raises:
        RefusedError: The folder holds another run of the command; the message names the
            differences.
    """
    path = folder / f"{verb}.json"
    needed = {name: _brief(value) for name, value in facts.items()}
    if not is_begun(folder, verb):
        return False
    stored = _read_record(path)
    if stored == needed:
        return True
    if stored.get("schema", 1) != needed.get("schema", 1):
        raise RefusedError(
            f"{path} must be of schema {needed.get('schema', 1)}, got {stored.get('schema', 1)}: "
            "another version of realign began this run. Go on with that version, or choose "
            "another --out."
        )
    lines = list(_differences(stored, needed, facts, labels or {}))
    raise RefusedError(
        f"out {folder} holds another run of `realign {verb}`:\n" + "\n".join(lines) + "\n"
        f"Choose another folder, or {_how_to_remove(folder, verb)}; nothing of it was changed."
    )


def _read_record(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # neither JSON nor UTF-8
        stored = None
    if isinstance(stored, dict):
        return stored
    raise RefusedError(
        f"{path} must be the record of a run, got a damaged file. Choose another folder, or "
        f"{_how_to_remove(path.parent, path.stem)}."
    )


def _check_leftovers(folder: Path, verb: str) -> None:
    """Refuse files without a record of their run, which this run would mistake for its own."""
    written = set(WRITES[verb]) - WRITTEN_BEFORE
    if left := sorted(name for name in written if (folder / name).exists()):
        raise RefusedError(
            f"out {folder} holds {', '.join(left)} of a run of `realign {verb}` without its "
            f"{verb}.json. Choose another folder, or remove them."
        )


def _how_to_remove(folder: Path, verb: str) -> str:
    """Return a remedy that names the files of the run, since the folder may also hold others."""
    is_folder = {path.name: path.is_dir() for path in sorted(folder.iterdir())}
    its = [name for name in (f"{verb}.json", *WRITES[verb]) if name in is_folder]
    names = ", ".join(f"{name}/" if is_folder[name] else name for name in its)
    its.append(f".{verb}.lock")  # the run's own too, but removing it is not necessary
    others = [f"{name}/" if is_folder[name] else name for name in is_folder if name not in its]
    keep = f" and keep {', '.join(others)}, not part of that run" if others else ""
    return f"remove {names} of that run{keep}"


def _brief(value: Any) -> Any:
    plain = json.loads(canonical_json(value))
    if isinstance(plain, dict):
        return {name: _brief(item) for name, item in plain.items()}
    return (
        content_sha256(canonical_json(plain))[:16]
        if isinstance(plain, list) and len(plain) > 8
        else plain
    )


def _differences(
    stored: Mapping[str, Any], needed: Mapping[str, Any], facts: Mapping[str, Any], labels: Labels
) -> Iterator[str]:
    """Yield one line per difference."""
    for name in sorted(stored.keys() | needed.keys()):
        if stored.get(name) == needed.get(name):
            continue
        if name in labels and name in stored:
            yield f"  {name}: {_of_items(stored[name], facts[name], labels[name])}"
        else:
            yield from _lines(name, stored.get(name, _ABSENT), needed.get(name, _ABSENT))


_ABSENT: Any = object()


def _lines(name: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key, _ABSENT) != new.get(key, _ABSENT):
                yield from _lines(f"{name}.{key}", old.get(key, _ABSENT), new.get(key, _ABSENT))
    elif old is _ABSENT:
        yield f"  {name}: not stored, requested" + ("" if isinstance(new, dict) else f" {new}")
    elif new is _ABSENT:
        yield f"  {name}: stored{'' if isinstance(old, dict) else f' {old}'}, not requested"
    else:
        yield f"  {name}: stored {old}, requested {new}"


def _of_items(old: list[str] | str, new: Sequence[str], labels: Sequence[str]) -> str:
    """Describe how many items of a list differ, and the first one; of a long list only the hash is
    stored.
    """
    if isinstance(old, str):
        return f"others stored, or in another order, {len(new)} requested"
    known = set(old)
    added = [label for key, label in zip(new, labels, strict=True) if key not in known]
    removed = len(known - {*new})
    found = f"{len(old)} stored, {len(new)} requested"
    if added:
        found += f"; {len(added)} requested but not stored, first: {added[0]}"
    if removed:
        found += f"; {removed} stored but not requested"
    return found if added or removed else f"{found}; repeated or in another order"
