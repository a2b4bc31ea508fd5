"""AMBER's descriptions against the output of its script for the same captions."""

from __future__ import annotations

import json
import sys
from functools import partial
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from realign.errors import RefusedError
from realign.evaluation import compare, nltk_words, score, word_vectors
from realign.evaluation.answer_table import answer_table
from realign.evaluation.benchmarks.amber_generative import (
    AMBER_GENERATIVE,
    any_nouns,
    counts,
    metrics,
    read,
)
from realign.evaluation.comparison import score as compare_runs
from realign.evaluation.rows import item_key
from realign.evaluation.suites.rescoring import rescore
from realign.generation.generator import Answer

CASES = {  # caption, chair, cover, hal and cog of the caption alone
    1: (
        "The image shows a person standing on the grass near a lake with mountains and a cloud.",
        [20.0, 57.1, 100.0, 20.0],
    ),
    2: (
        "A man sails a ship under the bridge. The sky is blue and a bird flies by.",
        [20.0, 40.0, 100.0, 20.0],
    ),
    3: (
        "A child plays with flowers on the ground next to a bench.",
        [25.0, 100.0, 100.0, 20.0],
    ),
    4: (
        "Trees and bushes stand behind the lake. A woman holds a paddle.",
        [0.0, 57.1, 0.1, 0.0],
    ),
    5: ("People on the beach play with a toy near the water.", [0.0, 60.0, 0.1, 0.0]),
    6: ("", [0.0, 0.0, 0.1, 0.0]),
    7: ("It is nice.", [0.0, 0.0, 0.1, 0.0]),
    14: ("A woman and a dog walk along the street.", [66.6, 12.5, 100.0, 20.0]),
}
THINGS = {  # in the image, and what a model may invent
    1: ("sky forest grass person lake mountain road", "cloud sun bird dog flower"),
    2: (
        "sky man ship ship forest bridge mountain cloud lake building",
        "plane bird sun paddle ground",
    ),
    3: ("child grass flower", "sky cloud tree house bench"),
    4: ("sky cloud forest lake woman paddle watch", "ship sun ground bird grass"),
    5: ("person sea beach child toy", "ship sky reef seegull lounge"),
    6: (
        "sky mountain bicycle person hat guardrail sign tree ground road cow sheep",
        "motorbike car bird sun cloud",
    ),
    7: ("sea beach bucket shovel toy child", "sky mountain ship lounge dog"),
    14: ("sky grass forest lake woman beach child ground", "fish bird cloud umbrella dog"),
}
RELATED = {
    "forest": ["tree", "leave", "bush"],
    "tree": ["forest", "leave", "bush"],
    "grass": ["ground"],
    "ground": ["floor"],
    "road": ["path", "street", "ground"],
    "person": ["people", "individual", "man", "woman", "boy", "girl"],
    "sea": ["water", "lake"],
    "lake": ["water", "sea"],
}
METRICS = ("chair", "cover", "hal", "cog")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "query").mkdir(parents=True)
    queries, annotations = [], []
    for number, (true, invented) in THINGS.items():
        queries.append(
            {"id": number, "image": f"AMBER_{number}.jpg", "query": "Describe this image."}
        )
        annotations.append(
            {
                "id": number,
                "type": "generative",
                "truth": true.split(),
                "hallu": invented.split(),
            }
        )
    words = {word for things in THINGS.values() for word in " ".join(things).split()}
    relations = {word: RELATED.get(word, []) for word in sorted(words)}
    (folder / "query" / "query_generative.json").write_text(json.dumps(queries))
    (folder / "annotations.json").write_text(json.dumps(annotations))
    (folder / "relation.json").write_text(json.dumps(relations))
    (folder / "safe_words.txt").write_text("orange\nlight\nsign\nindividual")
    return folder


def write(path: Path, numbers: list[int]) -> Path:
    answers = [{"id": number, "response": CASES[number][0]} for number in numbers]
    path.write_text(json.dumps(answers))
    return path


