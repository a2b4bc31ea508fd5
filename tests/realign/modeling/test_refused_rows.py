"""An input that a processor or a template refuses is a problem of its row, whatever is raised."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from realign.building.run import build
from realign.cli import app
from realign.data.dataset import read_records
from realign.data.formats.parquet import write_parquet
from realign.data.records import Record
from realign.errors import RefusedError
from realign.modeling.processors import load_processor
from realign.modeling.row_checks import check_rows
from tests.realign.conftest import build_config
from tests.realign.modeling.families.registry import FAMILIES

THIN = "image of 600 x 2 pixels must be what Qwen2_5_VLProcessor takes, got ValueError: absolute"


def png(size: tuple[int, int], colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose processor does not take images of an aspect ratio above 200."""
    return FAMILIES["qwen2.5-vl"]().save(tmp_path_factory.mktemp("qwen") / "model")


@pytest.fixture
def rows(records) -> list[Record]:
    """The first row's images are taken, two others are too thin in either place, and one is empty;
    the first of all is thin, so that nothing rests on the first row.
    """
    rows: list[Record] = records(5)
    rows[0] = dataclasses.replace(rows[0], images=(png((600, 2)),))
    rows[2] = dataclasses.replace(rows[2], rejected_images=(png((600, 2)),))
    return rows


