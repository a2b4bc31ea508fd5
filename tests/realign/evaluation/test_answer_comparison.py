"""Comparisons of answer files: from the command line and from Python, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from realign.cli import app
from realign.errors import RefusedError
from realign.evaluation import compare, score
from realign.evaluation.answer_comparison import named_files

SPLITS = ("random", "popular", "adversarial")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a folder with the three splits of POPE on ten images; every second label is yes."""
    for split in SPLITS:
        rows = [
            {
                "question_id": i + 1,
                "image": f"{i // 4}.jpg",
                "text": f"Is there a {split if i % 2 else 'thing'} {i} in the image?",
                "label": "no" if i % 2 else "yes",
            }
            for i in range(40)
        ]
        path = tmp_path / "pope" / f"coco_pope_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path / "pope"


def answer(data: Path, name: str, wrong: set[int], leaves_out: int = 0) -> Path:
    """Write right answers to all splits but to the questions of some numbers."""
    records = [
        {"id": f"{split}-{i + 1}", "answer": "Yes" if (i % 2 == 0) != (i in wrong) else "No"}
        for split in SPLITS
        for i in range(40)
    ]
    path = data.parent / f"{name}.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in records[leaves_out:]))
    return path


def test_a_comparison_holds_the_scores_of_each_model(data: Path) -> None:
    files = {"base": answer(data, "base", {0, 1, 5, 9}), "aligned": answer(data, "new", {1, 2})}
    found = compare("pope", files, data, bootstrap=200)
    assert (found["schema"], found["baseline"], found["models"]) == (3, "base", [*files])
    assert found["draws"] == {"bootstrap": 200, "permutation": 200, "seed": 0}
    benchmark = found["benchmarks"]["pope"]
    assert (benchmark["clusters"], benchmark["subset"]) == (10, None)
    splits = benchmark["rules"]["official"]["splits"]
    assert [*splits] == ["all", "random", "popular", "adversarial", "mean"]
    for model, path in files.items():
        alone = score("pope", path, data)["splits"]
        for split in ("all", *SPLITS):
            metrics = splits[split]["models"][model]
            assert {name: metrics[name]["value"] for name in alone[split]} == alone[split]
        intervals = score("pope", path, data, bootstrap=200)["intervals"]["random"]
        metrics = splits["random"]["models"][model]
        assert metrics["f1"]["interval"] == pytest.approx(intervals["f1"])
    paired = splits["random"]["models"]["aligned"]["accuracy"]["paired"]
    assert (paired["gained"], paired["lost"], paired["net"]) == (3, 1, 2)
    assert paired["p_mcnemar"] == 0.625
    assert paired["test"] == "permutation"  # four questions about an image
    assert splits["mean"]["models"]["aligned"]["accuracy"]["difference"] == pytest.approx(0.05)
    shown = [(row["split"], row["metric"]) for row in found["table"]]
    assert shown == [(s, m) for s in (*SPLITS, "mean") for m in ("accuracy", "f1")]
    assert found["num_comparisons"] == 8
    json.dumps(found, allow_nan=False)


def test_metrics_and_splits_can_be_chosen(data: Path) -> None:
    files = {name: answer(data, name, {3}) for name in ("a", "b")}
    found = compare(
        "pope", files, data, "vlmevalkit", metrics=["recall"], splits=["all"], bootstrap=5
    )
    assert [(row["split"], row["metric"]) for row in found["table"]] == [("all", "recall")]
    with pytest.raises(RefusedError, match=r"metric must be one of accuracy, .* got 'auc'"):
        compare("pope", files, data, metrics=["auc"])
    with pytest.raises(RefusedError, match=r"split must be one of all, random, .* got 'easy'"):
        compare("pope", files, data, splits=["easy"])
    nothing = r"\(mean: accuracy, .*f1.*\), got tp, fp in mean\. Name another"
    with pytest.raises(RefusedError, match=nothing):
        compare("pope", files, data, metrics=["tp", "fp"], splits=["mean"], bootstrap=5)


def test_count_metrics_are_shown_without_a_verdict(data: Path) -> None:
    files = {name: answer(data, name, wrong) for name, wrong in (("a", {3}), ("b", {1, 2, 5, 6}))}
    found = compare("pope", files, data, metrics=["tn"], splits=["all"], bootstrap=50)
    assert (found["table"][0]["comparisons"], found["num_comparisons"]) == ({}, 0)


