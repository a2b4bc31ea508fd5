"""The command line as a user meets it: exit codes, messages, no network, quick help."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from realign.cli import app
from realign.config import SECTIONS
from realign.data.dataset import read_records
from realign.data.formats.parquet import write_parquet


def realign(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def official(tmp_path: Path, records) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    rows = []
    for number, record in enumerate(records(4)):
        (folder / f"{number}.png").write_bytes(record.images[0])
        (folder / f"{number}r.png").write_bytes(record.rejected_images[0])
        turn = {"role": "user", "content": f"<image>\n{record.prompt[0]['content']}"}
        rows.append(
            {
                "image": f"{number}.png",
                "retrieved_image": f"{number}r.png",
                "chosen": [turn, {"role": "assistant", "content": record.chosen}],
                "rejected": [turn, {"role": "assistant", "content": record.rejected}],
            }
        )
    path = tmp_path / "pref_data.json"
    path.write_text(json.dumps(rows))
    return path


def test_the_authors_format_trains(tmp_path: Path, official: Path, model_dir: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "run"
    result = realign(
        "train", "--data", official, "--images", images, "--model", model_dir, "--out", out
    )
    assert result.exit_code == 0, result.output
    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(1.386294, abs=1e-4)
    assert (out / "checkpoint" / "model.safetensors").is_file()


ROW = "pref_data.json, row 3 (counting from 1)"
BAD_ROWS = {
    "missing image": ({"image": "gone.png"}, f"{ROW}: image 'gone.png' does not"),
    "unreadable image": (
        {"image": "bad.png"},
        f"{ROW}, images 'bad.png': image must be a readable",
    ),
    "equal images": ({"retrieved_image": "2.png"}, f"{ROW}: retrieved_image must differ from imag"),
    "empty answer": ({"chosen": " "}, f"{ROW}: chosen must not be empty, got ' '"),
    "placeholder": ({"chosen": "A <image>."}, "must not contain the special token '<image>', got"),
    "outside": ({"image": "../x.png"}, f"{ROW}: image must lie inside"),
    "url": ({"image": "http://example.org/x.png"}, f"{ROW}: image must be a file name, got the U"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_exit_with_2_before_anything_is_written(
    case: str, tmp_path: Path, official: Path, model_dir: Path
) -> None:
    change, message = BAD_ROWS[case]
    (tmp_path / "images" / "bad.png").write_text("no image")
    rows = json.loads(official.read_text())
    for name, value in change.items():
        if name == "chosen":
            rows[2]["chosen"][1]["content"] = value
        else:
            rows[2][name] = value
    official.write_text(json.dumps(rows))
    images, out = tmp_path / "images", tmp_path / "run"
    result = realign(
        "train", "--data", official, "--images", images, "--model", model_dir, "--out", out
    )
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not out.exists()


def test_chosen_equal_to_rejected_exits_with_2(tmp_path, official: Path, model_dir: Path) -> None:
    rows = json.loads(official.read_text())
    rows[3]["rejected"] = rows[3]["chosen"]
    official.write_text(json.dumps(rows))
    result = realign(
        "cache", "--data", official, "--images", tmp_path / "images", "--model", model_dir,
        "--out", tmp_path / "cache",
    )  # fmt: skip
    assert result.exit_code == 2
    message = "row 4 (counting from 1): rejected must differ from chosen, got 'No, there is no"
    assert f"pref_data.json, {message}" in result.output
    assert not (tmp_path / "cache").exists()


def test_a_cache_of_another_model_exits_with_2(tmp_path: Path, records, model_dir: Path) -> None:
    data, cache = tmp_path / "d.parquet", tmp_path / "cache"
    write_parquet(records(4), data)
    assert realign("cache", "--model", model_dir, "--data", data, "--out", cache).exit_code == 0
    trained = realign("train", "--model", model_dir, "--data", data, "--out", tmp_path / "a")
    assert trained.exit_code == 0
    result = realign(
        "train", "--model", tmp_path / "a" / "checkpoint", "--data", data, "--cache", cache,
        "--out", tmp_path / "b",
    )  # fmt: skip
    assert result.exit_code == 2
    assert "semantics.files.model.safetensors: cached" in result.output
    assert "Run `realign cache` for this model" in result.output
    assert not (tmp_path / "b").exists()


def test_unknown_keys_and_values_exit_with_2(tmp_path: Path) -> None:
    result = realign("train", "--set", "train.betta=1")
    assert result.exit_code == 2
    assert "train has no option 'betta'. Did you mean 'beta'?" in result.output
    result = realign("train", "--model", tmp_path, "--data", "x", "--out", tmp_path / "o")
    assert result.exit_code == 2
    assert "must be a folder with config.json" in result.output
    result = realign("eval", "--model", "folder-without-name")
    assert result.exit_code == 2
    assert "--model must be NAME=FOLDER" in result.output
    result = realign("eval", "--model", "a=x", "--model", "b=x", "--model", "a=y")
    assert result.exit_code == 2
    assert "--model must have different names, got 'a' twice" in result.output
    result = realign("train", "--model", "./none", "--data", "x", "--out", tmp_path / "o")
    assert "must be an existing folder or a hub id, got ./none" in result.output


@pytest.mark.parametrize("verb", ["build", "cache", "train", "eval", "demo"])
@pytest.mark.parametrize("out", ["file", "file/below"])
def test_an_output_that_is_a_file_exits_with_2(verb: str, out: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    needed = {
        "build": ["--source", "s", "--images", "i", "--model", "m"],
        "cache": ["--data", "d", "--model", "m"],
        "train": ["--data", "d", "--model", "m"],
        "eval": ["--data", "d", "--images", "i", "--model", "a=m"],
        "demo": [],
    }
    result = realign(verb, *needed[verb], "--out", tmp_path / out)
    assert result.exit_code == 2
    assert f"out must be a folder, got {tmp_path / out}, but {tmp_path / 'file'} is a" in (
        result.output
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_a_page_that_is_a_folder_or_below_a_file_exits_with_2(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    result = realign("report", tmp_path, "--out", tmp_path)
    assert result.exit_code == 2
    assert f"out must be a file for the page, got the folder {tmp_path}. Add" in result.output
    result = realign("report", tmp_path, "--out", tmp_path / "metrics.jsonl" / "page.html")
    assert result.exit_code == 2
    assert "metrics.jsonl is a file. Choose another --out." in result.output


def test_every_option_of_the_help_is_an_option_of_the_section() -> None:
    import inspect

    from realign import cli

    verbs = {"build": cli.build, "cache": cli.cache, "train": cli.train}
    for verb, function in verbs.items():
        names = set(inspect.signature(function).parameters) - {"ctx", "config", "set_", "dry_run"}
        assert names <= SECTIONS[verb].model_fields.keys()


def test_help_names_every_verb_in_the_order_of_its_use() -> None:
    lines = realign("--help").output.splitlines()
    verbs = [match[1] for line in lines if (match := re.match(r"\W+([a-z]+)   ? *[A-Z]", line))]
    assert verbs[:5] == ["build", "check", "cache", "train", "eval"]
    assert sorted(verbs) == sorted(command for command in get_command(app).commands)


@pytest.mark.parametrize("verb", SECTIONS)
def test_help_lists_every_option_of_the_section(verb: str) -> None:
    result = realign(verb, "--help")
    assert result.exit_code == 0
    for key, field in SECTIONS[verb].model_fields.items():
        (line,) = [x for x in result.output.splitlines() if x.startswith(f"  {verb}.{key}: ")]
        assert line.endswith("required") == field.is_required()
        assert line.endswith("required") or ", default " in line
    shown = " ".join(result.output.replace("│", " ").split())
    required = sum(field.is_required() for field in SECTIONS[verb].model_fields.values())
    assert shown.count("Required, here or in --config.") == required


def test_help_spells_types_and_defaults_as_yaml() -> None:
    lines = realign("train", "--help").output.splitlines()
    for line in (
        "  train.beta: float, default 0.1",
        "  train.objective: rdpo|dpo|mdpo|symmetric|sft, default rdpo",
        "  train.lora: section, default none",
        "  train.lora.targets: str or list of str, default all-linear",
        "  train.freeze_vision: bool, default true",
        "  train.report_to: list of str, default []",
    ):
        assert line in lines


def run_process(*arguments: object, **options) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "realign.cli", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, **options)


def test_help_and_import_load_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['realign', '--help']\n"
        "import realign, realign.cli\n"
        "try: realign.cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_training_opens_no_network_socket(tmp_path: Path, records, model_dir: Path) -> None:
    write_parquet(records(4), tmp_path / "d.parquet")
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from realign.cli import app\n"
        "app(sys.argv[1:])\n"
    )
    arguments = ["train", "--model", model_dir, "--data", tmp_path / "d.parquet"]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    subprocess.run(
        [sys.executable, "-c", code, *map(str, [*arguments, "--out", tmp_path / "run"])],
        check=True,
        capture_output=True,
        env=environment,
    )


def tree(folder: Path, *without: str) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in without
    }


def wait_for(process: subprocess.Popen[bytes], pattern: str, folder: Path) -> None:
    """Until a file of that name appears in the folder."""
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)):
        assert process.poll() is None, "the process ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill_when(process: subprocess.Popen[bytes], pattern: str, folder: Path) -> None:
    """SIGKILL as soon as a file of that name appears in the folder."""
    wait_for(process, pattern, folder)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_sigterm_exits_with_143_and_the_same_command_ends_the_same(
    tmp_path: Path, records, model_dir: Path
) -> None:
    write_parquet(records(24), tmp_path / "d.parquet")
    train = [
        "train", "--model", model_dir, "--data", tmp_path / "d.parquet", "--epochs", 2,
        "--set", "train.batch_size=4", "--set", "train.accumulation=1", "--learning-rate", "1e-4",
        "--set", "train.save_steps=2", "--set", "train.logging_steps=1",
    ]  # fmt: skip
    process = run_process(*train, "--out", tmp_path / "stopped", stderr=subprocess.PIPE)
    wait_for(process, "steps/checkpoint-4", tmp_path / "stopped")
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert process.returncode == 143
    assert b"Traceback" not in stderr
    assert not (tmp_path / "stopped" / "checkpoint").exists()
    for name in ("stopped", "whole"):
        assert realign(*train, "--out", tmp_path / name).exit_code == 0
    assert tree(tmp_path / "stopped") == tree(tmp_path / "whole")


def test_kill_9_then_the_same_command_ends_the_same(tmp_path: Path, model_dir: Path) -> None:
    from realign.demo.data import write_training_data
    from realign.demo.tasks import LEXICON_PATH

    write_training_data(tmp_path / "world", 40, seed=0)
    build = [
        "build", "--model", model_dir, "--source", tmp_path / "world" / "train.jsonl",
        "--images", tmp_path / "world" / "images", "--set", f"build.lexicon={LEXICON_PATH}",
        "--set", "build.window=8", "--set", "build.shard_size=8", "--workers", "1",
        "--set", "build.max_new_tokens=64", "--set", "build.top_k=3",
    ]  # fmt: skip
    process = run_process(*build, "--out", tmp_path / "killed", stderr=subprocess.DEVNULL)
    kill_when(process, "shards/00002.jsonl", tmp_path / "killed")
    assert not (tmp_path / "killed" / "dataset.parquet").exists()
    for name in ("killed", "whole"):
        assert realign(*build, "--out", tmp_path / name).exit_code == 0
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")
    data = tmp_path / "whole" / "dataset.parquet"
    assert len(read_records(data, None)) > 30

    cache = ["cache", "--model", model_dir, "--data", data, "--set", "cache.shard_size=8"]
    process = run_process(*cache, "--out", tmp_path / "cache1", stderr=subprocess.DEVNULL)
    kill_when(process, "*/shards/00001-*.safetensors", tmp_path / "cache1")
    for name in ("cache1", "cache2"):
        assert realign(*cache, "--out", tmp_path / name).exit_code == 0
    assert tree(tmp_path / "cache1") == tree(tmp_path / "cache2")

    train = [
        "train", "--model", model_dir, "--data", data, "--cache", tmp_path / "cache1",
        "--set", "train.batch_size=4", "--set", "train.accumulation=1", "--learning-rate", "1e-4",
        "--epochs", 2, "--set", "train.save_steps=2", "--set", "train.logging_steps=3",
    ]  # fmt: skip
    process = run_process(*train, "--out", tmp_path / "run1", stderr=subprocess.DEVNULL)
    kill_when(process, "steps/checkpoint-6", tmp_path / "run1")
    for name in ("run1", "run2"):
        assert realign(*train, "--out", tmp_path / name).exit_code == 0
    assert tree(tmp_path / "run1") == tree(tmp_path / "run2")
