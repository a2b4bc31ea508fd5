"""Each layout from a small file: the pairs that rows become, and the rows that are refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from realign.data.formats.layouts import LAYOUTS
from realign.data.formats.read_source import read_source
from realign.errors import RefusedError
from tests.realign.data.formats.layout_rows import (
    PAIR,
    QUESTION,
    ROWS,
    assistant,
    gpt,
    human,
    parts,
    user,
)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("as_list", [False, True])
def test_a_layout_is_recognised_and_its_pair_read(name: str, as_list: bool, read, images, capsys):
    source = read([{**ROWS[name], "idx": 7, "split": ["x"]}], as_list=as_list)
    assert (source.problems, source.format, source.num_read) == ([], name, 1)
    (row,) = source.rows
    assert row.prompt == (user(QUESTION),)
    assert (row.answer, row.rejected) == (PAIR["chosen"], PAIR["rejected"])
    assert (row.image, row.path) == ("a.jpg", images / "a.jpg")
    assert row.source["extra"] == {"idx": 7, "split": ["x"]}
    file = "source.json" if as_list else "source.jsonl"
    assert (row.source["file"], row.source["index"], row.id) == (file, 0, "0")
    assert f"source {file}: read as {name} (" in capsys.readouterr().err


def test_every_layout_has_a_test_row() -> None:
    assert {layout.name for layout in LAYOUTS} == {*ROWS, "llava"}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("trl", {"prompt": QUESTION, **PAIR}),
        ("trl", {"prompt": [user(f"<image>{QUESTION}")], "chosen": [assistant(PAIR["chosen"])]}),
        ("trl", {"images": None, "image": "a.jpg"}),
        ("llamafactory", PAIR),
        ("rlhf-v", {"text": {"question": QUESTION, **PAIR}}),
        ("mdpo", {"prompt": f"USER: <image>\n{QUESTION} ASSISTANT:"}),
        ("mdpo", {"prompt": f"USER: {QUESTION}\n<image> ASSISTANT:"}),
        (
            "ms-swift",
            {
                "rejected_response": None,
                "rejected_messages": [user(QUESTION), assistant(PAIR["rejected"])],
            },
        ),
        ("realign", {"prompt": [user(QUESTION)]}),
        ("realign", {"prompt": [parts("user", QUESTION)], "answer": " A red car.\n"}),
    ],
)
def test_other_spellings_of_a_layout_are_recognized(
    name: str, change: dict[str, Any], read
) -> None:
    source = read([ROWS[name] | change])
    (row,) = source.rows
    assert (source.format, row.prompt) == (name, (user(QUESTION),))
    assert (row.answer, row.rejected) == (PAIR["chosen"], PAIR["rejected"])


MULTI = [user("Hi. <image>"), assistant("Hello."), user(QUESTION)]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("trl", {"prompt": MULTI}),
        ("llamafactory", {"conversations": [{"from": "system", "value": "Be kind."}, *MULTI]}),
        ("ms-swift", {"messages": [*MULTI, assistant(PAIR["chosen"])]}),
        ("official", {name: [*MULTI, assistant(text)] for name, text in PAIR.items()}),
        ("povid", {
            "conversations": [*MULTI, assistant(PAIR["chosen"])],
            "rejected_conversations": [*MULTI, assistant(PAIR["rejected"])],
        }),
    ],
)  # fmt: skip
def test_earlier_turns_are_the_prompt(name: str, change: dict[str, Any], read) -> None:
    (row,) = read([ROWS[name] | change]).rows
    turns = [turn for turn in row.prompt if turn["role"] != "system"]
    assert turns == [user("Hi."), assistant("Hello."), user(QUESTION)]
    assert row.prompt[0]["role"] == ("system" if name == "llamafactory" else "user")
    assert (row.instruction, row.answer, row.rejected) == (QUESTION, *PAIR.values())


def test_a_row_without_an_answer_is_kept_for_annotation(read) -> None:
    rows = [{"image": "a.jpg", "prompt": QUESTION}, {"image": "b.jpg", "prompt": "x", "answer": ""}]
    source = read([*rows, {"image": "c.jpg", "prompt": "x", "answer": None}])
    assert [(row.answer, row.rejected) for row in source.rows] == [("", "")] * 3
    asked = {"image": "a.jpg", "conversations": [human(QUESTION)]}
    assert read([asked], as_list=True).rows[0].answer == ""
    asked = {"images": ["a.jpg"], "messages": [user(QUESTION)]}
    assert read([asked]).rows[0].prompt == (user(QUESTION),)


def test_retrieved_images_of_a_source_are_ignored_with_a_note(read, capsys) -> None:
    (row,) = read([ROWS["official"]]).rows
    assert row.source["retrieved_image"] == "b.jpg"
    warning = "retrieved images of the source are not used"
    assert f"{warning} (1 rows have some)" in capsys.readouterr().err
    for name in ("trl", "ms-swift", "question"):
        read([ROWS[name]])
        assert warning not in capsys.readouterr().err
        read([ROWS[name], ROWS[name] | {"rejected_images": ["b.jpg"]}])
        assert f"{warning} (1 rows have some)" in capsys.readouterr().err


@pytest.mark.parametrize("is_first", [False, True])
def test_an_image_pair_of_ms_swift_becomes_no_answer_pair(is_first: bool, read) -> None:
    answers = ROWS["ms-swift"] | {"id": "x"}
    images = answers | {"rejected_response": None, "rejected_images": ["b.jpg"]}
    again = images | {"rejected_messages": [user(QUESTION), assistant(PAIR["chosen"])]}
    for half in (images, again):
        source = read([half, answers] if is_first else [answers, half])
        assert (source.problems, source.num_read) == ([], 2)
        assert [(row.id, row.rejected) for row in source.rows] == [("x", PAIR["rejected"])]
    other = images | {"messages": [user(QUESTION), assistant("Another answer.")], "id": "y"}
    source = read([other, answers])
    assert [row.id for row in source.rows] == ["x"]
    (problem,) = source.problems
    assert (problem.row, problem.field, problem.code) == ("y", "rejected_images", "image-pair")
    assert problem.message.startswith("source.jsonl, line 1: rejected_images must stand beside")


@pytest.mark.parametrize("is_text", [False, True])
def test_a_prompt_repeated_in_both_conversations_is_read_once(is_text: bool, read) -> None:
    """TRL's implicit prompt is given as parts or as texts."""
    asked = user(f"<image>{QUESTION}") if is_text else parts("user", QUESTION, images=1)
    row: dict[str, Any] = {"images": ["a.jpg"]}
    for name, text in PAIR.items():
        row[name] = [asked, assistant(text) if is_text else parts("assistant", text)]
    source = read([row])
    assert (source.format, source.rows[0].prompt) == ("trl", (user(QUESTION),))
    assert (source.rows[0].answer, source.rows[0].rejected) == (*PAIR.values(),)
    (problem,) = read([row, row | {"chosen": "Red.", "rejected": "Blue."}]).problems
    assert "chosen must be a list of turns, got 'Red.'" in problem.message


