"""CHAIR as it was published (Rohrbach et al. 2018): captions of COCO images, and the objects that
they mention but that neither the annotators marked nor one of five people wrote of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from realign.errors import RefusedError
from realign.evaluation import nltk_words
from realign.evaluation.benchmark import (
    AnswerFormat,
    Array,
    Benchmark,
    Layout,
    Prompt,
    Record,
    Rule,
    TableRow,
)
from realign.evaluation.caption_words import caption_tokens, pattern_singular, wordnet_singular
from realign.evaluation.rows import Key, Row, check_row
from realign.runtime.progress import announce
from realign.runtime.strict_json import iter_members, read_json

SPLITS = ("val", "train")
INSTANCES = tuple(f"instances_{split}2014.json" for split in SPLITS)
CAPTIONS = tuple(f"captions_{split}2014.json" for split in SPLITS)
SYNONYMS, IMAGE_IDS = "synonyms.txt", "image_ids.txt"
FILES = (*INSTANCES, *CAPTIONS, SYNONYMS)

_LISTED = (
    "motor bike, motor cycle, air plane, traffic light, street light, traffic signal, stop light, "
    "fire hydrant, stop sign, parking meter, suit case, sports ball, baseball bat, baseball glove, "
    "tennis racket, wine glass, hot dog, cell phone, mobile phone, teddy bear, hair drier, potted "
    "plant, laptop computer, home plate, train track"
)
_ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub"
# two words that are one, and which
_PAIRS = {
    **{pair: pair for pair in _LISTED.split(", ")},
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS.split()},
    **{f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")},
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",
}

_TAKE = "Take the published file."
_INTEGER = Key(lambda value: type(value) is int, "be an integer", _TAKE)
_STRING = Key(lambda value: isinstance(value, str), "be a string", _TAKE)
_IMAGE = re.compile(r"(?:.*/)?(?:COCO_(?:train|val)2014_)?0*(\d+)(?:\.\w+)?")


def image_key(value: Any) -> str:
    """Return the number of a COCO image as text, from a number or a file name.

    Example::

        >>> image_key(42), image_key("COCO_val2014_000000000042.jpg")
        ('42', '42')
    """
    found = _IMAGE.fullmatch(str(value))
    return found.group(1) if found else str(value)


def read_synonyms(path: Path) -> dict[str, str]:
    """Return word to object, with the faults of the program: a second space after a comma and
    capital letters are kept in the word, which therefore never matches.

    Raises:
        RefusedError: A line is empty.
    """
    objects = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        words = line.strip().split(", ")
        if not words[0]:
            raise RefusedError(f"{path.name}, line {number} must hold words, got none. {_TAKE}")
        objects.update(dict.fromkeys(words, words[0]))
    return objects


def mentions(words: Sequence[str], objects: Mapping[str, str]) -> list[str]:
    """Return the object of every mention, in order, from the words of a caption in the singular."""
    joined: list[str] = []
    i = 0
    while i < len(words):
        pair = " ".join(words[i : i + 2])
        joined.append(_PAIRS.get(pair, words[i]))
        i += 2 if pair in _PAIRS else 1
    if "toilet" in joined:  # its seat is no chair
        joined = [word for word in joined if word != "seat"]
    return [objects[word] for word in joined if word in objects]


def pattern_words(caption: str) -> list[str]:
    """Return the words of a caption as the official program has them."""
    return [pattern_singular(token) for token in caption_tokens(caption.lower())]


def noun_words(caption: str) -> list[str]:
    """Return the words of a caption, lemmatized as nouns as lmms-eval does."""
    return [wordnet_singular(token) for token in caption_tokens(caption.lower())]


def read(path: Path, named: Callable[[], Collection[str]]) -> list[Row]:
    """Read the objects in the images that ``image_ids.txt`` lists, or else that answers name.

    Args:
        path: ``instances_val2014.json``; the other files lie beside it, and ``synonyms.txt`` and
            ``image_ids.txt`` there or in the folder above it.
        named: Function that returns the numbers of the images that answers name.
    Returns:
        rows: One for each of these images that COCO has, with its objects and those of all words.
    Raises:
        RefusedError: A file is missing or has another form, or a listed image is none of COCO's.
    """
    for name in (*INSTANCES, *CAPTIONS):
        if not path.with_name(name).is_file():
            raise RefusedError(
                f"data requires {name} beside {path.name}, got none. Add it; COCO publishes the "
                "files in annotations_trainval2014.zip."
            )
    synonyms = _beside_or_above(path, SYNONYMS)
    if synonyms is None:
        raise RefusedError(
            f"data requires {SYNONYMS} beside {path.name} or in the folder above it, got none. Add "
            "the file of the repository LisaAnne/Hallucination."
        )
    objects = read_synonyms(synonyms)
    listed = _beside_or_above(path, IMAGE_IDS)
    ids = {*_image_ids(listed)} if listed else {*named()}
    announce(f"read the annotations of COCO for {len(ids):,} images; that takes about a minute")
    rows: dict[int, Row] = {}
    for name in INSTANCES:
        _read_instances(path.with_name(name), ids, objects, rows)
    if listed and (unknown := ids - {row["id"] for row in rows.values()}):
        raise RefusedError(
            f"{listed.name} must list images of COCO, got {min(unknown)!r}, which none of "
            f"{' and '.join(INSTANCES)} has. Correct it."
        )
    for name in CAPTIONS:
        for _, record in iter_members(path.with_name(name), ["annotations"]):
            if _is_of(record, "image_id", rows):
                keys = {"image_id": _INTEGER, "caption": _STRING}
                caption = check_row(record, f"{name}, an annotation", keys)
                named_objects = mentions(pattern_words(caption["caption"]), objects)
                rows[caption["image_id"]]["objects"].update(named_objects)
    return [*rows.values()]


def _beside_or_above(path: Path, name: str) -> Path | None:
    places = (path.with_name(name), path.parents[1] / name)
    return next((place for place in places if place.is_file()), None)


def _image_ids(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").split()
    if not lines:
        raise RefusedError(f"{path} must list at least one image, got none. Add some or remove it.")
    return [image_key(line) for line in lines]


def _read_instances(
    path: Path, ids: Collection[str], objects: Mapping[str, str], rows: dict[int, Row]
) -> None:
    """Add a row for every wanted image of a file, with the objects that are marked in it."""
    names: dict[int, str] = {}
    marked: dict[int, set[int]] = {}  # categories by image; their names may come last in the file
    wanted = {int(number) for number in ids if number.isdecimal()}
    for kind, record in iter_members(path, ["images", "annotations", "categories"]):
        where = f"{path.name}, an entry of {kind}"
        if kind == "categories":
            category = check_row(record, where, {"id": _INTEGER, "name": _STRING})
            if category["name"] not in objects:
                raise RefusedError(
                    f"{where}: name must be a word of {SYNONYMS}, got {category['name']!r}. {_TAKE}"
                )
            names[category["id"]] = objects[category["name"]]
        elif kind == "annotations" and _is_of(record, "image_id", wanted):
            mark = check_row(record, where, {"image_id": _INTEGER, "category_id": _INTEGER})
            marked.setdefault(mark["image_id"], set()).add(mark["category_id"])
        elif kind == "images" and _is_of(record, "id", wanted):
            image = check_row(record, where, {"id": _INTEGER, "file_name": _STRING})
            rows[image["id"]] = {
                "id": str(image["id"]),
                "image": image["file_name"],
                "text": "",  # no prompt is published
                "objects": set(),
                "words": objects,
                "where": f"{path.name}, image {image['id']}",
            }
    for image_id, categories in marked.items():
        if unknown := categories - names.keys():
            raise RefusedError(
                f"{path.name}: category_id must be one of its categories, got {min(unknown)}. "
                f"{_TAKE}"
            )
        if image_id in rows:
            rows[image_id]["objects"].update(names[category] for category in categories)


def _is_of(record: Any, key: str, wanted: Collection[int]) -> bool:
    """Return whether a record is of a wanted image, or has no image and is to be refused."""
    number = record.get(key) if isinstance(record, dict) else None
    return type(number) is not int or number in wanted


def counts(words_of: Callable[[str], list[str]], row: Row, caption: str) -> list[int]:
    """Return the counts of a caption, in this order: captions (1), mentions, mentions of absent
    objects, captions with such a mention (0 or 1), objects in the image, mentioned ones, and words.
    """
    mentioned, present = mentions(words_of(caption), row["words"]), row["objects"]
    absent = sum(name not in present for name in mentioned)
    return [
        1,
        len(mentioned),
        absent,
        int(absent > 0),
        len(present),
        len(present & {*mentioned}),
        len(caption.split()),
    ]


def metrics(sums: Array) -> Mapping[str, Array]:
    """Return the shares of captions and of mentions in percent, and the length of captions."""
    captions, mentioned, absent, with_absent, present, found, words = np.moveaxis(sums, -1, 0)
    return {
        "chair_s": 100 * with_absent / captions,
        "chair_i": 100 * absent / mentioned,
        "recall": 100 * found / present,
        "objects_per_caption": mentioned / captions,
        "words_per_caption": words / captions,
    }


def read_official_captions(path: Path) -> list[tuple[str, Record]] | None:
    """Read the official form of captions, ``{"overall": ..., "imgToEval": {...}}``; return None
    where a file has another one.
    """
    if not path.is_file() or not re.search(rb'"imgToEval"\s*:', path.read_bytes()):
        return None
    content = read_json(path)
    records = content.get("imgToEval") if isinstance(content, dict) else None
    if not isinstance(records, dict) or not records:
        raise RefusedError(
            f"{path} must hold the captions of at least one image by imgToEval, got "
            f"{records!r:.60}. Correct it."
        )
    return [
        (f"{path.name}, {name}", check_row(record, f"{path.name}, {name}", {}))
        for name, record in records.items()
    ]


def _format(field: str, answer: str, *others: str) -> AnswerFormat:
    """Return a format in which a field names the image."""

    def key(record: Record) -> str:
        return image_key(record[field])

    return AnswerFormat((field, *others, answer), answer, key, lambda row: row["id"])


_NOTE = (
    "Every mention counts. The images are those of image_ids.txt, or else those that the answers "
    "name. chair_s and chair_i grow with the length of captions, so compare captions of one prompt "
    "and one max_new_tokens. If no object is mentioned, the program divides by 0. "
    "objects_per_caption and words_per_caption are numbers. "
)

CHAIR_COCO = Benchmark(
    name="chair",
    title="CHAIR",
    layouts=[
        Layout({"chair-coco": FILES}, read, takes_named=True),
        Layout({"chair-coco": (f"annotations/{INSTANCES[0]}",)}, read, takes_named=True),
    ],
    rules={
        "official": Rule(
            partial(counts, pattern_words),
            metrics,
            unit="percent",
            note=f"{_NOTE}Words that the program turns into a wrong singular, such as bus and "
            "canoes, are missed.",
        ),
        "lmms-eval": Rule(
            partial(counts, nltk_words.lemmas),
            metrics,
            unit="percent",
            needs_packages=True,
            note=f"{_NOTE}Uses NLTK's lemmas by part of speech: bus is found, men and vases are "
            "missed, and the word seated counts as a chair.",
        ),
        "lmms-eval-nouns": Rule(
            partial(counts, noun_words),
            metrics,
            unit="percent",
            note=f"{_NOTE}As lmms-eval, but without NLTK: every word is treated as a noun.",
        ),
    },
    table=[
        TableRow(
            "chair-coco",
            "official",
            metric,
            label,
            more_is_better=metric == "recall",
            is_headline=True,
            scale=1,
            undefined=undefined,
        )
        for metric, label, undefined in (
            ("chair_s", "CHAIR_s, captions that mention an absent object", "there is no caption"),
            ("chair_i", "CHAIR_i, mentions of an absent object", "no object was mentioned"),
            ("recall", "recall, objects there that are mentioned", "no image has an object"),
        )
    ],
    prompts={"lmms-eval": Prompt(lambda row: "Please describe this image in detail.", 2048)},
    image_places=lambda row: (row["image"], f"val2014/{row['image']}", f"train2014/{row['image']}"),
    headline=("chair_s", "chair_i", "recall"),
    less_is_better=("chair_s", "chair_i"),
    answer_reader=read_official_captions,
    answer_formats=[
        _format("image_id", "caption"),
        _format("image", "answer", "text"),
        _format("id", "answer"),
    ],
)
