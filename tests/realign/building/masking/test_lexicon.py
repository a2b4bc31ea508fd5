"""Visual words that a lexicon finds: by the matcher, the packaged English one and the demo's."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from random import Random

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from realign.building.masking.lexicon import Lexicon
from realign.building.masking.masks import mask_by_rule
from realign.building.run import ENGLISH_LEXICON
from realign.demo.tasks import LEXICON_PATH, pretraining_example, question_pair
from realign.demo.world import free_scene, habitual_scene
from realign.errors import RefusedError

DEMO = Lexicon.load(LEXICON_PATH)
ENGLISH = Lexicon.load(ENGLISH_LEXICON)


def masked(text: str) -> str:
    return mask_by_rule(text, ENGLISH, {}, Random(0)) or text


def found(lexicon: Lexicon, text: str) -> list[tuple[str, str]]:
    return [(text[start:stop], category) for start, stop, category in lexicon.segments(text)]


def test_the_papers_example_is_masked_as_its_figure_shows() -> None:
    assert masked(
        "The man and his dog are located on the beach, near the ocean. They are either jogging or "
        "walking along the shoreline, where the land meets the water."
    ) == (
        "The [MASK] and his [MASK] are located on the [MASK], near the [MASK]. They are either "
        "[MASK] or [MASK] along the [MASK], where the [MASK] meets the [MASK]."
    )


@pytest.mark.parametrize(
    "text",
    [
        "That's right, you can do it like that.",
        "He left right away for a second time.",
        "One of the best, this one, another one, no one, and the other ones.",
        "On the other hand, it is a sign of hope in the long run.",
        "It plays a role in light of what stands out.",
        "The image shows a scene; the picture is a photo of it.",
        "Founded in 1990, it is as long as we know.",
        "1. Here\n2) There",
        "The mantra of a category: scary, carefree, treehouses, boatload.",
    ],
)
def test_words_that_only_look_visual_are_not_masked(text: str) -> None:
    assert ENGLISH.segments(text) == []


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("an orange cat", [("orange", "attributes"), ("cat", "objects")]),
        ("two oranges", [("two", "counts"), ("oranges", "objects")]),
        ("3 dogs at 10:30", [("3", "counts"), ("dogs", "objects"), ("10:30", "counts")]),
        ("1,200 sheep, 3D, 4x4", [("1,200", "counts"), ("sheep", "objects")]),
        ("1. Two cats", [("Two", "counts"), ("cats", "objects")]),
        ("one dog", [("one", "counts"), ("dog", "objects")]),
        ("one of the dogs", [("dogs", "objects")]),
        ("to the right of a soda can", [("to the right of", "relations"), ("soda can", "objects")]),
        ("a traffic light", [("traffic light", "objects")]),
        ("hot-dog and T-shirts", [("hot-dog", "objects"), ("T-shirts", "objects")]),
        ("a fire  hydrant", [("fire  hydrant", "objects")]),
        ("fire\nhydrant", [("fire", "objects"), ("hydrant", "objects")]),
        ("MEN's babies", [("MEN", "objects"), ("babies", "objects")]),
        (
            "knives, wolves, geese, children, buses, dishes",
            [
                (word, "objects")
                for word in ("knives", "wolves", "geese", "children", "buses", "dishes")
            ],
        ),
        ("in front of it", [("in front of", "relations")]),
        ("Yes, no longer. No.", [("Yes", "polarity"), ("No", "polarity")]),
        ("🐕 a dog’s leash…", [("dog", "objects"), ("leash", "objects")]),
        ("一只狗", []),
        ("cafe\u0301s", []),  # an accent belongs to its letter: no "cafe" in it
    ],
)
def test_visual_words_are_found(text: str, segments: list[tuple[str, str]]) -> None:
    assert found(ENGLISH, text) == segments


# Sentences as people write them about photographs, and the masked texts.
CAPTIONS = {
    "A man riding a wave on top of a surfboard.": "A # # a # # a #.",
    "Two dogs are playing with a frisbee in the grass.": "# # are # with a # in the #.",
    "A red double decker bus driving down a street.": "A # # # down a #.",
    "There are several people sitting at a long wooden table.": "There are # # # at a # # #.",
    "A close-up of a pizza topped with cheese and mushrooms.": "A close-up of a # # # and #.",
    "The bathroom has a white toilet next to the sink.": "The # has a # # # the #.",
    "A small child brushing his teeth in front of a mirror.": "A # # # his # # a #.",
    "A woman is holding a cell phone in her right hand.": "A # is # a # in her #.",
    "Three giraffes standing behind a fence at the zoo.": "# # # # a # at the #.",
    "A black and white cat is lying on a keyboard.": "A # # is # on a #.",
    "Some bananas and oranges are in a bowl.": "Some # and # are in a #.",
    "A baseball player swinging a bat during a game.": "A # # # a # during a #.",
    "An airplane flying through a cloudy sky.": "An # # through a # #.",
    "The train is stopped at the station.": "The # is stopped at the #.",
    "A kitchen with stainless steel appliances and a window above the sink.": (
        "A # with # appliances and a # # the #."
    ),
}


@pytest.mark.parametrize(("caption", "left"), CAPTIONS.items())
def test_only_visual_words_of_captions_are_masked(caption: str, left: str) -> None:
    assert masked(caption) == left.replace("#", "[MASK]")


COCO = [
    # "orange" is missing: it is a colour when it stands alone
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"),
    *("traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat"),
    *("dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack"),
    *("umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball"),
    *("kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket"),
    *("bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote"),
    *("keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book"),
    *("clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
]


def test_every_coco_category_is_an_object_of_the_lexicon() -> None:
    for name in COCO:
        assert found(ENGLISH, f"a {name}.") == [(name, "objects")]


def test_no_phrase_is_listed_twice_in_the_lexicon() -> None:
    raw = yaml.safe_load(ENGLISH_LEXICON.read_text())
    phrases = [phrase for category in raw.values() for phrase in category]
    assert len(phrases) == len(set(phrases)) > 1500
    names = ["actions", "attributes", "counts", "objects", "polarity", "relations"]
    assert ENGLISH.categories == names


def as_first_defined(path: Path, text: str) -> list[tuple[int, int]]:
    """One alternation of all phrases, longest first, each with a regular plural."""
    phrases = [
        phrase for category in yaml.safe_load(path.read_text()).values() for phrase in category
    ]
    longest_first = sorted((phrase.lower() for phrase in phrases), key=len, reverse=True)
    pattern = rf"\b(?:{'|'.join(map(re.escape, longest_first))})(?:e?s)?\b"
    return [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)]


WORDS = [
    *("Yes, there is a", "No, there is no", "house", "houses", "fishes", "boatx", "red", "Reds"),
    *("at the top", "at the top left", "at the bottom right", "at the", "top", "left", "in the"),
    *("middle", "on the right", "no", "Yes,", ",", ".", "'s", "key-lock", "stars!", "a", "is"),
]


@given(st.lists(st.sampled_from(WORDS)).map(" ".join))
def test_the_demo_lexicon_finds_the_same_segments_as_its_first_definition(text: str) -> None:
    assert [span[:2] for span in DEMO.segments(text)] == as_first_defined(LEXICON_PATH, text)


def test_masks_of_the_demo_sentences_equal_a_recorded_digest() -> None:
    """The embedded model was trained on them."""
    rng, digest = Random(7), hashlib.sha256()
    rates = ({}, {"objects": 0.8, "attributes": 0.8, "relations": 0.8}, {"objects": 0.3})
    for number in range(300):
        scene = habitual_scene(rng) if number % 2 else free_scene(rng)
        for text in (scene.caption(), question_pair(scene, rng)[1]):
            for rate in rates:
                masked_text = mask_by_rule(text, DEMO, rate, Random(f"0:{number}"))
                digest.update(f"{masked_text}\n".encode())
        digest.update(f"{pretraining_example(scene, DEMO, rng)!r}\n".encode())
    assert digest.hexdigest() == "6ae6e4a0ae63488db632709465703f1b87b36c14b28ad81423513c39a8cc5baa"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- house\n- tree\n", "must map each category to a list of phrases, got list"),
        ("objects: house\n", "list of phrases, got str for 'objects'. Write them"),
        ("objects: []\n", "list of phrases, got list for 'objects'. Write them"),
        ("kept: [house]\n", "must map each category to a list of phrases, got dict"),
        ("objects: [house, no]\n", "must have phrases in 'objects', got False. Quote it"),
        ("objects: [a]\nattributes: [A]\n", "must have 'A' in one category, got objects and attr"),
        ("objects: ['...']\n", r"begin and end with a word, got '\.\.\.' in objects"),
        ("objects: ['Hello!']\n", "begin and end with a word, got 'Hello!' in objects"),
        ("objects: [a, *b]\n", "must be YAML"),
        ("objects: [a\x07]\n", "must be YAML"),
        ("objects: [a]\nobjects: [b]\n", "lexicon must have every key once, got 'objects' twice"),
    ],
)
def test_bad_lexicons_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "lexicon.yaml"
    path.write_text(content)
    with pytest.raises(RefusedError, match=message):
        Lexicon.load(path)
    with pytest.raises(RefusedError, match="which does not exist"):
        Lexicon.load(tmp_path / "none.yaml")


def test_mask_rates_must_name_categories_which_exclude_kept() -> None:
    lexicon = Lexicon({"objects": ["dog"], "kept": ["hot dog days"]})
    assert found(lexicon, "a dog on hot dog days") == [("dog", "objects")]
    with pytest.raises(RefusedError, match=r"must name categories of \['objects'\], got 'kept'"):
        lexicon.check_rates({"kept": 1.0})


@pytest.mark.parametrize("text", ["red " * 5000, "1," * 10000, "one of " * 3000, "a" * 20000])
def test_long_texts_are_read_without_backtracking(text: str) -> None:
    assert len(ENGLISH.segments(text)) <= 5000