@pytest.mark.parametrize(
    ("name", "change", "field", "code"),
    [
        ("question", {"question": 3}, "question", "wrong-type"),
        ("question", {"question": "<image>"}, "question", "empty"),
        ("question", {"question": "<image><image>x"}, "question", "image-count"),
        ("question", {"chosen": " "}, "chosen", "empty"),
        ("question", {"rejected": None}, "rejected", "missing-key"),
        ("question", {"rejected": PAIR["chosen"]}, "rejected", "equal-answers"),
        ("question", {"image": None}, "image", "missing-key"),
        ("question", {"image": ["a.jpg", "b.jpg"]}, "image", "image-count"),
        ("question", {"image": 5}, "image", "wrong-type"),
        ("question", {"image": {"bytes": "a.jpg"}}, "image", "wrong-type"),
        ("question", {"image": "none.jpg"}, "image", "missing"),
        ("question", {"image": "../x.jpg"}, "image", "outside-root"),
        ("question", {"image": "http://h/x.jpg"}, "image", "url"),
        ("question", {"image": "a\0.jpg"}, "image", "image-name"),
        ("question", {"image": "x" * 300}, "image", "unreadable"),
        ("question", {"image": "\ud800.jpg"}, "image", "unreadable"),
        ("question", {"chosen": "Half \ud800."}, "answer", "surrogate"),
        ("question", {"chosen": "An <image>."}, "answer", "special-token"),
        ("question", {"chosen": "Bye</s>"}, "answer", "special-token"),
        ("question", {"id": ["x"]}, "id", "wrong-type"),
        ("rlhf-v", {"text": "{"}, "text", "wrong-type"),
        ("rlhf-v", {"text": '{"question": "x"}'}, "text", "wrong-type"),
        ("rlhf-v", {"text": "[" * 100_000}, "text", "wrong-type"),
        ("rlhf-v", {"text": "1" * 5000}, "text", "wrong-type"),
        ("mdpo", {"prompt": QUESTION}, "prompt", "template"),
        ("mdpo", {"prompt": "Be brief. USER: x ASSISTANT:"}, "prompt", "template"),
        ("mdpo", {"prompt": "USER: a ASSISTANT: b USER: c ASSISTANT:"}, "prompt", "template"),
        ("mdpo", {"prompt": "USER: <image> ASSISTANT:"}, "prompt", "empty"),
        ("mdpo", {"prompt": "USER: x ASSISTANT: y"}, "prompt", "template"),
        ("povid", {"rejected_conversations": [human("Other?"), gpt("x")]},
         "rejected_conversations", "different-prompts"),
        ("povid", {"rejected_conversations": None}, "rejected_conversations", "wrong-type"),
        ("povid", {"conversations": [human("x")]}, "conversations", "turns"),
        ("llamafactory", {"conversations": [gpt("x")]}, "conversations", "turns"),
        ("llamafactory", {"chosen": human("x")}, "chosen", "turns"),
        ("llamafactory", {"chosen": gpt("")}, "chosen", "empty"),
        ("llamafactory", {"images": []}, "images", "missing-key"),
        ("ms-swift", {"messages": [user("x"), user("y")]}, "messages", "turns"),
        ("ms-swift", {"messages": [{"role": "tool", "content": "x"}]}, "messages", "messages"),
        ("ms-swift", {"messages": []}, "messages", "wrong-type"),
        ("ms-swift", {"rejected_messages": [user("y"), assistant("z")]},
         "rejected_messages", "different-prompts"),
        ("trl", {"prompt": [parts("user", "x", images=2)]}, "prompt", "image-count"),
        ("trl", {"prompt": [{"role": "user", "content": [{"type": "video"}]}]},
         "prompt", "messages"),
        ("trl", {"prompt": 3}, "prompt", "wrong-type"),
        ("trl", {"prompt": [user("x"), assistant("y"), user("What <image>?")]},
         "prompt", "special-token"),
        ("trl", {"chosen": [user("x"), assistant("y")]}, "chosen", "turns"),
        ("official", {"rejected": [user("Other?"), assistant("x")]},
         "rejected", "different-prompts"),
        ("realign", {"prompt": " "}, "prompt", "empty"),
        ("realign", {"prompt": "<image> x"}, "prompt", "special-token"),
        ("realign", {"prompt": [user("<image> x")]}, "prompt", "special-token"),
        ("realign", {"prompt": [assistant("x")]}, "prompt", "turns"),
        ("realign", {"prompt": [user("")]}, "prompt", "empty"),
        ("realign", {"answer": 3}, "answer", "wrong-type"),
        ("realign", {"answer": ""}, "answer", "empty"),
    ],
)  # fmt: skip
def test_a_bad_row_is_reported_and_good_rows_are_read(
    name: str, change: dict[str, Any], field: str, code: str, read
) -> None:
    good = ROWS[name]
    source = read([good, good | {"id": "bad"} | change, good | {"id": "z"}], special=["</s>", ""])
    assert [row.id for row in source.rows] == ["0", "z"]
    (problem,) = source.problems
    assert (problem.field, problem.code) == (field, code)
    assert problem.row == ("2" if field == "id" else "bad")
    assert problem.place == "source.jsonl, line 2"
    assert problem.message.startswith("source.jsonl, line 2: ")
    assert problem.message.endswith(".")
    assert source.num_read == 3