@pytest.mark.parametrize("number", CASES)
def test_each_caption_alone_has_the_expected_scores(
    tmp_path: Path, data: Path, number: int
) -> None:
    answers = write(tmp_path / "a.json", [number])
    scores = score("amber-generative", answers, data, "exact-words", allow_subset=True)
    assert [scores["splits"]["all"][name] for name in METRICS] == CASES[number][1]


def test_all_captions_together_have_the_expected_scores(tmp_path: Path, data: Path) -> None:
    answers = write(tmp_path / "a.json", [*CASES][::-1])
    scores = score("amber-generative", answers, data, "exact-words", bootstrap=10)
    found = scores["splits"]["all"]
    assert [found[name] for name in METRICS] == [20.8, 32.8, 50.0, 10.0]
    words = sum(len(caption.split()) for caption, _ in CASES.values())
    assert found["words_per_caption"] == pytest.approx(words / 8)
    assert (scores["unit"], scores["items"], scores["yes_ratio"]) == ("percent", 8, None)
    assert "cannot be compared with published tables" in scores["note"]


def vector(data: Path, number: int, caption: str, are_alike: Any) -> list[int]:
    rows = read(data / "query" / "query_generative.json")
    row = next(row for row in rows if row["id"] == str(number))
    return counts(any_nouns, are_alike, row, caption)


def test_similar_words_count_as_safe_hallucinated_or_covered(data: Path) -> None:
    pairs = {("dog", "cow"), ("car", "bicycle"), ("dog", "motorbike")}

    def are_alike(noun: str, word: str) -> bool:
        return noun == word or (noun, word) in pairs

    # "car" is made up by its own name, and forgiven since it is like the bicycle that is there;
    # "dog" is like a thing that may be invented and like the cow that is there
    assert vector(data, 6, "A car and a dog.", are_alike) == [2, 0, 12, 2, 5, 2, 1, 1, 5]
    assert vector(data, 6, "A car and a dog.", str.__eq__) == [2, 2, 12, 0, 5, 1, 1, 0, 5]


def test_safe_words_and_annotated_entries_follow_their_precedence(data: Path) -> None:
    # a safe word counts as a noun and covers nothing, even where the image has it
    assert vector(data, 6, "An individual at a sign.", str.__eq__)[:4] == [2, 0, 12, 0]
    # related words win over the annotated one: both words stand for the grass, though the image
    # has the ground too
    assert vector(data, 14, "The ground. The grass.", str.__eq__)[:4] == [2, 0, 8, 1]
    # a thing that is annotated twice is covered once
    assert vector(data, 2, "A ship and a ship.", str.__eq__)[:4] == [2, 0, 10, 1]
    # capital letters stay, so that the word is not known
    assert vector(data, 2, "Ships. Sky.", str.__eq__)[0] == 0


def test_the_verb_can_is_not_counted_as_a_noun() -> None:
    assert any_nouns("It can hold a can")[1:] == ["hold", "a", "can"]


def test_every_caption_adds_to_the_denominators_of_lmms_eval(data: Path) -> None:
    sums = np.array([8.0, 2, 12, 3, 10, 1, 4, 2, 20])
    found = metrics(starts_per_caption=True)(sums)
    assert found["chair"] == pytest.approx(100 * 2 / 8.004)
    assert found["cover"] == pytest.approx(100 * 3 / 12.004)
    assert found["hal"] == pytest.approx(100 - 100 * 2 / 4.004)
    assert found["cog"] == pytest.approx(100 * 1 / 10.004)


