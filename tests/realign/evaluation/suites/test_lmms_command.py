"""The folder from which lmms-eval runs: data sets, task files, models and the command."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from realign.cli import app
from realign.demo.data import write_eval_data
from realign.errors import RefusedError
from realign.evaluation.registry import find_benchmark
from realign.evaluation.suites.lmms_command import write_lmms_eval
from realign.evaluation.suites.lmms_tasks import TASKS
from realign.evaluation.suites.suite import write_suite
from realign.modeling.adapters import add_adapter
from realign.modeling.loading import load_model


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Questions about two drawn scenes, in ``eval/``, and their images."""
    write_eval_data(tmp_path / "world", 2, 0)
    return tmp_path / "world"


def write(world: Path, out: Path, models: dict[str, str], **options: Any) -> dict[str, Any]:
    return write_lmms_eval(models, world / "eval", world / "images", out, **options)


def test_a_task_reads_the_questions_and_images_from_the_folder(
    installed: Path, world: Path, tmp_path: Path, model_dir: Path
) -> None:
    manifest = write(world, tmp_path / "out", {"base": str(model_dir)})
    assert [*manifest["tasks"]] == ["realign_pope_random", "realign_pope_pop", "realign_pope_adv"]
    task = yaml.safe_load((tmp_path / "out" / "tasks" / "realign_pope_pop.yaml").read_text())
    assert task == {
        "include": str(installed / "tasks" / "pope" / "pope_pop.yaml"),
        "task": "realign_pope_pop",
        "dataset_path": str(tmp_path / "out" / "data" / "pope_pop"),
        "dataset_kwargs": {"load_from_disk": True},
    }
    rows = [
        json.loads(line)
        for line in (world / "eval" / "pope_popular.jsonl").read_text().split("\n")[:-1]
    ]
    shutil.move(world / "images", world / "elsewhere")  # the images lie in the data set
    documents = datasets.load_from_disk(task["dataset_path"])["popular"]
    assert documents["question_id"] == [f"popular-{row['question_id']}" for row in rows]
    assert documents["question"] == [row["text"] for row in rows]
    assert documents["answer"] == [row["label"] for row in rows]
    for row, image in zip(rows, documents["image"], strict=True):
        original = Image.open(world / "elsewhere" / row["image"]).convert("RGB")
        assert image.convert("RGB").tobytes() == original.tobytes()


def test_the_command_states_every_relevant_option(
    installed: Path, world: Path, tmp_path: Path, model_dir: Path
) -> None:
    out = tmp_path / "out put"
    lines = write_suite(
        "lmms-eval", {"base": str(model_dir)}, world / "eval", world / "images", out, device="cpu"
    )
    command = shlex.split(lines[3])
    assert command[:6] == [sys.executable, "-m", "lmms_eval", "eval", "--model", "llava_hf"]
    flags = dict(zip(command[6::2], command[7::2], strict=False))
    assert flags["--model_args"] == f"pretrained={model_dir},device_map=cpu"
    assert flags["--device"] == "cpu"
    assert flags["--tasks"] == "realign_pope_random,realign_pope_pop,realign_pope_adv"
    assert flags["--include_path"] == str(out / "tasks")
    assert flags["--output_path"] == str(out / "results" / "base")
    assert command[-3:] == ["--log_samples", "--timezone", "UTC"]
    assert json.loads((out / "suite.json").read_text())["commands"]["base"] == command
    # the script runs: it reaches the package, which is none
    done = subprocess.run(["sh", out / "run.sh", "--limit", "2"], capture_output=True, text=True)
    assert "it is not to be imported" in done.stderr
    script = (out / "run.sh").read_text()
    assert "HF_HUB_OFFLINE=1" in script
    assert shlex.split(script.splitlines()[-1]) == [*command, "$@"]


def test_an_adapter_is_merged(
    installed: Path, world: Path, tmp_path: Path, model_dir: Path
) -> None:
    model = load_model(model_dir, torch.float32, name=str(model_dir))
    adapted = add_adapter(model, rank=2, alpha=4, targets="all-linear", freeze_vision=True)
    adapted.save_pretrained(tmp_path / "adapter")
    manifest = write(world, tmp_path / "out", {"aligned": str(tmp_path / "adapter")})
    folder = tmp_path / "out" / "models" / "aligned"
    assert manifest["models"]["aligned"] == {
        "name": "aligned",
        "given": str(tmp_path / "adapter"),
        "folder": str(folder),
        "type": "llava",
        "language_type": "llama",
        "is_merged": True,
    }
    assert f"pretrained={folder},device_map=auto" in manifest["commands"]["aligned"]
    assert not (folder / "adapter_config.json").exists()
    assert (folder / "model.safetensors").is_file()


