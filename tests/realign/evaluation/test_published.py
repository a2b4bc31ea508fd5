"""Every benchmark is asked by the command line from the files that are published."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from realign.cli import app
from realign.evaluation import score
from realign.evaluation.benchmark import Benchmark
from realign.evaluation.registry import BENCHMARKS
from realign.evaluation.table import scores_table
from tests.realign.evaluation.published import PUBLISHED, picture, write_published

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
# the first item of each benchmark under each program's prompt, and the longest answer
PROMPTS = {
    "pope": {
        "official": ("Is there a ball in the image?", 128),
        "llava": (f"Is there a ball in the image?{SHORT}", 128),
        "lmms-eval": (f"Is there a ball in the image?{SHORT}", 128),
        "vlmevalkit": ("Is there a ball in the image?", 128),
    },
    "amber-generative": {
        "official": ("Describe this image.", 512),
        "lmms-eval": ("Describe this image", 2048),
    },
    "hallusionbench": {
        "official": ("Is the ball left of the cup?", 1024),
        "lmms-eval": ("Is the ball left of the cup?", 128),
        "vlmevalkit": ("Is the ball left of the cup?", 1024),
    },
    "amber-discriminative": {
        "official": ("Is the ball number 1 red?", 128),
        "vlmevalkit": ("Is the ball number 1 red?\nPlease answer yes or no.", 128),
    },
    "chair": {
        "official": ("Describe the image.", 512),
        "lmms-eval": ("Please describe this image in detail.", 2048),
    },
    "mme": {
        "official": ("Is there a ball? Please answer yes or no.", 128),
        "llava": (f"Is there a ball?{SHORT}", 128),
        "lmms-eval": (f"Is there a ball?{SHORT}", 16),
        "vlmevalkit": ("Is there a ball? Please answer yes or no.", 128),
    },
    "mmbench": {
        "llava": (f"What is red?\nA. a ball\nB. a cup\nC. a star{LETTER}", 1024),
        "lmms-eval": (
            "What is red? There are several options:\nA. a ball\nB. a cup\nC. a star" + LETTER,
            1024,
        ),
        "vlmevalkit": (
            "Question: What is red?\nOptions:\nA. a ball\nB. a cup\nC. a star\n"
            "Please select the correct answer from the options above. \n",
            1024,
        ),
    },
    "scienceqa": {
        "llava": (f"What is it?\nA. a ball\nB. a cup{LETTER}", 1024),
        "lmms-eval": (f"What is it?\nA. a ball\nB. a cup{LETTER}", 16),
        "vlmevalkit": (
            "Question: What is it?\nOptions:\nA. a ball\nB. a cup\n"
            "Please select the correct answer from the options above. \n",
            1024,
        ),
    },
    "textvqa": {
        "llava": (f"What Brand is it?\nReference OCR token: NOKIA{SHORT}", 128),
        "lmms-eval": (f"What brand is it?{SHORT}", 128),
        "vlmevalkit": (f"What Brand is it?{SHORT}", 128),
    },
    "vizwiz": {
        "llava": (f"What is this? and what color is it?{UNANSWERABLE}{SHORT}", 128),
        "lmms-eval": (f"What is this? and what color is it?{UNANSWERABLE}{SHORT}", 128),
        "vlmevalkit": ("What is this? and what color is it?", 128),
    },
}
# image of the first item, the last split of each item, and the ids of the first and last item
ITEMS: dict[str, tuple[int | None, set[str], str, str]] = {
    "pope": (1, {"popular"}, "popular-1", "popular-4"),
    "hallusionbench": (None, {"VS"}, "VS_map_0_0_0", "VS_map_0_2_1"),
    "amber-discriminative": (0, {"state", "existence", "relation"}, "1", "3"),
    "amber-generative": (0, {"all"}, "1", "2"),
    "chair": (0, {"all"}, "1.png: Describe the image.", "2.png: Describe the image."),
    "mme": (0, {"existence", "count"}, "existence/0001/Is there a ball?",
            "count/0002/Is there only one cup?"),
    "mmbench": (7, {"object_localization"}, "7", "2000008"),
    "scienceqa": (0, {"all"}, "4", "5"),
    "textvqa": (0, {"all"}, "34602", "34603"),
    "vizwiz": (0, {"other"}, "0", "1"),
}  # fmt: skip


def benchmark_of(name: str) -> Benchmark:
    """Return a benchmark; of CHAIR the one with data of one's own, whose tests are here."""
    return [benchmark for benchmark in BENCHMARKS if benchmark.name == name][-1]


