"""LLaVA-Instruct: the answers of a conversation that become rows, and their names."""

from __future__ import annotations

from typing import Any

import pytest

from realign.errors import RefusedError


def row(*texts: str, id: str = "33", image: str = "a.jpg") -> dict[str, Any]:
    roles = ("human", "gpt")
    conversations = [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": id, "image": image, "conversations": conversations}


LONG = row("<image>\nQ1", "A1", "Q2", "A2", "Q3", "A3")


def turns_of(source: Any) -> list[tuple[str, list[str], str, int]]:
    return [
        (row.id, [turn["content"] for turn in row.prompt], row.answer, row.source["turn"])
        for row in source.rows
    ]


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ("first", [("33", ["Q1"], "A1", 1)]),
        ("last", [("33", ["Q1", "A1", "Q2", "A2", "Q3"], "A3", 3)]),
        (
            "each",
            [
                ("33-1", ["Q1"], "A1", 1),
                ("33-2", ["Q1", "A1", "Q2"], "A2", 2),
                ("33-3", ["Q1", "A1", "Q2", "A2", "Q3"], "A3", 3),
            ],
        ),
    ],
)
@pytest.mark.parametrize("first", ["<image>\nQ1", "Q1\n<image>", "Q1"])
def test_the_chosen_turns_become_pairs(turns: str, expected: list[Any], first: str, read) -> None:
    long = {
        **LONG,
        "conversations": [{"from": "human", "value": first}, *LONG["conversations"][1:]],
    }
    source = read([long], as_list=True, turns=turns)
    assert source.format == "llava"
    assert turns_of(source) == expected
    assert {row.image for row in source.rows} == {"a.jpg"}
    assert {row.source["id"] for row in source.rows} == {"33"}


def test_conversations_about_one_image_get_unique_ids(read) -> None:
    source = read([LONG, row("Q", "A"), LONG], as_list=True)
    assert [row.id for row in source.rows] == ["33", "33#2", "33#3"]
    source = read([LONG, row("Q", "A")], as_list=True, turns="each")
    assert [row.id for row in source.rows] == ["33-1", "33-2", "33-3", "33-1#2"]
    assert len({row.id for row in source.rows}) == 4


@pytest.mark.parametrize(
    ("texts", "code"),
    [
        (("Q1", "A1", "Q2"), "turns"),
        (("Q1", ""), "empty"),
        (("Q1", "A <image>"), "special-token"),
        (("<image>", "A1"), "empty"),
        (("<image> <image> Q1", "A1"), "image-count"),
        ((), "wrong-type"),
    ],
)
def test_a_bad_conversation_is_reported_with_its_row(
    texts: tuple[str, ...], code: str, read
) -> None:
    source = read([LONG, row(*texts, id="bad")], as_list=True, turns="each")
    assert len(source.rows) == 3
    assert [(p.code, p.row) for p in source.problems] == [(code, "bad")]
    assert source.problems[0].place == "source.json, row 2 (counting from 1)"


def test_a_text_only_conversation_is_a_bad_row(read) -> None:
    text_only = {key: value for key, value in LONG.items() if key != "image"}
    source = read([LONG, text_only], as_list=True)
    assert [(p.field, p.code) for p in source.problems] == [("image", "missing-key")]


def test_an_unknown_value_of_turns_is_refused(read) -> None:
    with pytest.raises(RefusedError, match="turns must be first, last or each, got 'all'"):
        read([LONG], turns="all")


def test_the_image_name_option_maps_to_names_of_another_release(read, images) -> None:
    """LLaVA-Instruct names NAME, and the folder of COCO train2014 has COCO_train2014_NAME."""
    (images / "a.jpg").rename(images / "COCO_train2014_a.jpg")
    assert [problem.code for problem in read([LONG]).problems] == ["missing"]
    (found,) = read([LONG], image_name="COCO_train2014_{name}").rows
    assert (found.image, found.path.name) == ("a.jpg", "COCO_train2014_a.jpg")
    escaping = row("Q", "A", image="/../../x.jpg")
    refused = read([LONG, escaping], image_name="COCO_train2014_{name}").problems
    assert [problem.code for problem in refused] == ["outside-root"]
