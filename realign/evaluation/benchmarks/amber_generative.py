"""AMBER, generative part: things that a caption names but the image lacks, and things in the image
that the caption names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from realign.errors import RefusedError
from realign.evaluation import nltk_words, word_vectors
from realign.evaluation.benchmark import Array, Benchmark, Layout, Metrics, Prompt, Rule, TableRow
from realign.evaluation.benchmarks.amber import (
    AMBER_ANSWERS,
    ID,
    START,
    STRING,
    beside_or_above,
    read_annotations,
    rounded,
    truth_of,
)
from realign.evaluation.caption_words import caption_tokens, wordnet_singular
from realign.evaluation.rows import Key, Row, check_row, read_records
from realign.runtime.files import read_utf8
from realign.runtime.strict_json import read_json

QUERIES, RELATIONS, SAFE_WORDS = "query_generative.json", "relation.json", "safe_words.txt"
AreAlike = Callable[[str, str], bool]
# after any other word "can" is a verb, as it nearly always is in captions
_BEFORE_A_CAN = frozenset({"a", "the", "beer", "garbage", "soda", "tin", "trash", "watering"})


def _is_list_of_words(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(word, str) and word for word in value)
    )


_WORDS = Key(_is_list_of_words, "be a list of words that is not empty", "Take the published file.")
_GENERATIVE = Key(lambda value: value == "generative", 'be "generative"', "Correct it.")


class Vocabulary(NamedTuple):
    """The words that count."""

    related: Mapping[str, Sequence[str]]
    """Words that may stand for each word."""
    known: frozenset[str]
    """All words."""
    safe: frozenset[str]
    """Words that never count against a caption."""


def read(path: Path) -> list[Row]:
    """Read the images to describe, their things, those that a model may invent, and the words.

    Raises:
        RefusedError: A file is missing or has another form, or a word of an annotation is unknown.
    """
    vocabulary = _read_vocabulary(path)
    truths = read_annotations(path)
    rows = []
    for where, record in read_records(path):
        row = check_row(record, where, {"id": ID, "image": STRING, "query": STRING})
        keys = {"type": _GENERATIVE, "truth": _WORDS, "hallu": _WORDS}
        truth = truth_of(row, truths, keys)
        for word in (*truth["truth"], *truth["hallu"]):
            if word not in vocabulary.related:
                raise RefusedError(
                    f"{truth['where']}: its words must be keys of {RELATIONS}, got {word!r}. Take "
                    "all files of one publication."
                )
        row |= {"text": row["query"], "truth": truth["truth"], "hallu": truth["hallu"]}
        rows.append({**row, "id": str(row["id"]), "vocabulary": vocabulary})
    return rows


def _read_vocabulary(path: Path) -> Vocabulary:
    relations = beside_or_above(path, RELATIONS)
    related = read_json(relations)
    if not isinstance(related, dict) or not all(
        isinstance(words, list) and all(isinstance(word, str) for word in words)
        for words in related.values()
    ):
        raise RefusedError(
            f"{relations} must map each word to a list of words, got {related!r:.60}. Take the "
            "published file."
        )
    safe = read_utf8(beside_or_above(path, SAFE_WORDS)).split("\n")
    known = {*related, *(word for words in related.values() for word in words)}
    return Vocabulary(related, frozenset(known), frozenset(safe))


def any_nouns(caption: str) -> list[str]:
    """Return the words of a caption in the singular, as if all were nouns, except for the verb
    `can`; case is kept.
    """
    tokens = caption_tokens(caption)
    return [
        wordnet_singular(token)
        for before, token in zip(["", *tokens], tokens, strict=False)
        if token != "can" or before.lower() in _BEFORE_A_CAN
    ]


def counts(
    nouns_of: Callable[[str], list[str]], are_alike: AreAlike, row: Row, caption: str
) -> list[int]:
    """Return the counts of a caption, in this order: nouns in the vocabulary, hallucinated ones,
    things in the image, named ones, things that models tend to invent, named ones, captions (1),
    captions without a hallucination (0 or 1), and words.
    """
    vocabulary: Vocabulary = row["vocabulary"]
    true, invented = _entries(row["truth"], vocabulary), _entries(row["hallu"], vocabulary)
    nouns = [noun for noun in nouns_of(caption) if noun in vocabulary.known]
    named: set[int] = set()
    made_up: set[int] = set()
    hallucinated = 0
    for noun in nouns:
        if noun in vocabulary.safe:
            continue
        entry = _first(true, noun.__eq__)
        if entry is None:
            marked = (
                _first(invented, noun.__eq__),
                _first(invented, partial(are_alike, noun)),
            )
            made_up.update(found for found in marked if found is not None)
            entry = _first(true, partial(are_alike, noun))
        if entry is None:
            hallucinated += 1
        else:
            named.add(entry)
    return [
        len(nouns),
        hallucinated,
        len(row["truth"]),
        len(named),
        len(row["hallu"]),
        len(made_up),
        1,
        int(hallucinated == 0),
        len(caption.split()),
    ]


def _entries(words: Sequence[str], vocabulary: Vocabulary) -> list[tuple[str, int]]:
    """Return every word that stands for an annotated one, with the place of the annotated one. The
    related words come first, so that they take precedence.
    """
    related = [
        (other, place) for place, word in enumerate(words) for other in vocabulary.related[word]
    ]
    return [*related, *((word, place) for place, word in enumerate(words))]


def _first(entries: Sequence[tuple[str, int]], fits: Callable[[str], Any]) -> int | None:
    """Return the place of the first entry whose word fits."""
    return next((place for word, place in entries if fits(word) is True), None)


def metrics(*, starts_per_caption: bool) -> Metrics:
    """Return the four shares in percent, and the words of a caption.

    Args:
        starts_per_caption: Whether every caption adds 0.001 to each denominator, as in lmms-eval,
            which also does not round; otherwise 0.001 is added once for all captions.
    """

    def of_sums(sums: Array) -> Mapping[str, Array]:
        nouns, wrong, true, named, invented, made_up, captions, clean, words = np.moveaxis(
            sums, -1, 0
        )
        start = START * captions if starts_per_caption else START
        shown = (lambda values: values) if starts_per_caption else rounded
        return {
            "chair": shown(wrong / (nouns + start) * 100),
            "cover": shown(named / (true + start) * 100),
            "hal": shown(100 - clean / (captions + start) * 100),
            "cog": shown(made_up / (invented + start) * 100),
            "words_per_caption": words / captions,
        }

    return of_sums


_NOTE = (
    "An empty caption is perfect on chair and hal, so read them beside cover and "
    "words_per_caption, which is a number. "
)

AMBER_GENERATIVE = Benchmark(
    name="amber-generative",
    title="AMBER generative",
    layouts=[
        Layout({"amber-generative": (QUERIES,)}, read),
        Layout({"amber-generative": (f"query/{QUERIES}",)}, read),
    ],
    rules={
        "official": Rule(
            partial(counts, nltk_words.nouns, partial(word_vectors.are_alike, ("en_core_web_lg",))),
            metrics(starts_per_caption=False),
            unit="percent",
            needs_packages=True,
            note=f"{_NOTE}NLTK finds the nouns, and spaCy's en_core_web_lg compares words. "
            "Denominators start at 0.001, so hal of a single perfect caption is 0.1.",
        ),
        "exact-words": Rule(
            partial(counts, any_nouns, lambda noun, word: False),
            metrics(starts_per_caption=False),
            unit="percent",
            note=f"{_NOTE}This project's own rule. It has no tagger, so a verb such as watch "
            "counts as the noun, and no vectors, so only equal words match. Its values cannot be "
            "compared with published tables.",
        ),
        "lmms-eval": Rule(
            partial(
                counts,
                nltk_words.nouns,
                partial(
                    word_vectors.are_alike, ("en_core_web_md", "en_core_web_sm", "en_core_web_lg")
                ),
            ),
            metrics(starts_per_caption=True),
            unit="percent",
            needs_packages=True,
            note=f"{_NOTE}As official, but with the first installed spaCy model of md, sm (which "
            "has no vectors) and lg. Every caption adds 0.001 to each denominator.",
        ),
    },
    table=[
        TableRow(
            "amber-generative",
            "exact-words",
            metric,
            f"AMBER descriptions without a tagger, {label}",
            more_is_better=metric == "cover",
            is_headline=metric in ("chair", "cover"),
            scale=1,
        )
        for metric, label in (
            ("chair", "objects that are not there"),
            ("cover", "objects there that are named"),
            ("hal", "descriptions with an absent object"),
            ("cog", "objects that people often imagine"),
        )
    ],
    # the script names no limit; this project's is that of CHAIR
    prompts={
        "official": Prompt(max_new_tokens=512),
        "lmms-eval": Prompt(lambda row: "Describe this image", 2048),
    },
    image_folder="amber",
    headline=("chair", "cover", "hal", "cog"),
    less_is_better=("chair", "hal", "cog"),
    version_keys=("id", "image", "text", "truth", "hallu"),
    versions={"7754fef598a43153": "534babf"},
    answer_formats=[AMBER_ANSWERS],
)