@pytest.mark.parametrize("rule", ["official", "lmms-eval"])
def test_rules_that_need_a_tagger_are_refused_without_nltk(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    monkeypatch.setitem(sys.modules, "nltk", None)
    nltk_words._nltk.cache_clear()
    with pytest.raises(RefusedError, match="requires NLTK, which is not installed"):
        score("amber-generative", write(tmp_path / "a.json", [*CASES]), data, rule)


def test_word_vectors_come_from_the_first_installed_spacy_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Document:
        def __init__(self, word: str) -> None:
            self.word = word

        def similarity(self, other: Document) -> float:
            return {"cat": 0.81, "car": 0.8}[other.word]

    specs = {"spacy": None, "lg": None, "sm": None}
    monkeypatch.setattr(word_vectors, "find_spec", lambda name: specs.get(name))
    for cached in (word_vectors._model, word_vectors._document, word_vectors._similarity):
        cached.cache_clear()
    are_alike = partial(word_vectors.are_alike, ("lg", "sm"))
    with pytest.raises(RefusedError, match=r"requires spaCy with lg, .*the rule exact-words"):
        are_alike("dog", "cat")
    specs["spacy"] = True
    with pytest.raises(RefusedError, match=r"requires lg or sm of spaCy, got none\. Run python"):
        are_alike("dog", "cat")
    specs["sm"] = True
    spacy = ModuleType("spacy")
    loaded = []
    spacy.load = lambda name: loaded.append(name) or Document
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    assert are_alike("dog", "cat")
    assert not are_alike("dog", "car")
    assert loaded == ["sm"]
    for cached in (word_vectors._model, word_vectors._document, word_vectors._similarity):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("relation.json", '"sky": []', '"sky": {}', "must map each word to a list of words"),
        ("relation.json", '"sky": [],', "", "must be keys of relation.json, got 'sky'"),
        ("annotations.json", '"generative"', '"relation"', 'type must be "generative"'),
        ("annotations.json", '"id": 14', '"id": 15', "must hold its id, got none of 14"),
        ("annotations.json", '"truth": ["sky"', '"truth": [3', "truth must be a list of words"),
    ],
)
def test_damaged_data_is_refused(
    tmp_path: Path, data: Path, name: str, old: str, new: str, message: str
) -> None:
    assert old in (data / name).read_text()
    (data / name).write_text((data / name).read_text().replace(old, new))
    with pytest.raises(RefusedError, match=message):
        score("amber-generative", write(tmp_path / "a.json", [*CASES]), data, "exact-words")


@pytest.mark.parametrize("name", ["annotations.json", "relation.json", "safe_words.txt"])
def test_a_missing_file_is_named(tmp_path: Path, data: Path, name: str) -> None:
    (data / name).unlink()
    with pytest.raises(RefusedError, match=f"data requires {name} beside query_generative.json"):
        score("amber-generative", write(tmp_path / "a.json", [*CASES]), data, "exact-words")


@pytest.fixture
def both(data: Path) -> Path:
    """Return data with two yes/no questions too."""
    path = data / "annotations.json"
    questions = [(1005, "discriminative-attribute-state", "yes"), (1006, "relation", "no")]
    more = [{"id": number, "type": kind, "truth": truth} for number, kind, truth in questions]
    path.write_text(json.dumps([*json.loads(path.read_text()), *more]))
    queries = [
        {"id": number, "image": "AMBER_1.jpg", "query": f"Is it {number}?"}
        for number, _, _ in questions
    ]
    (data / "query" / "query_discriminative.json").write_text(json.dumps(queries))
    return data


def test_amber_scores_combine_both_parts(tmp_path: Path, both: Path) -> None:
    captions = json.loads(write(tmp_path / "g.json", [*CASES]).read_text())
    words = [{"id": 1006, "response": "No"}, {"id": 1005, "response": "No"}]
    (tmp_path / "a.json").write_text(json.dumps([words[0], *captions, words[1]]))
    (tmp_path / "d.json").write_text(json.dumps(words))
    scores = score("amber", tmp_path / "a.json", both, "exact-words")
    generative = score("amber-generative", tmp_path / "g.json", both, "exact-words")
    discriminative = score("amber-discriminative", tmp_path / "d.json", both)
    assert scores == {
        "benchmark": "amber",
        "rule": "exact-words",
        "parts": {"amber-generative": generative, "amber-discriminative": discriminative},
    }
    assert discriminative["rule"] == "official"
    # the two parts may lie in two files, and one part is scored as though it were named
    apart = [tmp_path / "d.json", tmp_path / "g.json"]
    assert score("amber", apart, both, "exact-words") == scores
    assert score("amber", tmp_path / "g.json", both, "exact-words") == generative
    assert score("amber", tmp_path / "d.json", both) == discriminative
    (both / "query" / "query_discriminative.json").unlink()
    assert score("amber", tmp_path / "g.json", both, "exact-words") == generative

    console = Console(file=StringIO(), width=100)
    console.print(answer_table(scores))
    shown = " ".join(console.file.getvalue().split())
    assert "amber-generative, rule exact-words" in shown
    assert "amber-discriminative, rule official" in shown


