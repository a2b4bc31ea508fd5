"""Written answers are read again with the same scores, and have the form of published files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from realign.cli import app
from realign.errors import RefusedError
from realign.evaluation import score, write
from realign.evaluation.answer_forms import FORMS
from realign.evaluation.registry import find_benchmark

HARD = [
    *("Yes", "No", "yes", " No. ", "No\tway", "n\no", "yes\r\nindeed", "NO", "Not sure", "Y", "n"),
    *("", "yes, \u2028 it is", "no \u0085 it", "\x0cno", '"no"', "no;yes", "22.", "the 1,000"),
    *("A", "B.", "A. x", "The answer is B.", "(B)", "b", "It's a 'quote'", "İno", "red,\nblue"),
]
SHORT = "\nAnswer the question using a single word or phrase."


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def pope(folder: Path) -> None:
    for split in ("random", "popular", "adversarial"):
        rows = [
            {"image": f"{i // 4}.jpg", "text": f"Is there a {split} {i}?", "label": label}
            for i, label in zip(range(30), cycle(("yes", "no")), strict=False)
        ]
        lines(folder / f"coco_pope_{split}.json", rows)


def hallusionbench(folder: Path) -> None:
    folder.mkdir()
    rows = [
        {
            "category": "VS" if i % 2 else "VD",
            "subcategory": "ocr",
            "set_id": str(i // 8),
            "figure_id": str(i // 2 % 2),
            "question_id": str(i // 4),
            "question": f"{i}?",
            "visual_input": str(1 + i % 2),
            "gt_answer": str(i % 2),
            "filename": f"{i}.png",
            "gt_answer_details": f"It is {i}.",
        }
        for i in range(32)
    ]
    (folder / "HallusionBench.json").write_text(json.dumps(rows))


def amber(folder: Path) -> None:
    kinds = ("discriminative-attribute-state", "discriminative-hallucination", "relation")
    folder.mkdir()
    rows = [{"id": i, "image": f"{i // 3}.jpg", "query": f"Is it {i}?"} for i in range(1, 40)]
    (folder / "query_discriminative.json").write_text(json.dumps(rows))
    truths = [
        {"id": i, "type": kinds[i % 3], "truth": "yes" if i % 2 else "no"} for i in range(1, 40)
    ]
    (folder / "annotations.json").write_text(json.dumps(truths))


def mme(folder: Path) -> None:
    folder.mkdir()
    for task in ("existence", "count"):
        rows = [
            f"{i}.jpg\tIs it {i} or {label}?  Please answer yes or no.\t{label}\n"
            for i in range(14)
            for label in ("Yes", "No")
        ]
        (folder / f"{task}.txt").write_text("".join(rows))


def mmbench(folder: Path) -> None:
    folder.mkdir()
    with (folder / "mmbench_dev_20230712.tsv").open("w", newline="") as file:
        table = csv.writer(file, "excel-tab")
        table.writerow(["index", "question", "A", "B", "C", "answer", "category"])
        for i in range(16):
            for k in range(2):
                choices = ["cat", 'a "dog"', "fish\tand\nbird" if i % 2 else ""]
                table.writerow([i + k * 1_000_000, f"{i}?\nSay.", *choices, "AB"[k], "animals"])


def scienceqa(folder: Path) -> None:
    folder.mkdir()
    problems = {
        str(i): {
            "question": f"{i}?",
            "choices": ["cat", "dog", "x"][: 2 + i % 2],
            "answer": i % 2,
            "image": "image.png" if i % 3 else None,
            "hint": "Look.",
        }
        for i in range(40)
    }
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": [*problems]}))


PEOPLE = ["no", "22", "1000", "red blue", "yes", "a", "no", "unanswerable", "yes", "no"]


def textvqa(folder: Path) -> None:
    folder.mkdir()
    rows = [
        {"question_id": 7 + i, "image_id": f"a{i // 2}", "question": f"What {i}?"}
        | {"answers": PEOPLE}
        for i in range(30)
    ]
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": rows}))


def vizwiz(folder: Path) -> None:
    folder.mkdir()
    rows = [
        {"image": f"{i}.jpg", "question": f"What {i}?", "answer_type": "other" if i % 2 else "yes"}
        | {"answers": [{"answer": answer} for answer in PEOPLE]}
        for i in range(30)
    ]
    (folder / "val.json").write_text(json.dumps(rows))


WORLDS: dict[str, Callable[[Path], None]] = {
    "pope": pope,
    "hallusionbench": hallusionbench,
    "amber-discriminative": amber,
    "mme": mme,
    "mmbench": mmbench,
    "scienceqa": scienceqa,
    "textvqa": textvqa,
    "vizwiz": vizwiz,
}


def world(name: str, folder: Path) -> tuple[Path, Path]:
    """Make data of a benchmark and hard answers to it; return both places."""
    data, answers = folder / "data", folder / "answers.jsonl"
    WORLDS[name](data)
    rows = [row for task in find_benchmark(name).read_tasks(data).values() for row in task.rows]
    start = HARD.index("A") if name in ("mmbench", "scienceqa") else 0
    hard = HARD[start:] + HARD[:start]
    records = [
        {"image": row["image"], "text": row["text"], "answer": answer}
        | ({"id": row["id"]} if "id" in row else {})
        for row, answer in zip(rows, cycle(hard), strict=False)
    ]
    if name != "mme":  # which has no ids
        records = [{"id": record["id"], "answer": record["answer"]} for record in records]
    lines(answers, records)
    return data, answers


def out_of(folder: Path, name: str, form: str) -> Path:
    return folder / (f"{form}.csv" if (name, form) == ("mmbench", "official") else form)


def read_from(out: Path, name: str) -> list[Path]:
    """Return the files to score again: POPE's own are several."""
    return sorted(out.iterdir()) if out.is_dir() and name == "pope" else [out]


