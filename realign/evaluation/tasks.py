"""The questions of an evaluation, read and checked before any model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from realign.data.images import check_image_root, decode_image, resolve_image
from realign.errors import RefusedError
from realign.evaluation.pope import SPLITS
from realign.runtime.files import content_sha256, iter_jsonl, read_json
from realign.runtime.progress import announce

Question = tuple[str, str]  # image name, text

Task = list[dict[str, Any]]


TASKS = (*(f"pope_{split}" for split in SPLITS), "chair")


def read_tasks(data: Path) -> dict[str, Task]:
    """Read those of the three POPE files and the CHAIR file that a folder has, and say which it has
    not.

    Raises:
        RefusedError: All are missing, one is empty or not JSON lines, or a row lacks a key or has a
            value that it cannot have.
    """
    there = [task for task in TASKS if (data / f"{task}.jsonl").is_file()]
    names = [f"{task}.jsonl" for task in TASKS]
    if not there:
        raise RefusedError(
            f"data must hold {', '.join(names[:-1])} or {names[-1]}, got {data}, which has none. "
            "Write at least one; the README says what a line holds."
        )
    if len(there) < len(TASKS):
        absent = [name for task, name in zip(TASKS, names, strict=True) if task not in there]
        announce(f"not measured, since {data} does not hold them: {', '.join(absent)}")
    tasks = {}
    for task in there:
        path = data / f"{task}.jsonl"
        tasks[task] = _read_lines(path)
        if not tasks[task]:
            raise RefusedError(
                f"{path} must have at least one line, has none. Add some or remove it."
            )
        for number, row in enumerate(tasks[task], start=1):
            _check_row(row, f"{path.name}, line {number}", is_caption=task == "chair")
    return tasks


def _read_lines(path: Path) -> Task:
    rows = []
    for _, row in iter_jsonl(path):
        if isinstance(row, RefusedError):
            raise row
        rows.append(row)
    return rows


def _check_row(row: Any, where: str, *, is_caption: bool) -> None:
    keys = ("image", "text", "objects" if is_caption else "label")
    if not isinstance(row, dict):
        raise RefusedError(
            f"{where} must be an object with {list(keys)}, got {row!r:.80}. Correct the line."
        )
    if missing := [key for key in keys if key not in row]:
        raise RefusedError(f"{where}: keys {missing} are missing, found {sorted(row)}. Add them.")
    if not isinstance(row["text"], str) or not row["text"].strip():
        raise RefusedError(
            f"{where}: text must be a non-empty string, got {row['text']!r:.80}. Fill it in."
        )
    if is_caption and not _is_list_of_strings(row["objects"]):
        raise RefusedError(
            f"{where}: objects must be a list of strings, got {row['objects']!r:.80}. "
            "Put each into quotes and all into brackets."
        )
    if not is_caption and row["label"] not in ("yes", "no"):
        raise RefusedError(
            f"{where}: label must be yes or no, got {row['label']!r}. Correct it or remove the "
            "line."
        )


def _is_list_of_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def read_synonyms(data: Path, captions: Task) -> dict[str, list[str]]:
    """Read the objects of CHAIR with their synonyms.

    Raises:
        RefusedError: The file is missing or has another form, or a caption's row names an object
            that is not in it, which would count as never named.
    """
    path = data / "chair_objects.json"
    if not path.is_file():
        raise RefusedError(
            f"data must hold {path.name} beside chair.jsonl, {data} does not. Write "
            'object -> synonyms, as in {"dog": ["dog", "puppy"]}.'
        )
    synonyms = read_json(path)
    if not isinstance(synonyms, dict) or not all(map(_is_list_of_strings, synonyms.values())):
        raise RefusedError(f"{path} must map each object to a list of its synonyms. Correct it.")
    for number, row in enumerate(captions, start=1):
        if unknown := sorted({*row["objects"]} - synonyms.keys()):
            raise RefusedError(
                f"chair.jsonl, line {number}: objects must be keys of {path.name}, got "
                f"{unknown[0]!r}. Add it there."
            )
    return synonyms


def check_images(tasks: dict[str, Task], images: Path) -> dict[str, str]:
    """Decode every image once; return image name to SHA-256 of the file.

    Raises:
        RefusedError: An image is missing or unreadable.
    """
    check_image_root(images)
    digests: dict[str, str] = {}
    for task, rows in tasks.items():
        for number, row in enumerate(rows, start=1):
            where = f"{task}.jsonl, line {number}"
            path = resolve_image(images, row["image"], where)
            if row["image"] not in digests:
                raw = path.read_bytes()
                decode_image(raw, f"{where}, {row['image']}")
                digests[row["image"]] = content_sha256(raw)
    return digests
