"""CHAIR: the objects of a caption that are not in the image (Rohrbach et al. 2018), and those of
the image that it names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from realign.errors import RefusedError
from realign.evaluation.benchmark import Array, Benchmark, Layout, Prompt, Rule, TableRow, View
from realign.evaluation.object_words import check_words, mentioned, mentions, object_of
from realign.evaluation.rows import Key, Row, read_rows
from realign.runtime.strict_json import read_json

FILES = ("chair.jsonl", "chair_objects.json")
CHAIR_I = "CHAIR_i, named objects that are not there"
RECALL = "recall, objects there that are named"


def _is_list_of_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


OBJECTS = Key(
    _is_list_of_strings, "be a list of strings", "Put each into quotes and all into brackets."
)


def read(path: Path) -> list[Row]:
    """Read the captions to ask for. Every row holds the synonyms of all objects, and the objects in
    its image by their names in that list.

    Raises:
        RefusedError: A file is missing or has another form, an object has no word that a caption
            could name, or a row has an object that is not in the list.
    """
    rows = read_rows(path, objects=OBJECTS)
    synonyms_path = path.with_name(FILES[1])
    if not synonyms_path.is_file():
        raise RefusedError(
            f"data must hold {FILES[1]} beside {FILES[0]}, {path.parent} does not. Write "
            'object -> synonyms, as in {"dog": ["dog", "puppy"]}.'
        )
    synonyms = read_json(synonyms_path)
    if not isinstance(synonyms, dict) or not all(map(_is_list_of_strings, synonyms.values())):
        raise RefusedError(
            f"{synonyms_path} must map each object to a list of its synonyms. Correct it."
        )
    for name, words in synonyms.items():
        check_words(name, words, str(synonyms_path))
    for row in rows:
        found = {name: object_of(name, synonyms) for name in row["objects"]}
        if unknown := sorted(name for name, known in found.items() if known is None):
            raise RefusedError(
                f"{row['where']}: objects must be keys of {FILES[1]}, got {unknown[0]!r}, which is "
                "none of them or the word of several. Add it there."
            )
        row["objects"] = [*dict.fromkeys(found.values())]
        row["synonyms"] = synonyms
    return rows


def caption_counts(row: Row, caption: str) -> list[int]:
    """Count the objects named, named but absent, present, present and named."""
    named, present = mentioned(caption, row["synonyms"]), {*row["objects"]}
    return [len(named), len(named - present), len(present), len(named & present)]


def chair_metrics(counts: Array) -> Mapping[str, Array]:
    """Return, from summed counts, the share of the named objects that are absent and the share of
    the present objects that are named.
    """
    named, absent, present, found = np.moveaxis(counts, -1, 0)
    return {"chair_i": absent / named, "recall": found / present}


def show(row: Row, caption: str) -> View:
    """Mark every word for an absent object."""
    absent = mentioned(caption, row["synonyms"]) - {*row["objects"]}
    words = {word.lower() for name in absent for word in row["synonyms"][name]}
    words |= {word for word, names in mentions(caption, row["synonyms"]) if names & absent}
    truth = f"in the image: {', '.join(row['objects'])}"
    return View(truth, not absent, tuple(sorted(words)))


CHAIR = Benchmark(
    name="chair",
    title="CHAIR",
    layouts=[Layout({"chair": FILES}, read)],
    rules={"object-list": Rule(caption_counts, chair_metrics)},
    table=[
        TableRow(
            "chair",
            "object-list",
            "chair_i",
            CHAIR_I,
            more_is_better=False,
            is_headline=True,
            undefined="no object was named",
        ),
        TableRow(
            "chair",
            "object-list",
            "recall",
            RECALL,
            is_headline=True,
            undefined="no image has an object to name",
        ),
    ],
    prompts={
        "official": Prompt(max_new_tokens=512),
        "lmms-eval": Prompt(lambda row: "Please describe this image in detail.", 2048),
    },
    image_places=lambda row: (row["image"], f"val2014/{row['image']}"),
    samples={"chair": show},
    less_is_better=("chair_i",),
)