def test_runs_are_given_as_lists_or_by_name(data: Path) -> None:
    first, second, base = (answer(data, name, {n}) for n, name in enumerate("xyz"))
    listed = compare("pope", {"base": base, "new": [first, second]}, data, bootstrap=5)
    runs = {"1": first, "2": [second]}
    assert listed == compare("pope", {"base": base, "new": runs}, data, bootstrap=5)
    options = [f"base={base}", f"new={first}", f"new={second}"]
    assert named_files(options) == {"base": {"1": [base]}, "new": {"1": [first], "2": [second]}}
    assert named_files(["m@7=a", "m@7=b", "m@9=c=d"]) == {
        "m": {"7": [Path("a"), Path("b")], "9": [Path("c=d")]}
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["base"], "answers must be NAME=FILE or NAME@RUN=FILE, got 'base'"),
        (["=file"], "got '=file'"),
        (["base@=file"], "got 'base@=file'"),
        (["base="], "got 'base='"),
        (["base=a", "base@1=b"], "answers of base must all be base=FILE or all base@RUN=FILE"),
    ],
)
def test_malformed_answer_options_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        named_files(options)


def test_questions_not_answered_by_all_models_are_dropped_with_allow_subset(data: Path) -> None:
    files = {"a": answer(data, "a", set(), leaves_out=10), "b": answer(data, "b", set())}
    with pytest.raises(RefusedError, match="must answer each of the 120 questions"):
        compare("pope", files, data, bootstrap=5)
    found = compare("pope", files, data, bootstrap=5, allow_subset=True)
    assert found["benchmarks"]["pope"]["subset"] == "110 of 120"
    splits = found["benchmarks"]["pope"]["rules"]["official"]["splits"]
    assert (splits["random"]["items"], splits["popular"]["items"]) == (30, 40)
    lines = files["b"].read_text().splitlines(keepends=True)
    files["b"].write_text("".join(lines[:10]))
    with pytest.raises(RefusedError, match="must have a question in common"):
        compare("pope", files, data, allow_subset=True)


@pytest.mark.parametrize("answers", [{}, {"base": []}, {"base": {"1": []}}])
def test_missing_answers_and_invalid_options_are_refused(
    data: Path, answers: dict[str, Any]
) -> None:
    with pytest.raises(RefusedError, match=r"must name (at least one model|a file), got none"):
        compare("pope", answers, data)
    with pytest.raises(RefusedError, match="bootstrap must be at least 1, got 0"):
        compare("pope", {"base": "x"}, data, bootstrap=0)
    with pytest.raises(RefusedError, match="seed must be at least 0, got -1"):
        compare("pope", {"base": "x"}, data, seed=-1)


def run(data: Path, *options: str) -> str:
    command = ["eval", "compare", "--benchmark", "pope", "--data", str(data), "--bootstrap", "100"]
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_prints_a_table_or_json(data: Path) -> None:
    names = ("base", "aligned", "second")
    files = [f"--answers={n}={answer(data, n, {i})}" for i, n in enumerate(names)]
    printed = run(data, *files, "--split", "random", "--metric", "accuracy")
    assert max(map(len, printed.splitlines())) <= 80
    for text in (
        *("random, accuracy: 40 answers on 10 images", "all yes", "all no", "0.5000"),
        *("0.9750", "+0.0000", "yes 0.4750", "yes 0.5250", "2 comparisons", "seed 0"),
        "share of its answers",
    ):
        assert text in printed
    found = json.loads(run(data, *files, "--json", "--seed", "4"))
    assert found["draws"]["seed"] == 4
    assert found["num_comparisons"] == 16
    assert "100 draws are too few for so many" in run(data, *files)
    again = f"--answers=aligned={answer(data, 'again', {7})}"
    printed = run(data, *files[:2], again, "--split", "mean")
    assert "run 1" in printed
    assert "2 are few" in printed
    alone = run(data, files[0], "--split", "random")
    assert "\nValues are fractions. " in alone
    assert "\nIntervals: 95 % percentiles" in alone
    assert not any(line.startswith(" ") for line in alone.splitlines() if line.endswith("."))
    for text in ("Detectable", "Differences are from", "Inside the noise"):
        assert text not in alone
    assert "except for counts" in run(data, files[0], "--metric", "tp")


def test_letters_that_the_terminal_lacks_end_no_command(data: Path) -> None:
    command = ["eval", "compare", "--benchmark", "pope", "--data", str(data), "--bootstrap", "9"]
    command += [f"--answers=größer={answer(data, 'base', {1})}"]
    printed = CliRunner(charset="ascii").invoke(app, command)
    assert printed.exit_code == 0, printed.exception
    assert "gr\\xf6\\xdfer" in printed.stdout
    printed = CliRunner(charset="ascii").invoke(app, [*command, "--json"])
    assert printed.exit_code == 0, printed.exception
    assert "größer" in json.loads(printed.stdout)["models"]