def read_by(name: str) -> list[str]:
    """Return the rules that need no judge."""
    return [key for key, rule in find_benchmark(name).rules.items() if rule.judging is None]


CASES = [
    (name, form)
    for name, forms in FORMS.items()
    for form, made in forms.items()
    if made.needs_answers
]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_written_answers_score_the_same_under_every_rule(
    tmp_path: Path, name: str, form: str
) -> None:
    data, answers = world(name, tmp_path)
    out = out_of(tmp_path, name, form)
    report = write(name, data, form, out, answers)
    assert report.number == len(answers.read_text(encoding="utf-8").split("\n")) - 1
    rules = read_by(name)
    assert len(rules) > 1
    for rule in rules:
        if form == "llava-upload" and rule == "vlmevalkit":
            continue  # which reads answers that are not normalized
        before = score(name, answers, data, rule)
        assert score(name, read_from(out, name), data, rule) == before
        values = before["splits"]["count" if name == "mme" else "all"].values()
        assert any(value not in (None, 0, 1, 100) for value in values)


@pytest.mark.parametrize("name", FORMS)
def test_every_answer_format_converts_to_every_other(tmp_path: Path, name: str) -> None:
    data, answers = world(name, tmp_path)
    for first in (form for named, form in CASES if named == name and form != "llava-upload"):
        out = out_of(tmp_path, name, first)
        write(name, data, first, out, answers)
        for second in (form for named, form in CASES if named == name and form != "llava-upload"):
            again = out_of(tmp_path / f"from {first}", name, second)
            write(name, data, second, again, read_from(out, name))
            rule = read_by(name)[0]
            found = score(name, read_from(again, name), data, rule)
            assert found["splits"] == score(name, answers, data, rule)["splits"]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_pope_answers_are_written_with_llava_question_ids(tmp_path: Path) -> None:
    data, answers = world("pope", tmp_path)
    write("pope", data, "llava", tmp_path / "out.jsonl", answers, model="mine")
    found = {row["question_id"]: row for row in records(tmp_path / "out.jsonl")}
    assert {*found} == {start + i for start in (1, 10_000_001, 20_000_001) for i in range(30)}
    first = found[10_000_001]
    assert first["prompt"] == f"Is there a random 0?{SHORT}"
    assert (first["text"], first["model_id"], first["metadata"]) == ("Yes", "mine", {})
    assert len({row["answer_id"] for row in found.values()}) == 90
    report = write("pope", data, "llava-questions", tmp_path / "questions.jsonl")
    asked = records(tmp_path / "questions.jsonl")
    assert report.number == len(asked) == 90
    assert asked[0] == {
        "question_id": 1,
        "image": "0.jpg",
        "text": f"Is there a adversarial 0?{SHORT}",
        "category": "adversarial",
    }
    assert [row["question_id"] for row in asked[30::30]] == [10_000_001, 20_000_001]