def test_amber_refuses_answers_of_neither_part(tmp_path: Path, both: Path) -> None:
    captions = json.loads(write(tmp_path / "g.json", [*CASES]).read_text())
    words = [{"id": number, "response": "No"} for number in (1005, 1006)]

    def refused(answers: list[dict[str, Any]], rule: str = "exact-words") -> str:
        (tmp_path / "a.json").write_text(json.dumps(answers))
        with pytest.raises(RefusedError) as error:
            score("amber", tmp_path / "a.json", both, rule)
        return str(error.value)

    stranger = {"id": 99999, "response": "No"}
    assert "1 answers are to no question" in refused([*captions, *words, stranger])
    assert "must answer questions of AMBER generative or AMBER disc" in refused([stranger])
    assert "each of the 2 questions of the data once, got answers to 1" in refused(
        [*captions, words[0]]
    )
    assert "official, exact-words, lmms-eval, vlmevalkit for amber" in refused(
        [*captions, *words], "mine"
    )
    assert "rule must be one of official, vlmevalkit" in refused(words)


def test_amber_comparisons_require_a_part(tmp_path: Path, both: Path) -> None:
    path = write(tmp_path / "g.json", [*CASES])
    parts = "part of amber here, amber-generative or amber-discriminative, got 'amber'"
    with pytest.raises(RefusedError, match=parts):
        compare("amber", {"base": path}, both, "exact-words")


def test_suites_leave_out_rules_that_need_packages(tmp_path: Path, data: Path) -> None:
    rows = AMBER_GENERATIVE.read_tasks(data)["amber-generative"].rows
    answered = [(row, CASES[int(row["id"])][0]) for row in rows]
    scores, notes = rescore("amber-generative", answered, data, tmp_path / "a.jsonl", 0)
    assert [*scores] == ["exact-words"]
    assert ["official requires packages" in notes[0], "lmms-eval req" in notes[1]] == [True, True]


def stored(path: Path, **by_benchmark: dict[int, str]) -> Path:
    """Write answers by benchmark and id, as `realign eval` stores them."""
    lines = [
        {"benchmark": name.replace("_", "-"), "id": str(number), "answer": text}
        for name, answers in by_benchmark.items()
        for number, text in answers.items()
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_answers_to_other_benchmarks_are_ignored(tmp_path: Path, both: Path) -> None:
    captions = {number: case[0] for number, case in CASES.items()}
    alone = score("amber-generative", write(tmp_path / "g.json", [*CASES]), both, "exact-words")
    mixed = stored(tmp_path / "m.jsonl", amber_generative=captions, vizwiz={1005: "cup"})
    assert score("amber", mixed, both, "exact-words") == alone


def test_stored_answers_to_the_parts_may_be_in_separate_files(tmp_path: Path, both: Path) -> None:
    captions = {number: case[0] for number, case in CASES.items()}
    paths = [
        stored(tmp_path / "g.jsonl", amber_generative=captions),
        stored(tmp_path / "d.jsonl", amber_discriminative={1005: "No", 1006: "No"}),
    ]
    parts = score("amber", paths, both, "exact-words")["parts"]
    assert [found["items"] for found in parts.values()] == [len(captions), 2]


def test_a_run_is_scored_by_the_rule_that_needs_no_packages(data: Path) -> None:
    tasks = AMBER_GENERATIVE.read_tasks(data)
    (task,) = tasks.values()
    answers = {item_key(row): Answer(CASES[int(row["id"])][0]) for row in task.rows}
    rules = compare_runs(tasks, {"m": answers}, resamples=2, seed=0)["benchmarks"]
    (found,) = rules["amber-generative"]["rules"].items()
    assert found[0] == "exact-words"
    values = found[1]["splits"]["all"]["models"]["m"]
    assert [values[name]["value"] for name in METRICS] == [20.8, 32.8, 50.0, 10.0]