def test_the_command_refuses_in_one_line(data: Path) -> None:
    options = ["--benchmark", "pope", "--data", str(data), "--answers", "base"]
    result = CliRunner().invoke(app, ["eval", "compare", *options])
    assert result.exit_code == 2
    assert result.output.startswith("realign: answers must be NAME=FILE")


def test_a_comparison_imports_no_torch(data: Path) -> None:
    path = answer(data, "base", {1})
    code = (
        "import sys; from realign.cli import main\n"
        "try: main()\nexcept SystemExit as stop: assert not stop.code, stop.code\n"
        "assert not {'torch', 'transformers'} & {*sys.modules}"
    )
    options = ["--benchmark", "pope", "--data", str(data), "--bootstrap", "3"]
    files = ["--answers", f"a={path}", "--answers", f"b={path}"]
    subprocess.run([sys.executable, "-c", code, "eval", "compare", *options, *files], check=True)


@pytest.mark.parametrize(
    ("rule", "word"), [("exact", "set"), ("vlmevalkit", "merged set"), ("official", "set")]
)
def test_the_resampled_unit_is_named_in_words(tmp_path: Path, rule: str, word: str) -> None:
    keys = ("category", "subcategory", "set_id", "figure_id", "question_id", "visual_input")
    row = dict(zip(keys, ("VD", "math", "0", "0", "0", "1"), strict=True))
    row |= {"question": "Is it?", "gt_answer": "1", "filename": "a.png"}
    (tmp_path / "HallusionBench.json").write_text(json.dumps([row]))
    answers = tmp_path / "a.json"
    answers.write_text(
        json.dumps([{"id": "VD_math_0_0_0", "answer": "", "judge_reply": "correct"}])
    )
    found = compare("hallusionbench", {"base": answers}, tmp_path, rule, bootstrap=2)
    assert found["benchmarks"]["hallusionbench"]["cluster"] == word


def graded(folder: Path, name: str, gradings: list[list[float]]) -> Path:
    """Write answers to two questions of MM-Vet, with a judge's grades of each."""
    rows = [
        {"id": f"v1_{i}", "answer": "x", "judge_reply": [str(found[i]) for found in gradings]}
        for i in range(2)
    ]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def write_mm_vet(folder: Path) -> None:
    """Write two questions of MM-Vet."""
    questions = {
        f"v1_{i}": {"imagename": f"{i}.jpg", "question": f"{i}?", "answer": "y"}
        | {"imagesource": "z", "capability": ["rec"]}
        for i in range(2)
    }
    (folder / "mm-vet.json").write_text(json.dumps(questions))


def test_judge_gradings_given_as_training_runs_are_refused(tmp_path: Path) -> None:
    write_mm_vet(tmp_path)
    first = graded(tmp_path, "first", [[0.2, 0.6]])
    second = graded(tmp_path, "second", [[0.4, 0.6]])
    message = r"same ones for the runs 1 and 2, .* the same name and run, as base@1=FILE"
    with pytest.raises(RefusedError, match=message):
        compare("mm-vet", {"base": [first, second]}, tmp_path, bootstrap=5)
    together = compare("mm-vet", {"base": {"1": [first, second]}}, tmp_path, bootstrap=5)
    entry = together["benchmarks"]["mm-vet"]["rules"]["official"]["splits"]["all"]["models"]
    assert entry["base"]["score"]["gradings"]["values"] == pytest.approx([40, 50])
    assert (entry["base"]["score"]["runs"], together["benchmarks"]["mm-vet"]["cluster"]) == (
        None,
        "question",
    )
    other = tmp_path / "other.jsonl"
    other.write_text(second.read_text().replace('"x"', '"z"', 1))
    runs = compare("mm-vet", {"base": [first, other]}, tmp_path, bootstrap=5)
    entry = runs["benchmarks"]["mm-vet"]["rules"]["official"]["splits"]["all"]["models"]["base"]
    assert [*entry["score"]["runs"]] == ["1", "2"]


