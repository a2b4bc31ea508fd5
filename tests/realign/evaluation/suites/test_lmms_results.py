"""Results of lmms-eval are read from a recorded run of its own, and faults in them are reported."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from realign.cli import app
from realign.errors import RefusedError
from realign.evaluation.suites.lmms_results import newest_runs, read_lmms_eval
from tests.realign.evaluation.suites.conftest import change, results_of, samples_of


def read(run: Path, **options: Any) -> Any:
    return read_lmms_eval(run, run / "data", **options)["models"]["base"]


def rename(run: Path, stamp: str, model: str = "base") -> None:
    for path in results_of(run, model).parent.iterdir():
        path.rename(path.with_name(stamp + path.name[len("20261129_113958") :]))


def test_aggregates_are_those_of_lmms_eval(run: Path) -> None:
    entries = read(run)["aggregates"]
    assert len(entries) == 15
    assert {entry["rule"] for entry in entries} == {"lmms-eval"}
    values = {(entry["task"], entry["metric"]): entry["value"] for entry in entries}
    assert values["realign_pope_adv", "pope_accuracy"] == 0.0
    assert values["realign_pope_adv", "pope_yes_ratio"] == 0.5  # of the labels, as always


def test_recorded_answers_are_scored_under_every_rule(run: Path) -> None:
    rules = read(run)["rescored"]["pope"]
    # counted by hand: every answer is a sentence such as "No, there is no moon in the image."
    accuracy = {"random": 4 / 6, "popular": 5 / 6, "adversarial": 2 / 6, "all": 11 / 18}
    for split, value in accuracy.items():
        assert rules["official"]["splits"][split]["accuracy"] == pytest.approx(value)
        assert rules["vlmevalkit"]["splits"][split]["accuracy"] == pytest.approx(100 * value)
        assert rules["lmms-eval"]["splits"][split]["accuracy"] == 0.0
    assert rules["official"]["items"] == 18
    assert rules["official"]["subset"] is None


def test_answers_are_stored_for_later(run: Path) -> None:
    stored = run / read(run)["answers"]["pope"]
    lines = [json.loads(line) for line in stored.read_text().splitlines()]
    assert lines[0] == {"id": "random-1", "answer": "No, there is no moon in the image."}
    assert len(lines) == 18
    arguments = ["eval", "score", "--benchmark", "pope", "--data", str(run / "data")]
    result = CliRunner().invoke(app, [*arguments, "--answers", str(stored), "--json"])
    assert json.loads(result.stdout)["splits"]["all"]["accuracy"] == pytest.approx(11 / 18)


def test_the_order_of_sample_lines_does_not_matter(run: Path) -> None:
    path = samples_of(run)
    lines = path.read_text().splitlines()
    assert len({json.loads(line)["doc_hash"] for line in lines}) == 1  # of six questions
    expected = read(run)["rescored"]
    path.write_text("".join(f"{line}\n" for line in reversed(lines)))
    assert read(run)["rescored"] == expected


def test_samples_without_an_id_are_matched_by_number_and_prompt(run: Path) -> None:
    expected = read(run)["rescored"]
    change(samples_of(run), lambda row: row.update(pope_accuracy=0.0))
    assert read(run)["rescored"] == expected

    def shift(row: dict[str, Any]) -> None:
        row["doc_id"] = (row["doc_id"] + 1) % 6

    change(samples_of(run), shift)
    with pytest.raises(RefusedError, match="line 1: the prompt must hold the question"):
        read(run)


def test_hub_data_sets_number_questions_within_a_split(run: Path) -> None:
    def as_published(row: dict[str, Any]) -> None:
        row["pope_accuracy"]["question_id"] = row["pope_accuracy"]["question_id"].split("-")[1]

    expected = read(run)["rescored"]
    change(samples_of(run), as_published)
    assert read(run)["rescored"] == expected


def test_a_run_with_a_limit_is_refused_as_a_full_run(run: Path) -> None:
    def limit(content: dict[str, Any]) -> None:
        content["n-samples"]["realign_pope_adv"]["original"] = 3000

    change(results_of(run), limit)
    with pytest.raises(RefusedError, match=r"got 6 of 3,000 questions of realign_pope_adv"):
        read(run)
    lines = samples_of(run).read_text().splitlines()
    samples_of(run).write_text("".join(f"{line}\n" for line in lines[:2]))
    rules = read(run, allow_subset=True)["rescored"]["pope"]
    assert rules["official"]["subset"] == "14 of 18"


def test_the_newest_of_several_runs_is_read(run: Path) -> None:
    old = results_of(run)
    newer = old.with_name("20261129_114000_results.json")
    newer.write_text(old.read_text())
    for task in ("random", "pop", "adv"):
        answers = samples_of(run, f"realign_pope_{task}")
        answers.rename(answers.with_name(f"20261129_114000_samples_realign_pope_{task}.jsonl"))
    found = read(run)
    assert {entry["time"] for entry in found["runs"].values()} == {"2026-11-29T11:40:00+00:00"}
    assert found["rescored"]["pope"]["official"]["items"] == 18


def test_time_stamps_are_in_singapore_time_unless_the_run_states_another(run: Path) -> None:
    utc = results_of(run)
    early = utc.with_name("20261129_193000_results.json")  # 11:30 in UTC, before the other
    early.write_text(utc.read_text())
    change(early, lambda content: content["config"]["resolved_cli_args"].pop("timezone"))
    times = {each.task: each.time for each in newest_runs(run) if each.model == "base"}
    assert set(times.values()) == {datetime(2026, 11, 29, 11, 39, 58, tzinfo=UTC)}
    utc.unlink()
    times = {each.task: each.time for each in newest_runs(run) if each.model == "base"}
    assert set(times.values()) == {datetime(2026, 11, 29, 11, 30, tzinfo=UTC)}


def test_values_that_are_not_numbers_are_left_out(run: Path) -> None:
    def add(content: dict[str, Any]) -> None:
        values = content["results"]["realign_pope_adv"]
        values["submission,none"] = []
        values["pope_f1_score,none"] = float("nan")  # as Python writes it: no JSON
        values["pope_recall,none"] = True
        values["paired_pvalue,none"] = 0.5
        values["pope_accuracy_stderr,none"] = 0.25

    change(results_of(run), add)
    assert "NaN" in results_of(run).read_text()
    entries = [entry for entry in read(run)["aggregates"] if entry["task"] == "realign_pope_adv"]
    assert {entry["metric"]: entry.get("stderr") for entry in entries} == {
        "pope_accuracy": 0.25,
        "pope_precision": None,
        "pope_yes_ratio": None,
    }


def test_a_score_that_differs_from_ours_is_reported(run: Path) -> None:
    assert read(run)["notes"] == []

    def worsen(content: dict[str, Any]) -> None:
        content["results"]["realign_pope_adv"]["pope_accuracy,none"] = 0.5

    change(results_of(run), worsen)
    assert read(run)["notes"] == [
        "realign_pope_adv: pope_accuracy of lmms-eval is 0.500000, 0.000000 by this project's "
        "rule lmms-eval."
    ]


def test_failed_generation_is_counted(run: Path) -> None:
    def fail(row: dict[str, Any]) -> None:
        if row["doc_id"] < 2:
            row |= {"filtered_resps": "", "token_counts": [None]}

    change(samples_of(run), fail)
    assert "2 of 6 answers are empty and have no count of tokens" in read(run)["notes"][0]


def test_a_run_without_answers_keeps_its_aggregates(run: Path) -> None:
    for task in ("random", "pop", "adv"):
        samples_of(run, f"realign_pope_{task}").unlink()
    found = read(run)
    assert len(found["aggregates"]) == 15
    assert found["rescored"] == {}
    assert "is missing" in found["notes"][0]


def test_an_unknown_task_keeps_its_aggregates(run: Path) -> None:
    def rename_task(content: dict[str, Any]) -> None:
        for part in ("results", "n-samples"):
            content[part]["gqa"] = content[part].pop("realign_pope_adv")

    change(results_of(run), rename_task)
    found = read(run, allow_subset=True)
    assert found["notes"] == [
        "gqa: its answers are not scored again, since this project does not read its data."
    ]
    assert found["rescored"]["pope"]["official"]["subset"] == "12 of 18"


def test_repeated_or_missing_answers_are_refused(run: Path) -> None:
    path = samples_of(run)
    text = path.read_text()
    path.write_text(text + text.splitlines()[0] + "\n")
    with pytest.raises(RefusedError, match=r"line 7 must answer another question"):
        read(run)
    path.write_text("".join(text.splitlines(keepends=True)[:5]))
    with pytest.raises(RefusedError, match="must answer each of the 6 questions of pope_adv"):
        read(run)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"filtered_resps": ["Yes", "No"]}, "line 1 must hold one answer as filtered_resps"),
        ({"input": None}, "line 1 must be an object with the prompt as input"),
        ({"pope_accuracy": {"question_id": "x-1"}}, "must answer a question of pope_adv"),
        ({"pope_accuracy": 0, "doc_id": 6}, "doc_id must be below 6"),
    ],
)
def test_malformed_sample_lines_are_refused(run: Path, edit: dict[str, Any], message: str) -> None:
    change(samples_of(run), lambda row: row.update(edit))
    with pytest.raises(RefusedError, match=message):
        read(run)


def test_malformed_result_files_are_refused(run: Path) -> None:
    path = results_of(run)
    text = path.read_text()
    path.write_text(text[:-20])
    with pytest.raises(RefusedError, match="must be JSON"):
        read(run)
    path.write_text("[]")
    with pytest.raises(RefusedError, match="must be a result of lmms-eval"):
        read(run)
    path.write_text(text)
    rename(run, "monday")
    with pytest.raises(RefusedError, match="must begin with a time stamp"):
        read(run)


def test_the_command_prints_tables_and_refuses_a_folder_without_results(
    run: Path, tmp_path: Path
) -> None:
    result = CliRunner().invoke(
        app, ["eval", "read-suite", str(run), "--data", str(run / "data")], env={"COLUMNS": "160"}
    )
    assert result.exit_code == 0, result.output
    assert "base: numbers of lmms-eval" in result.output
    assert "0.6111" in result.output
    assert json.loads((run / "suite_scores.json").read_text())["suite"] == "lmms-eval"
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(app, ["eval", "read-suite", str(tmp_path / "empty")])
    assert result.exit_code == 2
    assert "folder must hold results of lmms-eval" in result.output