def test_the_suite_flag_equals_the_suite_command(
    installed: Path, world: Path, tmp_path: Path, model_dir: Path
) -> None:
    paths = ["--model", f"base={model_dir}", "--data", str(world / "eval")]
    paths += ["--images", str(world / "images"), "--out"]
    runner = CliRunner()
    first = runner.invoke(app, ["eval", "suite", "lmms-eval", *paths, str(tmp_path / "a")])
    second = runner.invoke(app, ["eval", "--suite", "lmms-eval", *paths, str(tmp_path / "b")])
    assert first.exit_code == second.exit_code == 0, (first.output, second.output)
    folder = str(tmp_path)
    assert first.stdout.replace(f"{folder}/a", "X") == second.stdout.replace(f"{folder}/b", "X")
    lost = runner.invoke(
        app, ["eval", "--suite", "lmms-eval", *paths, str(tmp_path / "c"), "--batch-size", "8"]
    )
    assert lost.exit_code == 2
    assert "--batch-size must not be given with --suite" in lost.output
    lost = runner.invoke(app, ["eval", "--suite", "lmms-eval", "score", "--benchmark", "pope"])
    assert lost.exit_code == 2
    assert "--suite must be given after 'score'" in lost.output
    unknown = runner.invoke(app, ["eval", "suite", "helm", *paths, str(tmp_path / "d")])
    assert "suite must be one of lmms-eval, vlmevalkit" in unknown.output


def test_refusals_come_before_anything_is_written(
    installed: Path, world: Path, tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, models = tmp_path / "out", {"base": str(model_dir)}
    with pytest.raises(RefusedError, match="python must be an interpreter that runs"):
        write(world, out, models, python=str(tmp_path / "python"))
    with pytest.raises(RefusedError, match="models must have at least one model"):
        write(world, out, {})
    with pytest.raises(RefusedError, match="models must have names of letters"):
        write(world, out, {"a b": str(model_dir)})
    with pytest.raises(RefusedError, match="device must be cuda or cpu, got 'tpu'"):
        write(world, out, models, device="tpu")
    with pytest.raises(RefusedError, match="data must hold the files of a benchmark"):
        write_lmms_eval(models, world / "images", world / "images", out)
    other = shutil.copytree(model_dir, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "gemma3"}))
    with pytest.raises(RefusedError, match=r"that lmms-eval has a class for .*, got gemma3"):
        write(world, out, {"other": str(other)})
    comma = shutil.copytree(model_dir, tmp_path / "a,b")
    with pytest.raises(RefusedError, match="must have no comma"):
        write(world, out, {"base": str(comma)})
    next((world / "images").iterdir()).unlink()
    with pytest.raises(RefusedError, match="does not exist in"):
        write(world, out, models)
    (tmp_path / "other" / "here").mkdir()
    with pytest.raises(RefusedError, match="out must be a new folder"):
        write(world, tmp_path / "other", models)
    monkeypatch.delenv("PYTHONPATH")
    with pytest.raises(RefusedError, match="lmms-eval must be installed for"):
        write(world, out, models)
    assert not out.exists()


def test_every_task_belongs_to_a_benchmark_with_an_lmms_eval_rule() -> None:
    for task in TASKS:
        benchmark = find_benchmark(task.benchmark)
        assert set(task.tasks) <= {name for each in benchmark.layouts for name in each.files}
        assert "lmms-eval" in benchmark.rules


def test_a_backend_that_requires_images_gets_only_questions_with_images(
    installed: Path, tmp_path: Path, model_dir: Path
) -> None:
    for name in ("scienceqa", "scienceqa_img"):
        file = installed / "tasks" / "scienceqa" / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"task: {name}\n")
    (tmp_path / "data").mkdir()
    turns = [{"value": "<image>\nWhich?\nA. a cat\nB. a dog"}, {"value": "B"}]
    questions = [
        {"id": "1", "image": "a.png", "conversations": turns},
        {"id": "2", "conversations": turns},
    ]
    (tmp_path / "data" / "llava_test_CQM-A.json").write_text(json.dumps(questions))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for backend, name, count in (("llava_hf", "scienceqa_img", 1), ("vllm", "scienceqa", 2)):
        out = tmp_path / backend
        manifest = write_lmms_eval(
            {"base": str(model_dir)}, tmp_path / "data", tmp_path, out, backend=backend
        )
        assert {task: asked["items"] for task, asked in manifest["tasks"].items()} == {
            f"realign_{name}": count
        }
        documents = datasets.load_from_disk(str(out / "data" / name))["test"]
        assert documents["question"] == ["Which?"] * count
        assert documents["choices"] == [["a cat", "a dog"]] * count
        assert documents["answer"] == [1] * count
        assert documents["image"][1:] == [None] * (count - 1)