def test_pope_files_follow_the_order_of_the_data(tmp_path: Path) -> None:
    data, answers = world("pope", tmp_path)
    write("pope", data, "official", tmp_path / "out", answers)
    for split in ("random", "popular", "adversarial"):
        found = records(tmp_path / "out" / f"{split}.jsonl")
        rows = records(data / f"coco_pope_{split}.json")
        assert [row["question"] for row in found] == [row["text"] for row in rows]


def test_mme_lines_have_four_columns_and_replaced_characters_are_reported(tmp_path: Path) -> None:
    data, answers = world("mme", tmp_path)
    # the questions of an image need not stand together in the data
    rows = (data / "count.txt").read_text().splitlines(keepends=True)
    (data / "count.txt").write_text("".join([*rows[::2], *rows[1::2]]))
    report = write("mme", data, "official", tmp_path / "out", answers)
    assert report.notes == ("A tab or a line break became a space in 8 answers.",)
    for task in ("existence", "count"):
        with (tmp_path / "out" / f"{task}.txt").open(encoding="utf-8") as file:
            found = [line.rstrip("\n").split("\t") for line in file]  # as the published tool does
        assert len(found) == 28
        assert all(len(columns) == 4 and columns[2] in ("Yes", "No") for columns in found)
        assert all(a[0] == b[0] for a, b in zip(found[::2], found[1::2], strict=True))
    write("mme", data, "llava-questions", tmp_path / "q.jsonl")
    first = records(tmp_path / "q.jsonl")[0]
    assert first == {
        "question_id": "existence/0.jpg",
        "image": "existence/0.jpg",
        "text": f"Is it 0 or Yes?{SHORT}",
        "category": "existence",
    }


