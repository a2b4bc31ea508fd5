"""A benchmark is one object in the registry: everything else follows from it."""

from __future__ import annotations

import json
import shutil
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from realign.cli import app
from realign.config import EvalConfig
from realign.demo.data import write_eval_data
from realign.errors import RefusedError
from realign.evaluation import registry
from realign.evaluation.benchmark import Benchmark, Layout, Rule, TableRow, View
from realign.evaluation.comparison import score
from realign.evaluation.rows import Key, item_key, read_rows
from realign.evaluation.run import evaluate
from realign.evaluation.table import scores_table
from realign.generation.generator import Answer
from realign.review.report import write_report
from tests.realign.evaluation.published import PUBLISHED, write_published

ROOT = Path(__file__).parents[3]


def length_and_word(row, answer):
    """Return five columns: one, the words, whether the awaited word is among them, its position."""
    words = answer.lower().rstrip(".").split()
    found = row["word"] in words
    return [1, len(words), found, words.index(row["word"]) + 1 if found else 0, len(answer)]


def pairs_both_right(rows):
    """Return two columns of a figure: pairs of questions, and pairs with both answers right."""
    right = [scores[0] for _, scores in rows]
    pairs = list(zip(right[::2], right[1::2], strict=True))
    return [len(pairs), sum(map(all, pairs))]


WORDS = Benchmark(
    name="words",
    title="Words",
    layouts=[
        Layout(
            {"words": ("words.jsonl",)},
            partial(
                read_rows,
                word=Key(lambda word: isinstance(word, str), "be a string", "Put it into quotes."),
                figure=Key(
                    lambda figure: isinstance(figure, int), "be an integer", "Count figures."
                ),
            ),
        )
    ],
    rules={
        "official": Rule(
            length_and_word,
            lambda sums: {
                "hits": sums[..., 2] / sums[..., 0],
                "words": sums[..., 1] / sums[..., 0],
            },
        ),
        "paired": Rule(
            lambda row, answer: [row["word"] in answer.lower()],
            lambda sums: {"both": sums[..., 1] / sums[..., 0]},
            combine=pairs_both_right,
        ),
    },
    table=[
        TableRow("words", "official", "hits", "Words, share that is found", is_headline=True),
        TableRow("words", "official", "words", "Words, length in words", False, True, scale=1),
        TableRow("words", "paired", "both", "Words, both of a pair"),
    ],
    cluster="figure",
    samples={"words": lambda row, answer: View(f"holds {row['word']}", row["word"] in answer)},
)
ROWS = [
    {"image": "eval-00000.png", "text": "Is there a moon?", "word": "yes", "figure": 1},
    {"image": "eval-00000.png", "text": "Is there a cup?", "word": "no", "figure": 1},
    {"image": "eval-00001.png", "text": "Is there a moon?", "word": "yes", "figure": 2},
    {"image": "eval-00001.png", "text": "Is there a cup?", "word": "no", "figure": 2},
]


@pytest.fixture
def config(tmp_path: Path, model_dir, monkeypatch) -> EvalConfig:
    """Return the options of a run on the world's files and those of a benchmark that is new."""
    monkeypatch.setattr(registry, "BENCHMARKS", (*registry.BENCHMARKS, WORDS))
    world = tmp_path / "world"
    write_eval_data(world, 2, seed=0)
    for name in ("pope_random.jsonl", "pope_popular.jsonl", "pope_adversarial.jsonl"):
        (world / "eval" / name).unlink()
    lines = "".join(f"{json.dumps(row)}\n" for row in ROWS)
    (world / "eval" / "words.jsonl").write_text(lines)
    shutil.copytree(model_dir, tmp_path / "other")
    return EvalConfig(
        models={"base": str(model_dir), "other": str(tmp_path / "other")},
        data=world / "eval",
        images=world / "images",
        out=tmp_path / "run" / "eval",
        bootstrap=50,
    )


