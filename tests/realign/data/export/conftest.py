"""Datasets to export: the authors' JSON with everything that it may hold, and built records."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest


def turns(question: str, answer: str, *earlier: str) -> list[dict[str, Any]]:
    """A conversation of the authors' layout."""
    texts = [*earlier, question, answer]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture
def official_rows(tmp_path: Path, records) -> list[dict[str, Any]]:
    """Rows in every spelling that imports, beside ``images/``."""
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    names = ("a.png", "COCO train.png", "deep/ü.png", "again.png", "x..png", "noending")
    for name, record in zip(names, records(len(names)), strict=True):
        (folder / name).write_bytes(record.images[0])
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    image, retrieved = {"image": "a.png"}, {"retrieved_image": "COCO train.png"}

    def pair(question: str, *earlier: str) -> dict[str, Any]:
        return {
            "chosen": turns(question, "Yes.", *earlier),
            "rejected": turns(question, "No.", *earlier),
        }

    odd = pair("<image>\nQ?")
    odd["chosen"][1] = {"content": "Yes.", "role": "assistant", "weight": 0.5}
    return [
        {**image, **retrieved, **pair("<image>\nPlain?")},
        {"id": "named", **image, **retrieved, **pair("<image>\nNamed?")},
        {"id": 7, **image, "retrieved_image": "copy2.png", **pair("<image>\nNumber?")},
        {**pair("<image>\nOrder?"), **retrieved, **image},
        {**image, **retrieved, **pair("Where?\n<image>"), "extra": {"z": [1.5, None], "a": "ü"}},
        {**image, **retrieved, **pair("<image>No line?  ")},
        {**image, **retrieved, **pair("No placeholder?")},
        {**image, **retrieved, **pair("And then?", "<image>\nFirst?", " Answer. ")},
        {**pair("Text only?"), "similarity": 0.93},
        {**image, **retrieved, **odd},
        {"image": "deep/ü.png", "retrieved_image": "./again.png", **pair("<image>\nPaths?")},
        {"image": "x..png", "retrieved_image": "noending", **pair("<image>\nNames?")},
    ]


@pytest.fixture
def official(tmp_path: Path, official_rows) -> Path:
    """The file of :func:`official_rows`."""
    folder = tmp_path / "images"
    (folder / "copy2.png").write_bytes((folder / "again.png").read_bytes())
    path = tmp_path / "pref_data.json"
    path.write_text(json.dumps(official_rows))
    return path


@pytest.fixture
def built(records) -> list[Any]:
    """Records as `realign build` leaves them: two with one name for two images, one without
    names.
    """
    first, second, third, fourth = records(4)
    sources = [
        {"file": "s.jsonl", "index": 0, "image": "same.png", "retrieved_image": "other.png"},
        {"file": "s.jsonl", "index": 1, "image": "same.png", "retrieved_image": "other.png/x"},
        {"file": "s.jsonl", "index": 2, "image": "../out.png", "retrieved_image": "/abs.png"},
    ]
    named = [
        dataclasses.replace(record, id=str(i), meta={"source": source})
        for i, (record, source) in enumerate(zip((first, second, third), sources, strict=True))
    ]
    multi = (
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi."},
        *fourth.prompt,
    )
    return [*named, dataclasses.replace(fourth, id="fourth", prompt=multi)]