def test_every_too_thin_image_is_reported_with_its_row(tmp_path: Path, qwen: Path, rows) -> None:
    write_parquet(rows, tmp_path / "d.parquet")
    for command, code in (("check", 1), ("train", 2), ("cache", 2)):
        arguments = [command, "--model", qwen, "--data", tmp_path / "d.parquet"]
        arguments += ["--out", tmp_path / command]
        result = CliRunner().invoke(app, [*map(str, arguments)])
        assert result.exit_code == code, result.output
        assert f"d.parquet, row r0, images: {THIN} aspect ratio" in result.output
        assert f"d.parquet, row r2, rejected_images: {THIN} aspect ratio" in result.output
        assert "got 300.0. Replace it or remove the row." in result.output
        assert "row r1" not in result.output
    problems = json.loads((tmp_path / "check" / "problems.json").read_text())
    assert [(p["row"], p["field"], p["code"]) for p in problems["problems"]] == [
        ("r0", "images", "processor"),
        ("r2", "rejected_images", "processor"),
    ]
    arguments = ["check", "--model", str(qwen), "--data", str(tmp_path / "d.parquet")]
    result = CliRunner().invoke(app, [*arguments, "--max-reject", "40%"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("kind", [TypeError, IndexError, KeyError, AssertionError, RuntimeError])
def test_any_error_of_a_processor_is_reported_with_the_row(model_dir: Path, records, kind) -> None:
    processor = load_processor(model_dir)
    images = processor.image_processor

    class Refusing(type(images)):  # type: ignore[misc] # a class of the library's choice
        def __call__(self, images: Any, *args: Any, **options: Any) -> Any:
            sizes = {image.size for row in images for image in row}
            if (40, 30) in sizes:
                raise kind("not this one")
            return super().__call__(images, *args, **options)

    images.__class__ = Refusing
    rows = records(3)
    rows[1] = dataclasses.replace(rows[1], images=(png((40, 30)),))
    message = (
        r"^1 problem\(s\) in 3 rows:\nrow r1, images: image of 40 x 30 pixels must be what "
        rf"LlavaProcessor takes, got {kind.__name__}: '?not this one'?\. Replace it"
    )
    with pytest.raises(RefusedError, match=message):
        check_rows(rows, processor, cells=3, max_length=None)


def test_problems_of_every_kind_are_listed_together(qwen: Path, rows) -> None:
    rows[1] = dataclasses.replace(rows[1], chosen="A cat.<|im_end|>")
    with pytest.raises(RefusedError) as refused:
        check_rows(rows, load_processor(qwen), cells=3, max_length=None)
    first, *others = str(refused.value).splitlines()
    assert first == "3 problem(s) in 5 rows:"
    starts = (
        "row r0, images: image of",
        "row r1: chosen must not",
        "row r2, rejected_images: image",
    )
    assert all(line.startswith(start) for line, start in zip(others, starts, strict=True))


def test_refusals_of_several_images_together_are_reported(model_dir: Path, records) -> None:
    processor = load_processor(model_dir)
    kind = type(processor)

    class Single(kind):  # type: ignore[misc,valid-type] # a class of the library's choice
        def __call__(self, images: Any = None, **options: Any) -> Any:
            if any(len(row) > 1 for row in images or ()):
                raise ValueError("one image at most")
            return super().__call__(images=images, **options)

    processor.__class__ = Single
    first, second = records(2)
    both = dataclasses.replace(
        second, images=second.images * 2, rejected_images=second.rejected_images * 2
    )
    with pytest.raises(RefusedError, match=r"\nrow r1: image of .* got ValueError: one image at m"):
        check_rows([first, both], processor, cells=3, max_length=None)


def test_a_video_placeholder_counts_as_a_special_token(records) -> None:
    rows = records(5)  # more than are collated to be measured
    prompt = ({"role": "user", "content": "What is a <video>?"},)
    rows[4] = dataclasses.replace(rows[4], prompt=prompt)
    with pytest.raises(
        RefusedError, match=r"row r4: prompt must not contain the special .*<video>"
    ):
        check_rows(rows, FAMILIES["smolvlm"]().processor, cells=3, max_length=None)


def test_turns_refused_by_a_template_are_reported_with_the_row(model_dir: Path, records) -> None:
    processor = load_processor(model_dir)
    processor.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role.') }}"
        "{% endif %}" + processor.chat_template
    )
    rows = records(3)
    system = ({"role": "system", "content": "Be brief."}, *rows[1].prompt)
    rows[1] = dataclasses.replace(rows[1], prompt=system)
    message = r"\nrow r1: prompt must be what the chat template takes, got No system role\. Correct"
    with pytest.raises(RefusedError, match=message):
        check_rows(rows, processor, cells=3, max_length=None)


def test_an_unusable_benchmark_image_is_refused_before_the_first_question(
    tmp_path: Path, qwen: Path, model_dir: Path
) -> None:
    (tmp_path / "0.png").write_bytes(png((60, 40)))
    (tmp_path / "thin.png").write_bytes(png((600, 2)))
    questions = [
        {"image": image, "text": f"Is there a {noun}?", "label": "no"}
        for image in ("0.png", "thin.png")
        for noun in ("cat", "dog")
    ]
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    (tmp_path / "pope_random.jsonl").write_text(lines)
    arguments = ["eval", "--data", tmp_path, "--images", tmp_path, "--out", tmp_path / "out"]
    arguments += ["--model", f"base={model_dir}", "--model", f"qwen={qwen}"]
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 2, result.output
    assert "2 problem(s) in 4 rows" in result.output
    assert f"pope_random.jsonl, line 3, thin.png, model qwen: {THIN}" in result.output
    assert "model base" not in result.output
    assert not (tmp_path / "out").exists()


def test_a_question_with_a_special_token_is_refused(tmp_path: Path, model_dir: Path) -> None:
    (tmp_path / "0.png").write_bytes(png((60, 40)))
    question = {"image": "0.png", "text": "<image>\nIs there a cat?", "label": "no"}
    (tmp_path / "pope_random.jsonl").write_text(json.dumps(question) + "\n")
    arguments = ["eval", "--data", tmp_path, "--images", tmp_path, "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--model", f"m={model_dir}"])
    assert result.exit_code == 2, result.output
    assert "text must not contain the special token '<image>'" in result.output


def test_a_source_row_with_an_unusable_image_is_left_out(
    tmp_path: Path, qwen: Path, rows: list[Record]
) -> None:
    config = build_config(rows, tmp_path, qwen)
    message = rf"^1 of 5 rows of source\.jsonl are bad, .*\nsource\.jsonl, line 1, 0\.png: {THIN}"
    with pytest.raises(RefusedError, match=message):
        build(config)
    records = read_records(build(config.model_copy(update={"max_reject": 0.2})), None)
    assert [record.id for record in records] == ["r1", "r2", "r3", "r4"]
    rejected = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert [(row["row"], row["code"]) for row in map(json.loads, rejected)] == [("r0", "processor")]
    thin = (tmp_path / "0.png").read_bytes()
    assert not [record for record in records if thin in record.rejected_images]
