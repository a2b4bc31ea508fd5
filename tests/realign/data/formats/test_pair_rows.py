"""Datasets of every layout as training, checking and export read them: with retrieved images."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from realign.data.dataset import read_records, read_rows
from realign.data.export.run import export
from realign.data.formats.parquet import write_parquet
from realign.data.records import Record
from realign.errors import RefusedError
from tests.realign.data.formats.layout_rows import (
    PAIR,
    QUESTION,
    ROWS,
    assistant,
    parts,
    user,
)

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows as JSON lines, as a JSON list, or as parquet, and return the file."""

    def write_rows(rows: list[Any], kind: str = "jsonl") -> Path:
        path = tmp_path / f"data.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            lines = "\n".join(map(json.dumps, rows))
            path.write_text(lines if kind == "jsonl" else json.dumps(rows, indent=1))
        return path

    return write_rows


def with_retrieved(name: str) -> dict[str, Any]:
    """The row of a layout, with b.jpg as its retrieved image."""
    extra = {} if name == "official" else {"rejected_images": ["b.jpg"]}
    return ROWS[name] | extra


def shown(record: Record) -> tuple[Any, ...]:
    return record.prompt, record.chosen, record.rejected, record.images, record.rejected_images


def expected(images: Path) -> tuple[Any, ...]:
    first, second = ((images / name).read_bytes() for name in ("a.jpg", "b.jpg"))
    return (user(QUESTION),), PAIR["chosen"], PAIR["rejected"], (first,), (second,)


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("name", ROWS)
def test_both_pairs_of_every_layout_are_read(
    name: str, kind: str, write: Write, images: Path
) -> None:
    rows = read_records(write([with_retrieved(name)], kind), images)
    assert [shown(row) for row in rows] == [expected(images)]
    assert rows[0].id == "1"
    texts = rows.texts()[0]  # type: ignore[attr-defined]
    assert shown(texts) == (*shown(rows[0])[:3], (), ())
    assert [shown(row) for row in pickle.loads(pickle.dumps(rows))] == [expected(images)]
    assert rows[0].image_place(rejected=True).endswith("rejected_images 'b.jpg'")


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_conversations_with_one_image_are_answer_pairs(
    kind: str, write: Write, images: Path
) -> None:
    row = {name: ROWS["official"][name] for name in ("image", "chosen", "rejected")}
    (read,) = read_records(write([row], kind), images)
    assert shown(read) == (*expected(images)[:4], ())


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", ["llamafactory", "ms-swift"])
def test_a_system_prompt_under_the_system_key_is_read(
    name: str, kind: str, write: Write, images: Path
) -> None:
    rows = [{**with_retrieved(name), "system": text} for text in ("Be brief.", "")]
    if name == "ms-swift":
        rejected = [user(f"<image>{QUESTION}"), assistant(PAIR["rejected"])]
        rows[0] = {**rows[0], "rejected_response": "", "rejected_messages": rejected}
    first, second = read_records(write(rows, kind), images)
    assert first.prompt == ({"role": "system", "content": "Be brief."}, user(QUESTION))
    assert first.rejected == PAIR["rejected"]
    assert second.prompt == (user(QUESTION),)


def test_the_detected_layout_is_printed(write: Write, images: Path, capsys) -> None:
    read_records(write([with_retrieved("ms-swift")]), images)
    assert "data data.jsonl: read as ms-swift (images, messages," in capsys.readouterr().err


@pytest.mark.parametrize("is_implicit", [False, True])
@pytest.mark.parametrize("form", [{"bytes": True}, bytes])
def test_embedded_images_of_trl_rows_are_read(
    is_implicit: bool, form: Any, write: Write, images: Path
) -> None:
    def embedded(name: str) -> Any:
        raw = (images / name).read_bytes()
        return raw if form is bytes else {"bytes": raw, "path": name}

    asked = parts("user", QUESTION, images=1)
    row: dict[str, Any] = {
        name: [asked, parts("assistant", text)] if is_implicit else [parts("assistant", text)]
        for name, text in PAIR.items()
    }
    row |= {} if is_implicit else {"prompt": [asked]}
    row |= {"id": "x", "images": [embedded("a.jpg")], "rejected_images": [embedded("b.jpg")]}
    rows = read_records(write([row, row | {"id": "y"}], "parquet"), None)
    assert [shown(row) for row in rows] == [expected(images)] * 2
    assert [row.id for row in rows.texts()] == ["x", "y"]  # type: ignore[attr-defined]