def write_answers(config: EvalConfig, model: str, texts: list[str]) -> None:
    """Replace the stored answers to the questions of the new benchmark."""
    path = config.out / "answers" / f"{model}.jsonl"
    by_question = {(row["image"], row["text"]): text for row, text in zip(ROWS, texts, strict=True)}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["answer"] = by_question.get((row["image"], row["prompt"]), row["answer"])
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_a_registered_benchmark_is_asked_scored_and_reported(config, tmp_path) -> None:
    evaluate(config)
    asked = (config.out / "answers" / "base.jsonl").read_text()
    assert asked.count('"prompt": "Is there a moon?"') == 2
    assert asked.count('"prompt": "Is there a cup?"') == 2
    write_answers(config, "base", ["yes", "yes", "yes", "no"])
    write_answers(config, "other", ["yes", "no", "yes", "it is no"])

    scores = evaluate(config)
    assert scores == json.loads((config.out / "scores.json").read_text())
    task = scores["tasks"]["words"]
    assert (task["benchmark"], task["items"], task["images"]) == ("words", 4, 2)
    found = scores["benchmarks"]["words"]
    assert (found["title"], found["cluster"], found["clusters"]) == ("Words", "figure", 2)
    official, paired = (
        found["rules"][rule]["splits"]["all"]["models"] for rule in ("official", "paired")
    )
    assert official["base"]["hits"]["value"] == 0.75
    assert official["other"]["hits"]["difference"] == 0.25
    assert official["other"]["words"]["value"] == 1.5
    assert paired["base"]["both"]["value"] == 0.5
    assert paired["other"]["both"]["difference"] == 0.5
    # two figures are drawn: none, one or both of them may be the one with a wrong answer
    assert paired["base"]["both"]["interval"] == [0, 1]
    assert paired["other"]["both"]["difference_interval"] == [0, 1]
    assert "chair" in scores["tasks"]
    assert [sample["truth"] for sample in scores["samples"]] == ["holds no"]

    console = Console(file=StringIO(), width=200)
    console.print(scores_table(scores))
    printed = console.file.getvalue()
    page = write_report(tmp_path / "run", tmp_path / "report.html").read_text()
    for text in ("Words, share that is found", "75.0", "+25.0", "1.5", "+0.5", "+50.0"):
        assert text in printed
        assert text in page
    assert "image and figure" in printed
    assert "4 questions on 2 images" in page
    assert "Words, length in words, base → other" in page
    assert "holds no" in page


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("figure", "1", r"words\.jsonl, line 1: figure must be an integer, got '1'\. Count"),
        ("text", " ", r"words\.jsonl, line 1: text must be a non-empty string, got ' '\. Fill"),
        ("word", None, r"words\.jsonl, line 1: a row must have the keys \['word'\]"),
        ("image", "none.png", r"words\.jsonl, line 1: .*'none\.png' does not exist"),
    ],
)
def test_malformed_rows_are_refused_before_a_model_is_loaded(config, key, value, message) -> None:
    row = {**ROWS[0], key: value}
    if value is None:
        del row[key]
    (config.data / "words.jsonl").write_text(json.dumps(row))
    with pytest.raises(RefusedError, match=message):
        evaluate(config)
    assert not config.out.exists()


def test_two_questions_with_one_id_are_refused_before_a_model_is_loaded(config) -> None:
    row = {"question_id": 1, "image": "a.png", "text": "Is there a cup?", "label": "yes"}
    (config.data / "pope").mkdir()
    for split in ("random", "popular", "adversarial"):
        lines = [json.dumps(row)] * (2 if split == "random" else 1)
        (config.data / "pope" / f"pope_{split}.jsonl").write_text("\n".join(lines))
    message = (
        r"pope_random\.jsonl, line 2 must have an id of its own, got random-1, which .* line 1"
    )
    with pytest.raises(RefusedError, match=message):
        evaluate(config)
    assert not config.out.exists()


def test_the_benchmark_data_is_part_of_the_run_identity(config) -> None:
    evaluate(config)
    (config.data / "notes.json").write_text("{}")  # of no benchmark
    evaluate(config)
    (config.data / "words.jsonl").write_text(json.dumps(ROWS[0]))
    with pytest.raises(RefusedError, match=r"data\.words\.sha256: stored .*, requested .*"):
        evaluate(config)


def test_scores_of_another_schema_are_refused(config, tmp_path) -> None:
    evaluate(config)
    path = config.out / "scores.json"
    scores = json.loads(path.read_text())
    for schema in (1, 2):
        old = {**scores, "schema": schema}
        if schema == 1:
            del old["schema"]  # the first one had no number
        path.write_text(json.dumps(old))
        with pytest.raises(RefusedError, match=rf"scores\.json must have schema 3, got {schema}"):
            write_report(tmp_path / "run", tmp_path / "report.html")
    assert evaluate(config) == scores == json.loads(path.read_text())
    assert write_report(tmp_path / "run", tmp_path / "report.html").is_file()


def test_registered_benchmarks_are_whole_and_documented() -> None:
    help_text = CliRunner().invoke(app, ["eval", "--help"]).output
    page = (ROOT / "docs" / "guides" / "evaluation.md").read_text(encoding="utf-8")
    tasks = [task for benchmark in registry.BENCHMARKS for task in benchmark.layouts[0].files]
    assert len(tasks) == len({*tasks})
    for benchmark in registry.BENCHMARKS:
        names = benchmark.layouts[0].files.keys()
        assert all(layout.files.keys() == names for layout in benchmark.layouts)
        assert all(row.task in names and row.rule in benchmark.rules for row in benchmark.table)
        assert benchmark.samples.keys() <= names
        assert f"`{benchmark.name}`" in page
        assert benchmark.title not in help_text  # which would be a list to keep
        for layout in benchmark.layouts:
            for files in layout.files.values():
                for file in files:
                    assert f"`{file}`" in page


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_shown_metric_exists(name: str, tmp_path: Path) -> None:
    write_published(name, tmp_path, tmp_path)
    (benchmark, folder), *_ = registry.find_data(tmp_path, [name]).items()
    tasks = benchmark.read_tasks(folder)
    rows = [row for task in tasks.values() for row in task.rows]
    scores = score(
        tasks, {"m": {item_key(row): Answer("Yes") for row in rows}}, resamples=2, seed=0
    )
    shown = {(row["metric"], row["split"]) for row in scores["table"]}
    assert scores_table(scores).wide.row_count == len(scores["table"])
    assert shown == {(row.metric, row.split) for row in benchmark.table if row.task in tasks} - {
        ("score", "cognition")  # of MME, of whose tasks two are there
    }
