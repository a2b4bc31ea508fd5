"""Scores against counts made by hand, and the runs that store answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from realign.config import EvalConfig
from realign.demo.data import write_eval_data
from realign.errors import RefusedError
from realign.evaluation.benchmark import Task
from realign.evaluation.benchmarks.chair import CHAIR, caption_counts, chair_metrics, mentioned
from realign.evaluation.benchmarks.pope import POPE, counts_of, official_metrics, official_yes
from realign.evaluation.comparison import score
from realign.evaluation.run import evaluate
from realign.evaluation.samples import sample_answers
from realign.evaluation.table import cut_note, difference
from realign.generation.generator import Answer
from realign.review.report import write_report


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes, there is a dog.", True),
        ("No, there is no dog.", False),
        ("There is no dog in the image.", False),
        ("There is not. Yes.", False),  # the first sentence decides
        ("Yes. No.", True),
        ("There isn't a dog.", True),  # the official rule misses this, and so do we under its name
        ("", True),
    ],
)
def test_the_official_pope_rule_reads_yes(answer: str, yes: bool) -> None:
    assert official_yes(answer) is yes


def test_pope_metrics_equal_counts_by_hand() -> None:
    assert counts_of(official_yes)({"label": "yes"}, "No.") == [0, 1, 0, 0, 0, 0]
    scores = official_metrics(np.array([8.0, 2.0, 0.0, 4.0, 6.0, 0.0]))  # tp, fn, -, fp, tn, -
    assert scores["balanced_accuracy"] == pytest.approx(0.5 * (0.8 + 0.6))
    assert scores["f1"] == pytest.approx(2 * 8 / (2 * 8 + 4 + 2))
    assert scores["yes_ratio"] == pytest.approx(12 / 20)


def test_chair_equals_counts_by_hand() -> None:
    synonyms = {"dog": ["dog", "puppy"], "bus": ["bus"], "cat": ["cat"]}
    assert mentioned("Two puppies? A puppy and two buses, catalogue.", synonyms) == {"dog", "bus"}
    row = {"objects": ["dog", "bus"], "synonyms": synonyms}
    counts = caption_counts(row, "A puppy, a dog and a cat.")
    assert counts == [2, 1, 2, 1]
    scores = chair_metrics(np.array(counts, dtype=float))
    assert (scores["chair_i"], scores["recall"]) == (0.5, 0.5)


def test_models_are_compared_on_the_same_images() -> None:
    rows = [
        {"image": "a", "text": "dog?", "label": "yes"},
        {"image": "a", "text": "cat?", "label": "no"},
        {"image": "b", "text": "dog?", "label": "no"},
    ]
    texts = {("a", "dog?"): "Yes.", ("a", "cat?"): "No.", ("b", "dog?"): "Yes."}
    right = {**texts, ("b", "dog?"): "No."}
    answers = {
        "x": {question: Answer(text) for question, text in texts.items()},
        "y": {question: Answer(text, text == "No.") for question, text in right.items()},
    }
    scores = score({"pope_random": Task(POPE, rows)}, answers, resamples=10, seed=0)
    task = scores["tasks"]["pope_random"]
    assert (task["items"], task["images"], scores["baseline"]) == (3, 2, "x")
    split = scores["benchmarks"]["pope"]["rules"]["official"]["splits"]["random"]
    models = split["models"]
    assert (split["items"], split["images"]) == (3, 2)
    assert models["x"]["balanced_accuracy"]["value"] == 0.75
    assert models["y"]["balanced_accuracy"]["difference"] == 0.25
    assert task["cut"] == {"x": 0, "y": 2}
    assert cut_note(scores) == "Of 3 answers, cut at max_new_tokens: x 0, y 2."
    assert cut_note({"tasks": {"pope_random": {**task, "cut": {"x": 0, "y": 0}}}}) == ""


def test_a_difference_of_zero_is_printed_without_a_minus_sign() -> None:
    score = {"difference": 0.0, "difference_interval": [-0.0, -0.0004]}
    assert difference(score) == "+0.0 [+0.0, +0.0]"
    assert difference({"difference": -0.01, "difference_interval": [-0.02, 0]}) == (
        "-1.0 [-2.0, +0.0]"
    )


def test_samples_are_the_first_answers_on_which_first_and_last_models_differ() -> None:
    questions = [
        {"image": "a", "text": "dog?", "label": "yes"},
        {"image": "a", "text": "cat?", "label": "no"},
    ]
    synonyms = {"dog": ["dog"], "cat": ["cat", "kitten"]}
    caption = {"image": "a", "text": "Describe.", "objects": ["dog"], "synonyms": synonyms}
    tasks = {"pope_adversarial": Task(POPE, questions), "chair": Task(CHAIR, [caption])}
    base = {("a", "dog?"): "Yes.", ("a", "cat?"): "Yes.", ("a", "Describe."): "A dog, a kitten."}
    other = {**base, ("a", "cat?"): "No.", ("a", "Describe."): "A dog."}
    answers = {
        model: {question: Answer(text) for question, text in texts.items()}
        for model, texts in (("base", base), ("between", base), ("last", other))
    }
    sample, second = sample_answers(tasks, answers)  # marked words come first
    assert sample["truth"] == "in the image: dog"
    assert sample["answers"] == {
        "base": {"text": "A dog, a kitten.", "is_right": False, "absent_words": ["cat", "kitten"]},
        "last": {"text": "A dog.", "is_right": True, "absent_words": []},
    }
    assert (second["prompt"], second["truth"]) == ("cat?", "right answer: no")
    assert [answer["is_right"] for answer in second["answers"].values()] == [False, True]
    assert sample_answers(tasks, {"base": answers["base"]}) == []
    assert sample_answers({"pope_random": Task(POPE, questions)}, answers) == []


@pytest.fixture
def world(tmp_path: Path) -> Path:
    write_eval_data(tmp_path / "world", 6, seed=0)
    return tmp_path / "world"


def test_answers_are_stored_once_and_reused(tmp_path: Path, model_dir, world) -> None:
    config = EvalConfig(
        models={"base": str(model_dir), "same": str(model_dir)},
        data=world / "eval",
        images=world / "images",
        out=tmp_path / "eval",
        bootstrap=20,
    )
    scores = evaluate(config)
    answers = (tmp_path / "eval" / "answers" / "base.jsonl").read_bytes()
    rows = [json.loads(line) for line in answers.splitlines()]
    assert len({(row["benchmark"], row["id"]) for row in rows}) == len(rows)
    assert answers == (tmp_path / "eval" / "answers" / "same.jsonl").read_bytes()
    models = scores["benchmarks"]["chair"]["rules"]["object-list"]["splits"]["all"]["models"]
    assert models["same"]["recall"]["difference"] == 0
    assert scores["samples"] == []  # two equal models have no different captions
    assert evaluate(config) == json.loads((tmp_path / "eval" / "scores.json").read_text())


def test_images_and_generation_settings_are_part_of_the_run_identity(
    tmp_path: Path, model_dir, world
) -> None:
    model = Path(shutil.copytree(model_dir, tmp_path / "model"))
    config = EvalConfig(
        models={"base": str(model)},
        data=world / "eval",
        images=world / "images",
        out=tmp_path / "eval",
        bootstrap=20,
    )
    evaluate(config)
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**settings, "num_beams": 2}))
    with pytest.raises(RefusedError, match=r"models\.base\.generation_config\.json: .* requested"):
        evaluate(config)
    (model / "generation_config.json").write_bytes(
        (model_dir / "generation_config.json").read_bytes()
    )
    evaluate(config)
    shutil.copy(world / "images" / "eval-00001.png", world / "images" / "eval-00000.png")
    with pytest.raises(
        RefusedError, match=r"holds another run.*\n  images: others stored, .*, 12 requested"
    ):
        evaluate(config)


def test_eval_refuses_missing_or_malformed_options_and_data(
    tmp_path: Path, model_dir, world
) -> None:
    def run(**options):
        base = {"models": {"base": str(model_dir)}, "data": world / "eval"}
        base |= {"images": world / "images", "out": tmp_path / "eval"}
        evaluate(EvalConfig(**{**base, **options}))

    with pytest.raises(RefusedError, match="at least one model"):
        run(models={})
    with pytest.raises(RefusedError, match=r"files of a benchmark \(pope: pope_random\.jsonl;"):
        run(data=tmp_path)
    path = world / "eval" / "pope_popular.jsonl"
    good = path.read_text()
    path.write_text(good.replace('"label": "yes"', '"label": "maybe"', 1))
    with pytest.raises(RefusedError, match=r"popular\.jsonl, line 1: label must be yes or no"):
        run()
    path.write_text('{"image": "a.png", "text": "x"}\n')
    with pytest.raises(RefusedError, match=r"line 1: a row must have the keys \['label'\]"):
        run()
    path.write_text(good)
    (world / "images" / "eval-00003.png").unlink()
    with pytest.raises(RefusedError, match=r"'eval-00003\.png' does not exist"):
        run()
    (world / "images" / "eval-00003.png").write_text("junk")
    with pytest.raises(RefusedError, match=r"line \d+, eval-00003\.png: image must be a readable"):
        run()
    (world / "eval" / "chair_objects.json").unlink()
    with pytest.raises(RefusedError, match=r"must hold chair_objects\.json"):
        run()
    assert not (tmp_path / "eval").exists()


@pytest.mark.parametrize("tasks", [["pope_popular"], ["pope_adversarial"], ["chair"]], ids=str)
def test_present_tasks_are_measured_and_absent_tasks_are_named(
    tmp_path: Path, model_dir, world, tasks: list[str], capsys
) -> None:
    files = ("pope_random", "pope_popular", "pope_adversarial", "chair")
    absent = [f"{name}.jsonl" for name in files if name not in tasks]
    for name in absent:
        (world / "eval" / name).unlink()
    if "chair" not in tasks:
        (world / "eval" / "chair_objects.json").unlink()
    config = EvalConfig(
        models={"base": str(model_dir)},
        data=world / "eval",
        images=world / "images",
        out=tmp_path / "eval",
        bootstrap=20,
    )
    assert list(evaluate(config)["tasks"]) == tasks
    printed = capsys.readouterr().err
    if "chair" in tasks:
        assert "does not hold them: pope, hallusionbench" in printed
    else:
        assert (
            "does not hold them: hallusionbench, amber-generative, amber-discriminative, chair, mme"
            in printed
        )
        assert f"{world / 'eval'} does not hold {', '.join(absent[:-1])}\n" in printed
    assert write_report(tmp_path, tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("pope_random.jsonl", "{", r"pope_random\.jsonl, line 1 must be JSON, got '\{'"),
        ("pope_random.jsonl", "", r"pope_random\.jsonl must have at least one row"),
        ("pope_random.jsonl", "3\n", r"pope_random\.jsonl, line 1 must be an object .* got 3"),
        ("pope_random.jsonl", '{"image": "a", "text": 1, "label": "no"}', "line 1: text must be"),
        ("pope_random.jsonl", '{"image": 1, "text": "x", "label": "no"}', "must be a file name"),
        ("chair.jsonl", '{"image": "a", "text": "x", "objects": "dog"}', "objects must be a list"),
        ("chair.jsonl", '{"image": "a", "text": "x", "objects": ["emu"]}', "line 1: .* got 'emu'"),
        ("chair_objects.json", "{\n[", r"chair_objects\.json, line 2 must be JSON"),
        ("chair_objects.json", '{"dog": "dog"}', r"chair_objects\.json must map each object to a"),
    ],
)
def test_malformed_files_are_named(
    tmp_path: Path, model_dir, world, file: str, text: str, message: str
) -> None:
    (world / "eval" / file).write_text(text)
    config = EvalConfig(
        models={"base": str(model_dir)},
        data=world / "eval",
        images=world / "images",
        out=tmp_path / "eval",
    )
    with pytest.raises(RefusedError, match=message):
        evaluate(config)
    assert not config.out.exists()