def test_mme_images_keep_their_place_in_the_data(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "artwork"
    for name in ("images/7.png", "questions_answers_YN/7.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("A?\tYes\nB?\tNo\n")
    write("mme", tmp_path / "data", "llava-questions", tmp_path / "q.jsonl")
    assert {row["image"] for row in records(tmp_path / "q.jsonl")} == {"artwork/images/7.png"}


def test_amber_answers_are_written_unchanged(tmp_path: Path) -> None:
    data, answers = world("amber-discriminative", tmp_path)
    report = write("amber-discriminative", data, "official", tmp_path / "out.json", answers)
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [row["id"] for row in found] == [*range(1, 40)]
    assert [row["response"] for row in found[:4]] == ["Yes", "No", "yes", " No. "]
    assert report.notes[0].startswith("35 answers are not exactly Yes or No")


def test_judge_verdicts_stay_with_their_answers(tmp_path: Path) -> None:
    data = tmp_path / "data"
    hallusionbench(data)
    rows = json.loads((data / "HallusionBench.json").read_text())
    judged = [
        {**row, "model_prediction": "No", "gpt4v_output_gpt_check": str(i % 3)}
        | {"judge_reply": ("incorrect", "correct", "unclear")[i % 3]}
        for i, row in enumerate(rows)
    ]
    (tmp_path / "judged.json").write_text(json.dumps(judged))
    write("hallusionbench", data, "official", tmp_path / "out.json", tmp_path / "judged.json")
    assert json.loads((tmp_path / "out.json").read_text()) == judged
    # those of the data itself are of other answers
    (data / "HallusionBench.json").write_text(json.dumps(judged))
    plain = [{**row, "model_prediction": "Yes"} for row in rows]
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    write("hallusionbench", data, "official", tmp_path / "again.json", tmp_path / "plain.json")
    assert json.loads((tmp_path / "again.json").read_text()) == plain


def test_scienceqa_prompts_mark_questions_with_an_image(tmp_path: Path) -> None:
    data, answers = world("scienceqa", tmp_path)
    write("scienceqa", data, "llava", tmp_path / "out.jsonl", answers)
    found = {row["question_id"]: row["prompt"] for row in records(tmp_path / "out.jsonl")}
    assert found["1"].startswith("<image>\nContext: Look.\n1?\nA. cat\nB. dog\nC. x\nAnswer with")
    assert "<image>" not in found["3"]


def test_the_mmbench_table_has_the_published_columns(tmp_path: Path) -> None:
    data, answers = world("mmbench", tmp_path)
    for out in (tmp_path / "out.csv", tmp_path / "out.tsv"):
        report = write("mmbench", data, "official", out, answers)
        with out.open(encoding="utf-8", newline="") as file:
            rows = [*csv.DictReader(file, dialect="excel-tab" if out.suffix == ".tsv" else "excel")]
        assert [*rows[0]] == ["index", "question", *"ABCD", "prediction", "answer"]
        assert (rows[2]["index"], rows[2]["C"], rows[2]["D"]) == ("1", "fish\tand\nbird", "")
        assert "save the table as .xlsx" in report.notes[0]
    with pytest.raises(RefusedError, match=r"out must end in \.tsv or \.csv, got out\.xlsx"):
        write("mmbench", data, "official", tmp_path / "out.xlsx", answers)


def test_uploads_for_vizwiz_have_normalised_answers(tmp_path: Path) -> None:
    data, answers = world("vizwiz", tmp_path)
    write("vizwiz", data, "llava-upload", tmp_path / "up.json", answers)
    write("vizwiz", data, "official", tmp_path / "raw.json", answers)
    up, raw = (
        {row["image"]: row["answer"] for row in json.loads((tmp_path / name).read_text())}
        for name in ("up.json", "raw.json")
    )
    place = HARD.index("the 1,000")
    assert (up[f"{place}.jpg"], raw[f"{place}.jpg"]) == ("1000", "the 1,000")
    write("vizwiz", data, "llava-questions", tmp_path / "q.jsonl")
    first = records(tmp_path / "q.jsonl")[0]
    assert (first["question_id"], first["image"]) == (0, "0.jpg")
    assert first["text"].startswith("What 0?\nWhen the provided")
    assert first["text"].endswith(SHORT)


def test_unsupported_formats_and_answers_are_refused(tmp_path: Path) -> None:
    data, answers = world("pope", tmp_path)
    out = tmp_path / "out"
    with pytest.raises(RefusedError, match=r"written of POPE \(llava, official, llava-questions\)"):
        write("pope", data, "xml", out, answers)
    with pytest.raises(RefusedError, match=r"written of CHAIR \(none\), got 'llava'"):
        write("chair", data, "llava", out, answers)
    with pytest.raises(RefusedError, match="answers must name a file, got none"):
        write("pope", data, "llava", out)
    with pytest.raises(RefusedError, match="must be left out for a file of questions"):
        write("pope", data, "llava-questions", out, answers)
    with pytest.raises(RefusedError, match="out must be new"):
        write("pope", data, "llava", answers, answers)
    part = tmp_path / "part.jsonl"
    part.write_text("".join(answers.read_text().splitlines(keepends=True)[:5]))
    for form, allows in (("llava", False), ("official", True)):
        with pytest.raises(RefusedError, match="must answer each of the 90 questions"):
            write("pope", data, form, out, part, allow_subset=allows)
    assert not out.exists()
    assert write("pope", data, "llava", out, part, allow_subset=True).number == 5


def test_the_write_command_reports_the_written_files(tmp_path: Path) -> None:
    data, answers = world("mme", tmp_path)
    command = ["eval", "write", "--benchmark", "mme", "--data", str(data), "--format"]
    options = ["--answers", str(answers), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, "official", *options])
    assert result.exit_code == 0, result.output
    assert "became a space" in result.output
    assert f"56 answers -> {tmp_path / 'out'}" in result.output
    result = CliRunner().invoke(
        app, [*command, "llava-questions", "--out", str(tmp_path / "q.jsonl")]
    )
    assert "56 questions -> " in result.output
