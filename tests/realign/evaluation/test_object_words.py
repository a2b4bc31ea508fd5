"""Which objects a caption names."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from realign.errors import RefusedError
from realign.evaluation.benchmarks.chair import caption_counts, read, show
from realign.evaluation.object_words import mentioned, mentions, object_of

OBJECTS = {
    "dog": ["dog", "puppy"],
    "hot dog": ["hot dog"],
    "bear": ["bear"],
    "teddy bear": ["teddy bear"],
    "claw": ["bear claw"],
    "car": ["car"],
    "toy": ["toy car"],
    "bus": ["bus"],
    "knife": ["knife"],
    "person": ["person", "man", "woman", "child", "fireman"],
    "mouse": ["mouse"],
    "glass": ["glass", "wine glass"],
    "eyewear": ["glasses"],
    "shirt": ["T-shirt", "child's shirt"],
    "tv": ["TV", "t.v."],
    "saint bernard": ["St. Bernard"],
    "café": ["caf\u00e9"],
    "clock": ["clock"],
}
ASIAN = {
    "dog": ["狗", "犬", "いぬ", "개"],
    "hot dog": ["热狗", "ホットドッグ"],
    "bus": ["バス", "公交车"],
    "car": ["车"],
    "horse": ["马"],
    "zebra": ["斑马"],
    "shirt": ["T恤"],
}


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        # the longest phrase takes its words
        ("A hot dog lies there.", "hot dog"),
        ("A hot dog and a dog.", "dog, hot dog"),
        ("A dog eats a hot dog.", "dog, hot dog"),
        ("Three hot dogs.", "hot dog"),
        ("A teddy bear sits.", "teddy bear"),
        ("A bear holds a teddy bear.", "bear, teddy bear"),
        ("Toy cars.", "toy"),
        ("A toy and a car.", "car"),
        ("A hot bear.", "bear"),
        # overlapping phrases: the left one
        ("A teddy bear claw.", "teddy bear"),
        ("A bear claw.", "claw"),
        ("A teddy, bear claw.", "claw"),
        # plural
        ("Two dogs, two puppies and two buses.", "bus, dog"),
        ("Knives.", "knife"),
        ("Women, men, firemen.", "person"),
        ("Many people.", "person"),
        ("Children.", "person"),
        ("Mice.", "mouse"),
        ("A man in glasses.", "eyewear, person"),
        ("Two wine glasses.", "glass"),
        ("A glass.", "glass"),
        # case, hyphens, possessives, apostrophes, accents, width, abbreviations
        ("A DOG and a Hot Dog.", "dog, hot dog"),
        ("HOT DOGS", "hot dog"),
        ("A hot-dog stand.", "hot dog"),
        ("A hot\u2011dog stand.", "hot dog"),
        ("A hot\u00a0dog, a hot  dog.", "hot dog"),
        ("A teddy_bear.", "teddy bear"),
        ("A dog-shaped cloud.", "dog"),
        ("The dog's bone.", "dog"),
        ("The dog\u2019s bone.", "dog"),
        ("The dogs' bones.", "dog"),
        ("The dogs\u2019 bones.", "dog"),
        ("A hot dog's bun.", "hot dog"),
        ("The ‘dog’ and “bus”.", "bus, dog"),
        ("A t-shirt, a T shirt, T-Shirts.", "shirt"),
        ("A child\u2019s shirt.", "shirt"),
        ("A caf\u00e9.", "café"),
        ("A CAFE\u0301.", "café"),
        ("Ａ ＤＯＧ.", "dog"),
        ("A T.V. and TVs.", "tv"),
        ("A St. Bernard.", "saint bernard"),
        ("*dog* [bus] (car)", "bus, car, dog"),
        # no phrase
        ("It is hot. Dog and bus.", "bus, dog"),
        ("A hot, dog.", "dog"),
        ("hot\ndog", "dog"),
        ("A hot – dog.", "dog"),
        ("A catalogue, a carpet, a dogma, a hotdog and a businessman.", ""),
        ("At five o'clock.", ""),
        ("At five o\u2019clock.", ""),
        ("", ""),
        ("…", ""),
    ],
)
def test_objects_mentioned_in_a_caption_are_found(caption: str, named: str) -> None:
    assert ", ".join(sorted(mentioned(caption, OBJECTS))) == named
    assert mentioned(unicodedata.normalize("NFD", caption), OBJECTS) == mentioned(caption, OBJECTS)


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("一只狗坐着。", "dog"),
        ("一只热狗在桌上。", "hot dog"),
        ("热狗和狗", "dog, hot dog"),
        ("公交车和车", "bus, car"),
        ("斑马在跑。", "zebra"),
        ("一匹马。", "horse"),
        ("穿T恤的人", "shirt"),
        ("犬がバスに乗る。", "bus, dog"),
        ("いぬがいる。", "dog"),
        ("バスケットがある。", ""),  # a basket
        ("ホットドッグを食べる。", "hot dog"),
        ("ﾊﾞｽが来る。", "bus"),
        ("개 한 마리", "dog"),
    ],
)
def test_words_are_found_in_scripts_without_spaces(caption: str, named: str) -> None:
    assert ", ".join(sorted(mentioned(caption, ASIAN))) == named


def test_words_with_combining_marks_are_matched_whole() -> None:
    assert mentioned("एक कुत्ता बैठा है", {"dog": ["कुत्ता"]}) == {"dog"}
    assert mentioned("एक कुत्तागाड़ी", {"dog": ["कुत्ता"]}) == set()


def test_a_phrase_of_two_objects_names_both() -> None:
    assert mentioned("A glass.", {"a": ["glass"], "b": ["Glass", "cup"]}) == {"a", "b"}


def test_counts_and_marks_follow_the_same_rule() -> None:
    row = {"image": "a", "text": "x", "objects": ["hot dog"], "synonyms": OBJECTS}
    caption = "Two hot dogs and a puppy."
    assert caption_counts(row, caption) == [2, 1, 1, 1]
    assert [phrase for phrase, _ in mentions(caption, OBJECTS)] == ["hot dogs", "puppy"]
    view = show(row, caption)
    assert view.absent_words == ("dog", "puppy")
    assert show(row, "Two hot dogs.").is_right
    assert show(row, "Toy cars.").absent_words == ("toy car", "toy cars")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("dog", "dog"),
        ("Dogs", "dog"),
        ("puppy", "dog"),
        ("hot-dog", "hot dog"),
        ("Hot Dogs", "hot dog"),
        ("glasses", "eyewear"),
        ("Café", "café"),
        ("toy", "toy"),
        ("zebra", None),
        ("a dog", None),
        ("", None),
        ("!", None),
    ],
)
def test_row_objects_match_their_synonyms(name: str, known: str | None) -> None:
    assert object_of(name, OBJECTS) == known


def test_a_word_of_several_objects_names_none_of_them() -> None:
    both = {"glass": ["glass"], "cup": ["glass", "cup"]}
    assert object_of("glass", both) == "glass"
    assert object_of("Glasses", both) is None


def files(folder: Path, objects: list[str], words: object) -> Path:
    row = {"image": "a.png", "text": "Describe.", "objects": objects}
    (folder / "chair.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (folder / "chair_objects.json").write_text(json.dumps(words), encoding="utf-8")
    return folder / "chair.jsonl"


def test_objects_of_rows_are_read_by_the_rule_for_captions(tmp_path: Path) -> None:
    (row,) = read(files(tmp_path, ["Hot-Dogs", "puppy", "dog"], OBJECTS))
    assert row["objects"] == ["hot dog", "dog"]
    assert caption_counts(row, "A dog.") == [1, 0, 2, 1]
    with pytest.raises(RefusedError, match=r"line 1: objects must be keys .* got 'zebra'"):
        read(files(tmp_path, ["dog", "zebra"], OBJECTS))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"chair_objects\.json must list words for 'x', got none"),
        ([""], r"must have words of letters or digits, got '' for 'x'"),
        (["dog", "!"], r"must have words of letters or digits, got '!' for 'x'"),
        (["🐶"], r"must have words of letters or digits, got '🐶'"),
        (["❤️"], r"must have words of letters or digits"),
        (["หมา"], r"got 'หมา' for 'x': Thai writes no spaces"),
        (["ໝາ"], r"Lao writes no spaces"),
        (["ခွေး"], r"Myanmar writes no spaces"),
        (["ឆ្កែ"], r"Khmer writes no spaces"),
        (["ꦱꦺꦒꦮꦺꦴꦤ꧀"], r"Javanese writes no spaces"),
    ],
)
def test_object_words_that_match_no_caption_are_refused(
    tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(RefusedError, match=message):
        read(files(tmp_path, [], {"dog": ["dog"], "x": words}))


@pytest.mark.parametrize("unit", ["dog ", "hot ", "hot dog ", "狗", "a'", "'", "\u0301", "- "])
def test_long_captions_are_read_without_backtracking(unit: str) -> None:
    mentioned(unit * (20000 // len(unit)), OBJECTS | {"long": ["hot " * 30 + "dog"]})