def test_grades_without_answers_are_accepted_as_training_runs(tmp_path: Path) -> None:
    write_mm_vet(tmp_path)
    for name, grade in (("a", 0.5), ("b", 0.7)):
        found = {"model": ["gpt-4"], "content": [str(grade)], "score": [grade]}
        (tmp_path / f"{name}.json").write_text(json.dumps({"v1_0": found, "v1_1": found}))
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    found = compare("mm-vet", {"base": files}, tmp_path, bootstrap=5)
    models = found["benchmarks"]["mm-vet"]["rules"]["official"]["splits"]["all"]["models"]
    assert models["base"]["score"]["value"] == pytest.approx(60)


def test_a_file_given_for_two_training_runs_is_refused(data: Path) -> None:
    first, second = answer(data, "a", {1}), answer(data, "b", {2})
    with pytest.raises(RefusedError, match=r"a\.jsonl for the runs 1 and 3\. Name it once"):
        compare("pope", {"base": [first, second, first]}, data, bootstrap=5)


def test_ungraded_answers_are_compared_with_graded_ones(tmp_path: Path) -> None:
    (tmp_path / "MMBench_DEV_EN.tsv").write_text(
        "index\tquestion\tA\tB\tanswer\n1\tIs it?\tIt is.\tnot\tA\n2\tWas it?\tIt was.\tnot\tB\n"
    )
    plain, judged = tmp_path / "plain.jsonl", tmp_path / "judged.jsonl"
    plain.write_text('{"id": 1, "answer": "A"}\n{"id": 2, "answer": "A"}\n')
    reply = {"id": 2, "answer": "Perhaps.", "judge_reply": ["B", "A", "B"]}
    judged.write_text(f'{{"id": 1, "answer": "A"}}\n{json.dumps(reply)}\n')
    for files in ({"base": plain, "new": judged}, {"base": judged, "new": plain}):
        found = compare("mmbench", files, tmp_path, "judged", bootstrap=5)
        models = found["benchmarks"]["mmbench"]["rules"]["judged"]["splits"]["all"]["models"]
        values = {
            name: models[key]["accuracy"]["gradings"]["values"]
            for name, key in zip(("base", "new"), models, strict=True)
        }
        assert sorted(values.values()) == [[50, 50, 50], [100, 50, 100]]
    alone = compare("mmbench", {"base": plain, "new": plain}, tmp_path, "judged", bootstrap=5)
    models = alone["benchmarks"]["mmbench"]["rules"]["judged"]["splits"]["all"]["models"]
    assert models["new"]["accuracy"]["gradings"] is None


def test_gradings_of_a_judge_are_averaged_and_their_spread_is_shown(tmp_path: Path) -> None:
    write_mm_vet(tmp_path)
    files = {
        "base": graded(tmp_path, "base", [[0.2, 0.6], [0.4, 0.6], [0.3, 0.6]]),
        "new": graded(tmp_path, "new", [[0.5, 0.7], [0.5, 0.9], [0.5, 0.8]]),
    }
    found = compare("mm-vet", files, tmp_path, bootstrap=50)
    models = found["benchmarks"]["mm-vet"]["rules"]["official"]["splits"]["all"]["models"]
    assert models["base"]["score"]["value"] == pytest.approx(45)
    assert models["base"]["score"]["gradings"]["values"] == pytest.approx([40, 50, 45])
    assert models["base"]["score"]["gradings"]["sd"] == pytest.approx(5)
    entry = models["new"]["score"]
    assert (entry["value"], entry["difference"]) == (pytest.approx(65), pytest.approx(20))
    assert entry["paired"]["units"] == 2
    assert entry["paired"]["gained"] is None  # grades are more than right and wrong
    assert entry["difference_interval"] == pytest.approx([20, 20])
    options = [f"--answers={name}={path}" for name, path in files.items()]
    command = ["eval", "compare", "--benchmark", "mm-vet", "--data", str(tmp_path)]
    printed = CliRunner().invoke(app, [*command, "--bootstrap", "9", *options]).output
    for text in ("3 gradings", "40.00 to 50.00", "sd 5.00"):
        assert text in printed
    once = {**files, "new": graded(tmp_path, "once", [[0.5, 0.5]])}
    with pytest.raises(RefusedError, match=r"graded equally often .* base, run 1 3, new, run 1 1"):
        compare("mm-vet", once, tmp_path)
    unjudged = tmp_path / "unjudged.jsonl"
    unjudged.write_text(
        files["new"].read_text().replace('["0.5", "0.5", "0.5"]', "[null, null, null]")
    )
    with pytest.raises(RefusedError, match="answers of new must all have a verdict, 1 have none"):
        compare("mm-vet", {**files, "new": unjudged}, tmp_path)
