"""The authors' layout: rows are written as they were read, and a reader written from docs/paper.md
2.3 alone can use what was built.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from realign.data.dataset import read_records
from realign.data.export.run import export
from realign.data.formats.parquet import write_parquet
from realign.errors import RefusedError


def same(left: Any, right: Any) -> bool:
    """Equal JSON, the order of keys included."""
    return json.dumps(left) == json.dumps(right)


def exported(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "pref_data.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("through_parquet", [False, True])
def test_imported_rows_are_exported_unchanged(
    tmp_path: Path, official: Path, official_rows, through_parquet: bool
) -> None:
    images, data, out = tmp_path / "images", official, tmp_path / "out"
    if through_parquet:
        data = tmp_path / "dataset.parquet"
        write_parquet(read_records(official, images), data)
    result = export(data, None if through_parquet else images, "official", out)
    for row, back in zip(official_rows, exported(out), strict=True):
        assert same(back, row)
        for name in ("image", "retrieved_image"):
            if name in row:
                assert (out / "images" / row[name]).read_bytes() == (
                    images / row[name]
                ).read_bytes()
    assert result.counts == {
        "rows read": 12,
        "rows written": 12,
        "rows without an image": 1,
        "images written": 7,
    }
    again = read_records(out / "pref_data.json", out / "images")
    assert list(again) == list(read_records(official, images))


def test_a_standard_row_keeps_no_copy_in_its_provenance(tmp_path: Path, official: Path) -> None:
    rows = read_records(official, tmp_path / "images")
    assert ["row" in row.source for row in rows] == [False, False] + [True] * 5 + [False] + [
        True
    ] * 2 + [False, False]


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=12)
EXTRA = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=5).filter(
        lambda key: key not in ("image", "retrieved_image", "chosen", "rejected", "id")
    ),
    st.none()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.lists(TEXT, max_size=2),
    max_size=3,
)


@st.composite
def rows(draw: Any) -> dict[str, Any]:
    """A row of the layout: any texts, turns, unknown keys and order of keys."""
    has_image = draw(st.booleans())
    prompt = draw(st.lists(TEXT, min_size=1, max_size=5).filter(lambda texts: len(texts) % 2))
    if has_image and draw(st.booleans()):
        prompt[0] = draw(st.sampled_from(["<image>\n{}", "{}\n<image>", "<image>{}"])).format(
            prompt[0].replace("{", "").replace("}", "")
        )
    row = draw(EXTRA)
    for name in ("chosen", "rejected"):
        texts = [*prompt, draw(TEXT)]
        row[name] = [
            draw(EXTRA.filter(lambda extra: not extra.keys() & {"role", "content"}))
            | {"role": ("user", "assistant")[i % 2], "content": text}
            for i, text in enumerate(texts)
        ]
    if has_image:
        row |= {"image": "a.png", "retrieved_image": "deep/ü.png"}
    if draw(st.booleans()):
        row["id"] = draw(TEXT | st.integers())
    keys = draw(st.permutations(sorted(row)))
    return {key: row[key] for key in keys}


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(made=st.lists(rows(), min_size=1, max_size=4))
def test_import_and_export_are_inverse(
    tmp_path_factory, tmp_path: Path, official: Path, made: list[dict[str, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("round")
    (folder / "pref_data.json").write_text(json.dumps(made))
    export(folder / "pref_data.json", tmp_path / "images", "official", folder / "once")
    assert same(exported(folder / "once"), made)
    once = read_records(folder / "once" / "pref_data.json", folder / "once" / "images")
    assert list(once) == list(read_records(folder / "pref_data.json", tmp_path / "images"))
    write_parquet(once, folder / "d.parquet")
    export(folder / "d.parquet", None, "official", folder / "twice")
    assert same(exported(folder / "twice"), made)


def test_exported_built_rows_get_unique_ids_and_image_names(tmp_path: Path, built) -> None:
    write_parquet(built, tmp_path / "d.parquet")
    result = export(tmp_path / "d.parquet", None, "official", tmp_path / "out")
    written = exported(tmp_path / "out")
    assert [row["id"] for row in written] == ["0", "1", "2", "fourth"]
    assert (written[0]["image"], written[0]["retrieved_image"]) == ("same.png", "other.png")
    for row, record in zip(written, built, strict=True):
        for name, (raw,) in (("image", record.images), ("retrieved_image", record.rejected_images)):
            path = (tmp_path / "out" / "images" / row[name]).resolve()
            assert path.read_bytes() == raw
            assert path.is_relative_to(tmp_path / "out" / "images")
            if record.id != "0":
                assert row[name] == f"{hashlib.sha256(raw).hexdigest()}.png"
    # two for "1" (a name that is another image's, a folder that is a file), two for "2"
    assert result.counts["images renamed"] == 4
    read = read_records(tmp_path / "out" / "pref_data.json", tmp_path / "out" / "images")
    assert [(row.id, row.key) for row in read] == [(row.id, row.key) for row in built]
    export(
        tmp_path / "out" / "pref_data.json", tmp_path / "out" / "images", "official", tmp_path / "b"
    )
    assert same(exported(tmp_path / "b"), written)


@pytest.mark.parametrize("row", [3, "{", "[]", "3", "{}", '{"chosen": 1, "rejected": []}'])
def test_provenance_of_another_layout_is_ignored(tmp_path: Path, records, row: Any) -> None:
    (record,) = records(1)
    odd = dataclasses.replace(record, meta={"source": {"row": row}})
    write_parquet([odd], tmp_path / "d.parquet")
    export(tmp_path / "d.parquet", None, "official", tmp_path / "out")
    read = read_records(tmp_path / "out" / "pref_data.json", tmp_path / "out" / "images")
    assert [(row.id, row.key) for row in read] == [(record.id, record.key)]


def test_an_edited_record_is_exported_with_its_edits(tmp_path: Path, official: Path) -> None:
    rows = list(read_records(official, tmp_path / "images"))
    rows[4] = dataclasses.replace(rows[4], chosen="Edited.")
    rows[5] = dataclasses.replace(rows[5], images=(), rejected_images=())
    write_parquet(rows, tmp_path / "d.parquet")
    export(tmp_path / "d.parquet", None, "official", tmp_path / "out")
    written = exported(tmp_path / "out")
    assert written[4]["chosen"][-1]["content"] == "Edited."
    assert written[4]["extra"] == {"z": [1.5, None], "a": "ü"}
    read = read_records(tmp_path / "out" / "pref_data.json", tmp_path / "out" / "images")
    assert [row.key for row in read] == [row.key for row in rows]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rejected_images": ()},
            "requires one image and one retrieved image, or none, got 1 and 0",
        ),
        ({"images": (b"a", b"b"), "rejected_images": (b"c", b"d")}, "or none, got 2 and 2"),
        ({"prompt": ({"role": "system", "content": "x"},)}, "must alternate user and assistant"),
        ({"prompt": ()}, "prompt must not be empty"),
    ],
)
def test_records_that_the_official_layout_cannot_hold_are_refused(
    tmp_path: Path, records, change: dict[str, Any], message: str
) -> None:
    good, bad = records(2)
    write_parquet([good, dataclasses.replace(bad, **change)], tmp_path / "d.parquet")
    with pytest.raises(
        RefusedError, match=f"1 problem.* in 2 rows:\nd.parquet, row r1: .*{message}"
    ):
        export(tmp_path / "d.parquet", None, "official", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["d.parquet"]


def read_as_documented(data: Path, images: Path) -> list[dict[str, Any]]:
    """Read the file as the authors' training code does, by docs/paper.md 2.3."""
    samples = []
    for element in json.loads(data.read_text(encoding="utf-8")):
        sample: dict[str, Any] = {}
        if "image" in element:
            for name in ("image", "retrieved_image"):
                with Image.open(images / element[name]) as image:  # KeyError without the second
                    sample[name] = image.convert("RGB").size
        for name in ("chosen", "rejected"):
            texts = []
            for number, turn in enumerate(element[name]):
                assert turn["role"] == ("user", "assistant")[number % 2]
                text = turn["content"]
                if "<image>" in text:
                    text = "<image>\n" + text.replace("<image>", "").strip()
                texts.append(text)
            assert number % 2, "a conversation ends with an answer"
            assert sum(text.count("<image>") for text in texts) == ("image" in element)
            sample[name] = texts
        samples.append(sample)
    return samples