@pytest.mark.parametrize("name", ROWS)
def test_a_missing_or_mistyped_key_is_read_or_reported(name: str, read) -> None:
    """A row without a key, or with another type under it, is good or refused, never an error."""
    rows: list[Any] = [ROWS[name]]
    for key in ROWS[name]:
        rows.append({k: v for k, v in ROWS[name].items() if k != key})
        odd = (3, True, [], {}, [3], [[]], [{}], [None], {"content": 3}, [{"role": [], "value": 3}])
        rows += [ROWS[name] | {key: value} for value in odd]
    source = read(rows, as_list=True)
    assert source.format == name
    assert len(source.rows) + len(source.problems) == source.num_read == len(rows)
    assert len(source.problems) >= len(rows) // 2


def test_repeated_ids_of_realign_rows_are_bad_rows(read) -> None:
    row = {"id": 1, "image": "a.jpg", "prompt": "x", "answer": "y"}
    source = read([row, row, row | {"id": "2"}])
    assert [row.id for row in source.rows] == ["1", "2"]
    (problem,) = source.problems
    assert (problem.code, problem.row) == ("duplicate-id", "1")
    assert "id must be unique, got '1' again" in problem.message


def test_repeated_ids_of_other_layouts_are_numbered(read) -> None:
    row = ROWS["question"] | {"id": "x"}
    source = read([row, row, row | {"id": "x#2"}, row])
    assert [row.id for row in source.rows] == ["x", "x#2", "x#2#2", "x#3"]
    assert [row.source["id"] for row in source.rows] == ["x", "x", "x#2", "x"]