def ask(tmp_path: Path, model: Path, *options: str) -> str:
    """Run the command and return what it printed."""
    command = ["eval", "--model", f"base={model}", "--out", str(tmp_path / "eval")]
    result = CliRunner().invoke(app, [*command, "--bootstrap", "20", *options])
    assert result.exit_code == 0, result.output
    return result.output


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_benchmark_is_evaluated_from_its_published_files(
    name: str, tmp_path: Path, model_dir: Path
) -> None:
    data = tmp_path / "data"
    images = data if name in ("mme", "mmbench") else tmp_path / "images"  # by default with the data
    write_published(name, data, images)
    options = [] if images == data else ["--images", str(images)]
    ask(tmp_path, model_dir, "--data", str(data), *options, "--max-new-tokens", "4")

    lines = read_lines(tmp_path / "eval" / "answers" / "base.jsonl")
    header = json.loads((tmp_path / "eval" / "answers" / "base.header.json").read_text())
    seed, splits, first_id, last_id = ITEMS[name]
    expected = next(iter(PROMPTS[name].values()))[0]
    assert (lines[0]["id"], lines[-1]["id"], lines[0]["prompt"]) == (first_id, last_id, expected)
    assert {line["split"] for line in lines} == splits
    assert {line["benchmark"] for line in lines} == {name}
    sha256 = None if seed is None else hashlib.sha256(picture(seed)).hexdigest()
    assert lines[0]["image_sha256"] == sha256
    assert (lines[0]["image"] is None) is (seed is None)
    assert all(line["tokens"] <= 4 for line in lines)
    assert header["prompts"] == {name: next(iter(benchmark_of(name).prompts))}
    assert not (tmp_path / "eval" / "journal").exists()

    scores = json.loads((tmp_path / "eval" / "scores.json").read_text())
    assert scores["table"]
    assert scores_table(scores).wide.row_count == len(scores["table"])
    assert all(task["probes"]["base"]["mean_tokens"] <= 4 for task in scores["tasks"].values())
    rule = next(iter(scores["benchmarks"][name]["rules"]))
    assert score(name, tmp_path / "eval" / "answers" / "base.jsonl", data, rule)["items"] == len(
        lines
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_prompts_and_lengths_equal_the_published_ones(name: str, tmp_path: Path) -> None:
    write_published(name, tmp_path, tmp_path)
    benchmark = benchmark_of(name)
    row = next(iter(benchmark.read_tasks(tmp_path).values())).rows[0]
    found = {
        program: (prompt.text(row), prompt.max_new_tokens)
        for program, prompt in benchmark.prompts.items()
    }
    assert found == PROMPTS[name]


def test_answers_for_a_judge_are_stored_and_not_scored(tmp_path: Path, model_dir: Path) -> None:
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    (data / "images" / "v1_0.png").write_bytes(picture(1))
    row = {"imagename": "v1_0.png", "question": "What is red?", "answer": "ball"}
    row |= {"imagesource": "", "capability": ["rec"]}
    (data / "mm-vet.json").write_text(json.dumps({"v1_0": row}))
    assert "base" in ask(tmp_path, model_dir, "--data", str(data), "--max-new-tokens", "4")
    (line,) = read_lines(tmp_path / "eval" / "answers" / "base.jsonl")
    assert (line["id"], line["prompt"]) == ("v1_0", "What is red?")
    assert json.loads((tmp_path / "eval" / "scores.json").read_text())["table"] == []


def test_every_benchmark_is_tested() -> None:
    assert PUBLISHED.keys() == PROMPTS.keys() == ITEMS.keys()
    assert {*PUBLISHED} == {benchmark.name for benchmark in BENCHMARKS if benchmark.table}