def test_a_reader_of_the_documented_layout_reads_what_was_built(tmp_path: Path, built) -> None:
    text_only = dataclasses.replace(built[0], id="text", images=(), rejected_images=(), meta={})
    write_parquet([*built, text_only], tmp_path / "d.parquet")
    export(tmp_path / "d.parquet", None, "official", tmp_path / "out")
    samples = read_as_documented(tmp_path / "out" / "pref_data.json", tmp_path / "out" / "images")
    for sample, record in zip(samples, [*built, text_only], strict=True):
        prompt = [turn["content"] for turn in record.prompt]
        if record.images:
            prompt[0] = f"<image>\n{prompt[0]}"
            sizes = [Image.open(io.BytesIO(raw)).size for raw in record.images]
            assert [sample["image"]] == [sample["retrieved_image"]] == sizes
        assert sample["chosen"] == [*prompt, record.chosen]
        assert sample["rejected"] == [*prompt, record.rejected]
    assert "image" not in samples[-1]


def test_the_documented_reader_rejects_an_incomplete_row(tmp_path: Path, built) -> None:
    write_parquet(built, tmp_path / "d.parquet")
    export(tmp_path / "d.parquet", None, "official", tmp_path / "out")
    rows = exported(tmp_path / "out")
    del rows[0]["retrieved_image"]
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    with pytest.raises(KeyError, match="retrieved_image"):
        read_as_documented(tmp_path / "bad.json", tmp_path / "out" / "images")