def test_white_space_multiple_images_and_text_only_rows_are_kept_for_training(
    write: Write, images: Path
) -> None:
    """Training takes rows as they are, where `realign build` would refuse or shorten them."""
    several = ROWS["ms-swift"] | {
        "images": ["a.jpg", "b.jpg"],
        "rejected_images": ["c.jpg", "a.jpg"],
        "messages": [user(f"<image><image>\n{QUESTION}"), assistant(" Two cars.\n")],
    }
    alone = {
        "messages": [user(" Hello? "), assistant("Hi. ")], "rejected_response": " What?"
    }  # fmt: skip
    first, second = read_records(write([several, alone]), images)
    assert (len(first.images), len(first.rejected_images)) == (2, 2)
    assert (first.prompt, first.chosen) == ((user(QUESTION),), " Two cars.\n")
    assert shown(second) == ((user(" Hello? "),), "Hi. ", " What?", (), ())


@pytest.mark.parametrize("ids", [None, ("x", "x"), ("x-text", "x-image")])
@pytest.mark.parametrize("is_first", [False, True])
def test_an_image_pair_of_ms_swift_joins_its_answer_pair(
    ids: tuple[str, str] | None, is_first: bool, write: Write, images: Path
) -> None:
    answers = dict(ROWS["ms-swift"])
    half = {name: answers[name] for name in ("images", "messages")} | {"rejected_images": ["b.jpg"]}
    if ids:
        answers["id"], half["id"] = ids
    (row,) = read_records(write([half, answers] if is_first else [answers, half]), images)
    assert shown(row) == expected(images)
    assert row.id == (ids[0] if ids else "2" if is_first else "1")


def test_an_image_pair_without_its_answer_pair_is_a_bad_row(write: Write, images: Path) -> None:
    half = ROWS["ms-swift"] | {"rejected_response": None, "rejected_images": ["b.jpg"]}
    other = ROWS["ms-swift"] | {"messages": [user(QUESTION), assistant("Another one.")]}
    records, problems = read_rows(write([half, other]), images)
    assert [record.chosen for record in records] == ["Another one."]
    ((problem,),) = problems
    assert (problem.code, problem.field, problem.row) == ("image-pair", "rejected_images", "1")
    parquet = read_records(write([half | {"rejected_response": ""}], "parquet"), images)
    with pytest.raises(RefusedError, match=r"row 1 .*: rejected_images must stand beside a rej"):
        parquet[0]


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"rejected_response": None}, "empty", "rejected must not be empty, got a row without"),
        ({"images": ["none.jpg"]}, "missing", "images: image 'none.jpg' does not exist"),
        ({"rejected_images": ["../x.jpg"]}, "outside-root", "rejected_images: image must lie"),
        ({"images": [{"bytes": None, "path": 3}]}, "image-name", "must be a file name, got 3"),
        ({"images": []}, "image-count", "at most as many <image> as the row has images, 0, got 1"),
        ({"messages": [user("\ud800"), assistant("x")]}, "surrogate", "must be Unicode text"),
        ({"messages": 3}, "wrong-type", "messages must be a list of turns, got 3"),
        ({"id": []}, "wrong-type", "id must be a string or a number"),
    ],
)
def test_bad_rows_are_reported_and_good_rows_are_read(
    change: dict[str, Any], code: str, message: str, write: Write, images: Path
) -> None:
    path = write([ROWS["ms-swift"], ROWS["ms-swift"] | change])
    records, problems = read_rows(path, images)
    assert len(records) == 1
    ((problem,),) = problems
    assert (problem.code, problem.place) == (code, "data.jsonl, line 2")
    assert problem.message.startswith("data.jsonl, line 2")
    with pytest.raises(RefusedError, match=r"^1 problem\(s\) in 2 rows:\ndata.*") as refused:
        read_records(path, images)
    assert message in str(refused.value)


def test_an_image_placeholder_in_an_answer_is_refused(write: Write, images: Path) -> None:
    bad = ROWS["trl"] | {"chosen": [parts("assistant", "A tree.", images=1)]}
    with pytest.raises(RefusedError, match=r"line 1: chosen must have no image parts, got .* Move"):
        read_records(write([bad]), images)


def test_bad_rows_of_parquet_are_refused_when_they_are_read(write: Write, images: Path) -> None:
    good = with_retrieved("question")
    rows = read_records(write([good, good | {"question": " "}], "parquet"), images)
    assert shown(rows[0]) == expected(images)
    with pytest.raises(RefusedError, match=r"^data\.parquet, row 2 \(counting from 1\): question"):
        rows[1]
    with pytest.raises(RefusedError, match=r"images must be embedded as bytes, got a path\. Name"):
        read_records(write([good], "parquet"), None)[0]
    with pytest.raises(RefusedError, match=r"images: image must be a file name, got the URL"):
        read_records(write([good | {"image": "https://h/a.jpg"}], "parquet"), None)[0]