def test_the_format_option_selects_the_layout(read) -> None:
    row = ROWS["trl"] | {"prompt": QUESTION, **PAIR, "question": "Which?"}
    assert read([row]).format == "question"
    source = read([row], format="trl")
    assert (source.format, source.rows[0].instruction) == ("trl", QUESTION)
    assert source.rows[0].source["extra"] == {"question": "Which?"}
    with pytest.raises(RefusedError, match=r"format must be one of \['llamafactory', .*got 'x'\."):
        read([row], format="x")


def test_the_first_row_of_a_known_layout_decides_the_format(read) -> None:
    source = read([{"image": "a.jpg"}, 3, ROWS["trl"]])
    assert (source.format, len(source.rows)) == ("trl", 1)
    assert [problem.code for problem in source.problems] == ["wrong-type", "not-an-object"]


def test_an_unknown_layout_is_refused_with_the_known_ones(read) -> None:
    with pytest.raises(RefusedError) as refused:
        read([{"picture": "a.jpg"}])
    text = str(refused.value)
    assert "got rows with keys ['picture'] in source.jsonl" in text
    assert all(f"  {layout.name}: {layout.summary}" in text for layout in LAYOUTS)
    # rows that are not objects have no keys that could be renamed
    with pytest.raises(RefusedError, match=r"row 1 .*: a row must be an object, got 1\. Corr"):
        read([[1]])
    with pytest.raises(RefusedError, match=r"^2 problem.* in 2 rows:(?s:.*)line 2: a row must"):
        read([3, "x"])


@pytest.mark.parametrize("name", ["completions", "responses", "candidates"])
def test_rows_with_answers_under_unread_keys_are_refused(name: str, read) -> None:
    """VLFeedback has such rows, as JSON or as `datasets` writes them into parquet."""
    for answers in ([{"model": "m", "response": "A."}], {"model": ["m"], "response": ["A."]}):
        row = {"image": "a.jpg", "prompt": QUESTION, name: answers}
        with pytest.raises(RefusedError, match=rf"got rows with {name} .* which are not read\. C"):
            read([row])
        assert read([row | {"answer": "A car."}]).rows[0].answer == "A car."
        assert read([row], format="realign").rows[0].source["extra"] == {name: answers}


@pytest.mark.parametrize(
    ("change", "token", "remedy"),
    [
        (
            {"chosen": "A car.</s>"},
            "</s>",
            "Remove it; the chat template ends the answer automatically.",
        ),
        ({"rejected": "A </s> car."}, "</s>", "Remove it from the text."),
        ({"question": "What? </s>"}, "</s>", "Remove it from the text."),
        (
            {"chosen": "An <image>."},
            "",
            "Remove it; the image is put before the prompt automatically.",
        ),
        ({"question": "A <|vision_start|> b?"}, "<|vision_start|>", "the image is put before the"),
    ],
)
def test_the_remedy_for_a_special_token_fits_the_token(
    change: dict[str, Any], token: str, remedy: str, read
) -> None:
    (problem,) = read([ROWS["question"] | change], special=[token]).problems
    assert remedy in problem.message
    assert problem.message.count("Remove") == 1


def test_a_url_is_refused_as_a_url_without_an_image_folder(tmp_path, read) -> None:
    path = tmp_path / "urls.jsonl"
    path.write_text(json.dumps(ROWS["question"] | {"image": "https://h/a.jpg"}))
    (problem,) = read_source(path, None).problems
    assert (problem.code, "Download it first" in problem.message) == ("url", True)


def test_a_drive_path_without_an_image_folder_is_refused_with_the_images_option(tmp_path) -> None:
    path = tmp_path / "drives.jsonl"
    path.write_text(json.dumps(ROWS["question"] | {"image": "C:\\coco\\1.jpg"}))
    with pytest.raises(RefusedError, match="images must name the folder of the source's images"):
        read_source(path, None)


def test_values_that_json_cannot_hold_are_named(read, capsys) -> None:
    odd = {"odd": "\ud800", "\udfff": 1}
    (row,) = read([ROWS["question"] | odd | {"fine": {"a": [1, None]}}]).rows
    assert row.source["extra"] == {"fine": {"a": [1, None]}}
    assert "not kept, because JSON cannot hold them: \\udfff, odd\n" in capsys.readouterr().err


def test_a_surrogate_in_an_id_is_reported_in_encodable_text(read) -> None:
    (problem,) = read([ROWS["question"], ROWS["question"] | {"id": "\ud800"}]).problems
    assert (problem.field, problem.code, problem.row) == ("id", "surrogate", "\\ud800")
    for text in dataclasses.astuple(problem):
        text.encode()
