"""VLMEvalKit: its command, and result files in the form of its source, which was not run here."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from realign.errors import RefusedError
from realign.evaluation.suites import vlmevalkit_command
from realign.evaluation.suites.suite import read_suite, write_suite
from realign.evaluation.suites.vlmevalkit_command import Table


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a checkout, and a table whose digest is known."""
    checkout = tmp_path / "VLMEvalKit"
    (checkout / "vlmeval").mkdir(parents=True)
    (checkout / "vlmeval" / "__init__.py").write_text("")
    (checkout / "run.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(checkout))
    table = tmp_path / "lmu" / "POPE.tsv"
    table.parent.mkdir()
    table.write_text("index\tquestion\n")
    digest = hashlib.md5(table.read_bytes()).hexdigest()
    monkeypatch.setitem(vlmevalkit_command.TABLES, "POPE", Table("ImageYORNDataset", digest))
    return checkout


def model(folder: Path, kind: str, language: str = "llama") -> str:
    folder.mkdir(parents=True)
    config = {"model_type": kind, "text_config": {"model_type": language}}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def write(tmp_path: Path, *folders: str, **options: Any) -> dict[str, Any]:
    models = {Path(folder).name: folder for folder in folders}
    write_suite("vlmevalkit", models, tmp_path / "lmu", None, tmp_path / "out", **options)
    return json.loads((tmp_path / "out" / "vlmeval.json").read_text())


def test_the_configuration_decodes_greedily_and_names_the_loaded_models(
    kit: Path, tmp_path: Path
) -> None:
    qwen = model(tmp_path / "qwen", "qwen2_5_vl")
    next_ = model(tmp_path / "next-vicuna", "llava_next")
    config = write(tmp_path, qwen, next_)
    assert config == {
        "model": {
            "qwen": {"class": "Qwen2VLChat", "model_path": qwen, "do_sample": False},
            "next-vicuna": {"class": "LLaVA_Next", "model_path": next_},
        },
        "data": {"POPE": {"class": "ImageYORNDataset", "dataset": "POPE"}},
    }
    script = (tmp_path / "out" / "run.sh").read_text()
    assert (
        f"LMUData={tmp_path / 'lmu'} PRED_FORMAT=json {sys.executable} {kit / 'run.py'}" in script
    )
    assert "--judge exact_matching" in script
    (kit / "run.py").unlink()  # as in ms-vlmeval
    (tmp_path / "out").rename(tmp_path / "before")
    write(tmp_path, qwen)
    assert "-m vlmeval.run --config" in (tmp_path / "out" / "run.sh").read_text()


def test_unsupported_models_are_refused_with_a_supported_alternative(
    kit: Path, tmp_path: Path
) -> None:
    with pytest.raises(RefusedError, match=r"LLaVA_Next loads no checkpoint .* --base-url"):
        write(tmp_path, model(tmp_path / "llava", "llava"))
    with pytest.raises(RefusedError, match=r"must hold mistral, from which .* got vicuna"):
        write(tmp_path, model(tmp_path / "vicuna", "llava_next", "mistral"))
    with pytest.raises(RefusedError, match=r"must hold vicuna or 34b, .* got none"):
        write(tmp_path, model(tmp_path / "plain", "llava_next"))
    qwen = model(tmp_path / "qwen", "qwen2_vl")
    with pytest.raises(RefusedError, match="device must be cuda for VLMEvalKit"):
        write(tmp_path, qwen, device="cpu")
    (tmp_path / "lmu" / "POPE.tsv").write_text("index\n")
    with pytest.raises(RefusedError, match="would be downloaded again over this file"):
        write(tmp_path, qwen)
    (tmp_path / "lmu" / "POPE.tsv").unlink()
    with pytest.raises(RefusedError, match="data must hold a table of VLMEvalKit"):
        write(tmp_path, qwen)
    assert not (tmp_path / "out").exists()


MME = [  # image, question, label
    ("1.jpg", "Is there a cat? Please answer yes or no.", "Yes"),
    ("1.jpg", "Is there a dog? Please answer yes or no.", "No"),
    ("2.jpg", "Is there a cat? Please answer yes or no.", "Yes"),
    ("2.jpg", "Is there a bus? Please answer yes or no.", "No"),
]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Results on four questions of MME in two runs, and the questions in ``data/``."""
    (tmp_path / "data").mkdir()
    lines = ("\t".join(question) for question in MME)
    (tmp_path / "data" / "existence.txt").write_text("".join(f"{line}\n" for line in lines))
    for stamp, answers in (
        ("T20261129-100000", ["No", "No", "No", "No"]),
        ("T20261129-110000", ["Yes", "No", "yes, a cat", "There is none."]),
    ):
        run = tmp_path / "results" / "aligned" / stamp
        run.mkdir(parents=True)
        rows = [
            {
                "index": number,
                "question": question,
                "answer": label,
                "category": "existence",
                "image_path": f"existence/{image}",
                "prediction": answer,
                "hint": float("nan"),  # as pandas has it
            }
            for number, ((image, question, label), answer) in enumerate(
                zip(MME, answers, strict=True)
            )
        ]
        (run / "aligned_MME.json").write_text(json.dumps(rows))
        with (run / "aligned_MME_score.csv").open("w", newline="") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)
            writer.writerows([["perception", "existence"], ["125.0", "125.0"]])
    return tmp_path


def test_the_newest_run_is_read_and_scored_again(results: Path) -> None:
    found = read_suite(results / "results", results / "data")["models"]["aligned"]
    assert found["runs"] == {"MME": {"run": "T20261129-110000"}}
    assert {entry["metric"]: entry["value"] for entry in found["aggregates"]} == {
        "perception": 125.0,
        "existence": 125.0,
    }
    splits = {rule: scores["splits"] for rule, scores in found["rescored"]["mme"].items()}
    # by the words yes and no three of four questions and one of two images are right
    assert splits["vlmevalkit"]["existence"]["score"] == 75 + 50
    assert splits["official"]["existence"]["score"] == 75 + 50


def test_results_without_data_keep_only_the_numbers_of_vlmevalkit(results: Path) -> None:
    found = read_suite(results / "results")["models"]["aligned"]
    assert found["rescored"] == {}
    assert found["notes"] == ["MME: its answers are not scored again; no --data was given."]


def test_missing_answers_and_answers_to_other_questions_are_reported(results: Path) -> None:
    path = results / "results" / "aligned" / "T20261129-110000" / "aligned_MME.json"
    rows = json.loads(path.read_text())
    rows[1]["prediction"] = "Failed to obtain answer via API."
    path.write_text(json.dumps(rows))
    found = read_suite(results / "results", results / "data")["models"]["aligned"]
    assert "1 of 4 answers are missing" in found["notes"][0]
    for edit in ({"question": "Is there a tree?"}, rows[0]):
        path.write_text(json.dumps([rows[0], rows[1] | edit]))
        with pytest.raises(RefusedError, match="row 2 must answer a question of"):
            read_suite(results / "results", results / "data")
    path.write_text(json.dumps([{"index": 1}]))
    with pytest.raises(RefusedError, match="with the answer as prediction"):
        read_suite(results / "results", results / "data")
    path.rename(path.with_suffix(".xlsx"))
    with pytest.raises(RefusedError, match="got a spreadsheet"):
        read_suite(results / "results", results / "data")