def test_repeated_ids_are_numbered_as_in_a_build(write: Write, images: Path) -> None:
    row = ROWS["povid"] | {"id": "x"}
    assert [r.id for r in read_records(write([row, row, row]), images)] == ["x", "x#2", "x#3"]
    row = ROWS["realign"] | {"id": "x"}
    assert [r.id for r in read_records(write([row, row]), images)] == ["x", "x"]


def test_official_rows_are_read_from_json_lines(write: Write, images: Path) -> None:
    good = ROWS["official"]
    half = good | {"id": "x", "chosen": [user(QUESTION), assistant("Half \ud800.")]}
    path = write([good, half, good | {"image": "none.jpg"}, 3, good | {"id": "y"}])
    path.write_text(path.read_text() + "\n{")
    records, problems = read_rows(path, images)
    assert [(row.id, *shown(row)) for row in records] == [
        ("1", *expected(images)),
        ("y", *expected(images)),
    ]
    assert [(problem.code, problem.row) for (problem,) in problems] == [
        ("surrogate", "x"),
        ("missing", "3"),
        ("not-an-object", "4"),
        ("json", "6"),
    ]
    assert problems[1][0].message.startswith("data.jsonl, line 3: image 'none.jpg' does not exist")


def test_rows_of_unknown_layout_are_refused_with_the_trainable_layouts(
    write: Write, images: Path
) -> None:
    for kind in ("jsonl", "json", "parquet"):
        with pytest.raises(RefusedError) as refused:
            read_records(write([{"picture": "a.jpg"}], kind), images)
        text = str(refused.value)
        assert (
            f"data must have rows of a known layout, got rows with keys ['picture'] in data.{kind}"
            in text
        )
        assert "--format" not in text
        assert "  ms-swift: " in text
        assert "  llava: " not in text
    instructions = {"image": "a.jpg", "conversations": [user(QUESTION), assistant("A car.")]}
    with pytest.raises(
        RefusedError, match=r"rejected must not be empty.* Let `realign build` make"
    ):
        read_records(write([instructions]), images)


FILES = {"ms-swift": "data.jsonl", "llamafactory": "data.json", "official": "pref_data.json"}


@pytest.mark.parametrize("to", ["ms-swift", "llamafactory"])
def test_image_and_answer_pairs_are_exported_in_one_row(to: str, tmp_path: Path, records) -> None:
    """The examples of these trainers make three sequences of one row."""
    one, two, three = records(3)
    alone = dataclasses.replace(two, id="alone", rejected_images=())
    write_parquet([one, alone, three], tmp_path / "d.parquet")
    export(tmp_path / "d.parquet", None, to, tmp_path / "out")
    read = read_records(tmp_path / "out" / "rdpo.jsonl", tmp_path / "out")
    assert [row.key for row in read] == [one.key, three.key]
    write_parquet([alone], tmp_path / "alone.parquet")
    export(tmp_path / "alone.parquet", None, to, tmp_path / "none")
    assert not (tmp_path / "none" / "rdpo.jsonl").exists()
    if to == "llamafactory":  # names no file that is not there
        description = json.loads((tmp_path / "none" / "dataset_info.json").read_text())
        assert [entry["file_name"] for entry in description.values()] == ["data.json"]


@pytest.mark.parametrize("to", ["ms-swift", "llamafactory", "official", "trl"])
def test_exported_rows_are_read_back_unchanged(to: str, tmp_path: Path, records) -> None:
    """LLaMA-Factory's layout alone has no place for the retrieved images."""
    one, two, three, four = records(4)
    again = dataclasses.replace(one, id="again", rejected="Another answer. ")
    rows = [one, again, dataclasses.replace(two, chosen="Spaces. \n"), three, four]
    if to != "official":
        rows += [
            dataclasses.replace(one, id="alone", rejected_images=()),
            dataclasses.replace(
                four,
                id="several",
                images=(*one.images, *two.images),
                rejected_images=(*three.images, *four.images),
                prompt=({"role": "system", "content": "Be kind."}, *four.prompt),
            ),
        ]
    rows.append(dataclasses.replace(three, id="text", images=(), rejected_images=()))
    write_parquet(rows, tmp_path / "d.parquet")
    out = tmp_path / "out"
    export(tmp_path / "d.parquet", None, to, out)
    root = None if to == "trl" else out / "images" if to == "official" else out
    read = read_records(out / FILES.get(to, "dataset.parquet"), root)
    if to == "llamafactory":
        rows = [dataclasses.replace(row, rejected_images=()) for row in rows]
    assert [(row.id, shown(row)) for row in read] == [(row.id, shown(row)) for row in rows]
    assert [row.key for row in read] == [row.key for row in rows]
