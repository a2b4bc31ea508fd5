"""``realign check``: every bad row with its place and code, lengths and memory, exit codes."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers.normalizers import Replace
from typer.testing import CliRunner

from realign.cli import app
from realign.config import CheckConfig, LoraSection
from realign.config_file import load_config
from realign.data.formats.parquet import write_parquet
from realign.modeling.adapters import add_adapter
from realign.modeling.collate import PreferenceCollator
from realign.modeling.lengths import RowLengths
from realign.modeling.loading import load_model
from realign.modeling.memory import Footprint
from realign.modeling.parts import freeze_parts
from realign.modeling.processors import load_processor
from realign.review.check import check
from tests.realign.conftest import write_authors_images


def realign(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def jpeg(raw: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(raw)).convert("RGB").save(buffer, "JPEG", quality=60)
    return buffer.getvalue()


def one_bad_row_of_each_kind(records) -> dict[str, tuple]:
    """Row id to the record, and field and code of its problems."""
    good = {record.id: record for record in records(14)}
    changes = {
        "r1": ({"chosen": " \n"}, [("chosen", "empty")]),
        "r2": ({"rejected": f" {good['r2'].chosen}\n"}, [("rejected", "equal-answers")]),
        "r3": ({"rejected": "A <image>."}, [("rejected", "special-token")]),
        "r4": ({"images": (b"junk",)}, [("images", "format")]),
        "r5": ({"rejected_images": good["r5"].images}, [("rejected_images", "equal-images")]),
        "r6": (
            {"rejected_images": (jpeg(good["r6"].images[0]),)},
            [("rejected_images", "near-images")],
        ),
        "r7": (
            {"prompt": ({"role": "system", "content": "Be brief."},)},
            [("prompt", "image-slot")],
        ),
        "r8": (
            {"rejected_images": good["r8"].rejected_images * 2},
            [("rejected_images", "image-count")],
        ),
        "r9": ({"chosen": "a long answer " * 300}, [("", "too-long")]),
        "r10": ({"chosen": "A house.</s>"}, [("chosen", "special-token")]),
        "r11": ({"images": good["r0"].images}, [("images", "leak")]),
        "r12": ({"rejected": "\u200b"}, []),
    }  # fmt: skip
    rows = {
        name: (dataclasses.replace(good[name], **change), problems)
        for name, (change, problems) in changes.items()
    }
    again = dataclasses.replace(good["r13"], id="r13 again")
    same_id = dataclasses.replace(records(20)[19], id="r13")
    return rows | {
        "r13": (good["r13"], []),
        "r13 again": (again, [("", "duplicate-row")]),
        "the same id": (same_id, [("id", "duplicate-id")]),
    }


@pytest.fixture
def eval_images(tmp_path: Path, records) -> Path:
    """The first row's original, the thirteenth's retrieved image as another file, and a note."""
    folder = tmp_path / "evaluation" / "deep"
    folder.mkdir(parents=True)
    (folder / "first.png").write_bytes(records(1)[0].images[0])
    (folder / "near.JPG").write_bytes(jpeg(records(14)[13].rejected_images[0]))
    (folder.parent / "readme.txt").write_text("no image")
    return folder.parent


def test_every_bad_row_is_reported_with_field_and_code(
    tmp_path: Path, records, model_dir: Path, eval_images: Path
) -> None:
    rows = one_bad_row_of_each_kind(records)
    write_parquet((record for record, _ in rows.values()), tmp_path / "d.parquet")
    out = tmp_path / "out"
    result = realign(
        "check", "--data", tmp_path / "d.parquet", "--model", model_dir, "--out", out,
        "--eval-images", eval_images,
    )  # fmt: skip
    assert result.exit_code == 1, result.output
    report = json.loads((out / "problems.json").read_text())
    found: dict[str, list] = {}
    for problem in report["problems"]:
        found.setdefault(problem["row"], []).append((problem["field"], problem["code"]))
        assert problem["message"].startswith("d.parquet, row ")
        assert problem["message"].endswith(".")
        assert problem["place"] == f"d.parquet, row {problem['row']}"
        assert problem["message"] in result.output
    expected = {row: problems for row, (_, problems) in rows.items() if problems}
    expected["r13"] = expected.pop("the same id")
    assert found == expected
    assert (report["rows"], report["rejected_rows"], report["has_passed"]) == (15, 13, False)
    assert report["counts"]["special-token"] == 2
    assert sum(report["counts"].values()) == len(report["problems"])
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert {row["row"] for row in rejected} == expected.keys()
    assert {(w["row"], w["field"], w["code"]) for w in report["warnings"]} >= {
        ("r13", "rejected_images", "near-leak")
    }
    assert "NOT passed: 13 of 15 rows rejected (86.67%; at most 0.00% may be)" in result.output
    assert "leakage: compared with 2 evaluation images" in result.output


def test_a_good_dataset_passes(tmp_path: Path, records, model_dir: Path) -> None:
    rows = records(12)
    write_parquet(rows, tmp_path / "d.parquet")
    result = realign("check", "--data", tmp_path / "d.parquet", "--model", model_dir)
    assert result.exit_code == 0, result.output
    collator = PreferenceCollator(load_processor(model_dir), 3)
    lengths = sorted(collator.lengths(rows))
    assert f"tokens per row, images included: min {lengths[0]}, median" in result.output
    assert f"max {lengths[-1]}\n" in result.output
    assert "passed: 0 of 12 rows rejected" in result.output
    assert "NOT" not in result.output
    assert "leakage: not checked without --eval-images" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["d.parquet"]


def test_bad_rows_of_official_json_do_not_stop_the_check(tmp_path: Path, records) -> None:
    rows = write_authors_images(records(8), tmp_path / "images")
    rows[1]["image"] = "gone.png"
    rows[1]["retrieved_image"] = "../x.png"
    rows[2] = "no row"
    rows[3]["image"] = "http://example.org/a.png"
    del rows[4]["rejected"]
    rows[5]["chosen"][1]["content"] = ""
    (tmp_path / "images" / "6.png").write_bytes((tmp_path / "images" / "6.png").read_bytes()[:300])
    path = tmp_path / "pref_data.json"
    path.write_text(json.dumps(rows))
    findings = check(CheckConfig(data=path, images=tmp_path / "images"))
    assert {(p.row, p.field, p.code) for p in findings.problems} == {
        ("2", "image", "missing"),
        ("2", "retrieved_image", "outside-root"),
        ("3", "", "not-an-object"),
        ("4", "image", "url"),
        ("5", "rejected", "missing-key"),
        ("6", "chosen", "empty"),
        ("7", "images", "damaged"),
    }
    assert (findings.num_rows, len(findings.rejected), findings.has_passed) == (8, 6, False)


def test_bad_rows_of_a_parquet_file_do_not_stop_the_check(tmp_path: Path, records) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = records(3)
    write_parquet(rows, tmp_path / "d.parquet")
    table = pq.read_table(tmp_path / "d.parquet").to_pylist()
    table[1]["images"] = [{"bytes": None, "path": "a.png"}]
    table[2]["meta"] = "{"
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "d.parquet")
    findings = check(CheckConfig(data=tmp_path / "d.parquet"))
    assert [(p.row, p.place, p.field, p.code) for p in findings.problems] == [
        ("r1", "d.parquet, row r1", "images", "not-embedded"),
        ("r2", "d.parquet, row r2", "meta", "meta"),
    ]


@pytest.mark.parametrize(
    ("share", "code"), [("0", 1), ("9.9%", 1), ("10%", 0), ("0.1", 0), ("100%", 0)]
)
def test_the_exit_code_depends_on_the_share_of_bad_rows(
    tmp_path: Path, records, share: str, code: int
) -> None:
    rows = records(10)
    rows[4] = dataclasses.replace(rows[4], chosen="")
    write_parquet(rows, tmp_path / "d.parquet")
    result = realign("check", "--data", tmp_path / "d.parquet", "--max-reject", share)
    assert result.exit_code == code, result.output
    assert "1 of 10 rows rejected (10.00%" in result.output
    assert "empty in chosen: 1" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "none.parquet"), "which does not exist"),
        (("--data", "d.parquet", "--max-reject", "2"), "check.max_reject: Input should be less"),
        (("--data", "d.parquet", "--max-reject", "x%"), "max_reject: Input should be a valid"),
        (("--data", "d.parquet", "--model", "./none"), "model must be an existing folder"),
        (("--data", "d.parquet", "--eval-images", "none"), "must be an existing folder"),
        (("--data", "d.parquet", "--eval-images", "."), "eval_images must hold images"),
        (("--data", "d.parquet", "--out", "d.parquet"), "out must be a folder"),
        (("--data", "empty.json", "--images", "."), "at least one row, got none"),
        ((), "check.data is required"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_checked_exits_with_2(
    tmp_path: Path, records, monkeypatch: pytest.MonkeyPatch, arguments: tuple, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_parquet(records(1), Path("d.parquet"))
    Path("empty.json").write_text("[]")
    result = realign("check", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_many_problems_of_a_kind_are_counted_and_few_are_shown(tmp_path: Path, records) -> None:
    rows = [dataclasses.replace(record, rejected="") for record in records(9)]
    write_parquet(rows, tmp_path / "d.parquet")
    findings = check(CheckConfig(data=tmp_path / "d.parquet"))
    lines = list(findings.lines(2))
    assert lines[0] == "empty in rejected: 9"
    assert [line.partition(":")[0] for line in lines[1:3]] == [
        "  d.parquet, row r0",
        "  d.parquet, row r1",
    ]
    assert lines[3] == "  ... and 7 more"


def test_missing_images_found_in_another_folder_are_noted(tmp_path: Path, records) -> None:
    (tmp_path / "images" / "coco").mkdir(parents=True)
    rows = []
    for record in records(4):
        name = f"{record.id}.png"
        (tmp_path / "images" / "coco" / name).write_bytes(record.images[0])
        row = {"image": name, "question": "What?", "chosen": "A cat.", "rejected": "A dog."}
        rows.append(json.dumps(row))
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(rows) + "\n")
    findings = check(CheckConfig(data=data, images=tmp_path / "images"))
    folder = tmp_path / "images" / "coco"
    assert len(findings.rejected) == 4
    assert f"{folder}/r0.png exists: pass --images {folder}." in findings.notes


def test_the_max_length_option_limits_the_row_length(tmp_path: Path, records, model_dir) -> None:
    write_parquet(records(6), tmp_path / "d.parquet")
    result = realign(
        "check", "--data", tmp_path / "d.parquet", "--model", model_dir, "--max-length", 40
    )
    assert result.exit_code == 1
    assert "must have at most max_length = 40 tokens, got 5" in result.output


def test_duplicate_rows_may_be_allowed(tmp_path: Path, records) -> None:
    (row,) = records(1)
    row = dataclasses.replace(row, rejected_images=(jpeg(row.images[0]),))
    write_parquet([row], tmp_path / "d.parquet")
    assert not check(CheckConfig(data=tmp_path / "d.parquet")).has_passed
    config = load_config(
        CheckConfig, None, ["check.max_hamming=null"], {"data": tmp_path / "d.parquet"}
    )
    assert check(config).has_passed


def test_a_wrong_length_prediction_is_found_and_every_row_is_collated(
    tmp_path: Path, records, model_dir, monkeypatch: pytest.MonkeyPatch
) -> None:
    from realign.modeling.lengths import ImageTokens

    rows = records(8)
    write_parquet(rows, tmp_path / "d.parquet")
    config = CheckConfig(data=tmp_path / "d.parquet", model=str(model_dir))
    right = check(config).prediction
    assert right["is_collated"] is False
    monkeypatch.setattr(ImageTokens, "__call__", lambda *_: 1)
    wrong = check(config).prediction
    assert wrong["is_collated"] is True
    assert wrong["row_tokens"] == right["row_tokens"]


def test_predicted_memory_equals_that_of_the_loaded_model(
    tmp_path: Path, records, model_dir
) -> None:
    write_parquet(records(2), tmp_path / "d.parquet")
    lora = LoraSection(r=4, alpha=8)
    findings = check(CheckConfig(data=tmp_path / "d.parquet", model=str(model_dir), lora=lora))
    training = {(e["kind"], e["dtype"]): e for e in findings.prediction["memory"]["training"]}
    assert len(training) == 4
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = load_model(model_dir, dtype)
        freeze_parts(model, {"vision"})
        full = Footprint.of(model)
        adapted = Footprint.of(
            add_adapter(model, rank=4, alpha=8, targets="all-linear", freeze_vision=True)
        )
        for kind, footprint in (("full", full), ("lora", adapted)):
            entry = training[kind, name]
            assert entry["weights_bytes"] == footprint.weights
            assert entry["gradients_bytes"] == footprint.gradients
            assert entry["total_bytes"] == footprint.total
    (estimate, _) = findings.prediction["memory"]["estimates"]
    assert 0 < estimate["activations_with_checkpointing_bytes"] < estimate["activations_bytes"]


def problems_for(processor, record) -> list[tuple[str, str]]:
    lengths = RowLengths(processor, {})
    found = lengths.problems(record, [(96, 96)], [(96, 96)])
    return [(problem.field, problem.code) for problem in found]


def test_an_answer_without_tokens_is_reported(records, model_dir) -> None:
    (row,) = records(1)
    row = dataclasses.replace(row, rejected="\u200b\u200b")
    processor = load_processor(model_dir)
    assert problems_for(processor, row) == []
    processor.tokenizer.backend_tokenizer.normalizer = Replace("\u200b", "")
    assert problems_for(processor, row) == [("rejected", "no-scored-token")]


def test_a_template_that_changes_an_answer_is_reported(records, model_dir) -> None:
    (row,) = records(1)
    processor = load_processor(model_dir)
    assert problems_for(processor, row) == []
    processor.chat_template = "{{ messages[0]['content'][-1]['text'] }} and no more"
    assert problems_for(processor, row) == [("", "template")]


def test_the_check_loads_no_weights(tmp_path: Path, records, model_dir: Path) -> None:
    write_parquet(records(2), tmp_path / "d.parquet")
    copy = tmp_path / "model"
    copy.mkdir()
    for file in model_dir.iterdir():
        if file.suffix != ".safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    assert check(CheckConfig(data=tmp_path / "d.parquet", model=str(copy))).has_passed


def test_a_damaged_parquet_file_is_reported_by_name(tmp_path: Path, records) -> None:
    path = tmp_path / "d.parquet"
    write_parquet(records(3), path)
    raw = bytearray(path.read_bytes())
    raw[4:2000] = bytes(1996)
    path.write_bytes(raw)
    findings = check(CheckConfig(data=path))
    assert {problem.code for problem in findings.problems} == {"damaged"}
    assert len(findings.rejected) == 3


def test_a_bad_image_of_the_evaluation_data_is_reported(
    tmp_path: Path, records, eval_images: Path
) -> None:
    (eval_images / "bad.png").write_bytes(b"x")
    write_parquet(records(2)[1:], tmp_path / "d.parquet")
    findings = check(CheckConfig(data=tmp_path / "d.parquet", eval_images=eval_images))
    assert any("not compared: " in note and "bad.png" in note for note in findings.notes)
