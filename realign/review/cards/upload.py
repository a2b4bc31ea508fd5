"""The files of a folder to upload, and refusals of those that must not leave this machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from shlex import quote
from typing import Any

from realign.data.dataset import read_records
from realign.data.decisions import apply_decisions, decisions_path, read_decisions
from realign.data.records import texts_of
from realign.errors import RefusedError
from realign.review.cards.licence import read_metadata
from realign.review.cards.place import CARD, PARQUET, ModelPlace, Place
from realign.review.cards.run_facts import checkpoint_facts
from realign.review.cards.weights import check_weights
from realign.runtime.strict_json import read_json

PICTURES = ("*.png", "*.jpg", "*.jpeg", "*.webp", "*.gif", "*.svg")  # which a card may show
TEXTS = ("*.md", "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")
OF_MODELS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", *TEXTS, *PICTURES)
OF_DATASETS = (PARQUET, *TEXTS, *PICTURES)
TEMPLATES = "additional_chat_templates"
# files that belong to a run or to a machine; the first matching pattern gives the reason
REFUSED = (
    (".env*", "secrets"),
    (".*", "a hidden file"),
    ("__pycache__", "a cache"),
    ("*cache*", "a cache"),
    ("optimizer*", "the state of an optimizer"),
    ("scheduler*", "the state of an optimizer"),
    ("rng_state*", "the state of an optimizer"),
    ("state", "the state of an optimizer"),
    ("global_step*", "the state of an optimizer"),
    ("trainer_state.json", "the state of a trainer"),
    ("manifest.json", "the state of a trainer"),
    *((f"*.{kind}", "a pickle") for kind in ("bin", "pt", "pth", "pkl", "pickle", "ckpt")),
)
# files whose values are pieces of text, some of which look like paths
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")
_PATH = re.compile(r"(/[^/\s]+/|~/|[A-Za-z]:[\\/]|\\\\|file://)\S*")


@dataclass(frozen=True)
class Upload:
    """The files to upload.

    Attributes:
        folder: Folder of the files.
        repo_type: ``model`` or ``dataset``.
        files: Path below the folder to size in bytes.
        left_out: Names of files and folders that are not uploaded.
    """

    folder: Path
    repo_type: str
    files: dict[str, int]
    left_out: list[str]

    @classmethod
    def of(cls, place: Place) -> Upload:
        """Check a folder and return its files to upload, without uploading any.

        Raises:
            RefusedError: The folder has no card with a licence, its data are incomplete, or it
                holds something that must not leave this machine.
        """
        if isinstance(place, ModelPlace):
            upload = cls(place.folder, "model", dict(_of_model(place.folder)), [])
        else:
            files = dict(_of_dataset(place.folder))
            left = sorted(path.name for path in place.folder.iterdir() if path.name not in files)
            upload = cls(place.folder, "dataset", files, left)
        _check_card(place.folder)
        for name in upload.files:
            if name.endswith(".json") and name not in VOCABULARIES:
                _check_paths(read_json(place.folder / name), str(place.folder / name))
        if isinstance(place, ModelPlace):  # last: it reads all weights
            facts = checkpoint_facts(place.run) if place.run else {}
            check_weights(place.folder, facts.get("weights", {}))
        else:
            _check_rows(place.folder)
        return upload


def _of_model(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield every file of a model's folder; refuse one that is not part of a model."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name == TEMPLATES:
            for inner in sorted(path.iterdir()):
                if not inner.is_file() or inner.suffix != ".jinja":
                    raise _stray(folder, inner, "no part of a model")
                yield f"{TEMPLATES}/{inner.name}", inner.stat().st_size
            continue
        for pattern, kind in REFUSED:
            if fnmatch(path.name, pattern):
                raise _stray(folder, path, kind)
        if path.is_dir() or not any(fnmatch(path.name, pattern) for pattern in OF_MODELS):
            raise _stray(folder, path, "no part of a model")
        yield path.name, path.stat().st_size


def _stray(folder: Path, path: Path, kind: str) -> RefusedError:
    return RefusedError(
        f"{folder} must hold a model and its card alone to be pushed, got {path.name}, {kind}. "
        "Move it away, or give the checkpoint/ of a run that has ended."
    )


def _of_dataset(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield the rows and the texts about them, but not the stages of a build."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in OF_DATASETS):
            yield path.name, path.stat().st_size


def _check_rows(folder: Path) -> None:
    """Read all texts; refuse rows that were dropped by hand or name paths of this machine."""
    file = folder / PARQUET
    records = read_records(file, None)
    if not len(records):
        raise RefusedError(f"data {file} must have at least one row, got none. Give another.")
    decisions = read_decisions(decisions_path(folder))
    if dropped := len(records) - len(apply_decisions(records, decisions).kept):
        raise RefusedError(
            f"{file} must not hold rows that were dropped, got {dropped} that "
            f"{decisions_path(folder).name} drops. Give the same `realign build` again, which "
            "leaves them out, or change the decisions in `realign browse`."
        )
    for record in texts_of(records):
        _check_paths(record.meta, f"{record.where}, meta")


def _check_paths(value: Any, place: str, key: str = "") -> None:
    """Refuse JSON with an absolute path, useless elsewhere and perhaps with private names."""
    if isinstance(value, str) and _PATH.fullmatch(value):
        where = f"{key or 'value'} in {place}" if key else place
        raise RefusedError(
            f"{where} must not be a path of this machine to be pushed, got {value!r}. "
            + (
                "Set it to the hub id of the base."
                if key == "base_model_name_or_path"
                else "Correct it or remove it."
            )
        )
    if isinstance(value, dict):
        for name, item in value.items():
            _check_paths(item, place, str(name))
    if isinstance(value, list):
        for item in value:
            _check_paths(item, place, key)


def _check_card(folder: Path) -> None:
    card = folder / CARD
    if not card.is_file():
        raise RefusedError(
            f"{folder} requires a card, has no {CARD}. Write one: realign card "
            f"{quote(str(folder))} --license ID."
        )
    if not read_metadata(card).get("license"):
        raise RefusedError(
            f"{card} requires a licence, has none. Write it again with realign card "
            f"{quote(str(folder))} --license ID, or add a line `license: ID` to its metadata."
        )
