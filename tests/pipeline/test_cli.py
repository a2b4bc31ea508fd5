"""The command line as a user meets it: exit codes, messages, no network, quick help."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path

import pytest
from pydantic import PositiveFloat
from typer.main import get_command
from typer.testing import CliRunner

from realign.cli import app
from realign.config import SECTIONS, BuildConfig, TrainConfig
from realign.config_file import flag_name, inner_section, options
from realign.data.dataset import read_records
from realign.data.formats.parquet import write_parquet
from realign.errors import RefusedError
from tests.conftest import running
from tests.realign.conftest import write_authors_images


def realign(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def official(tmp_path: Path, records) -> Path:
    rows = write_authors_images(records(4), tmp_path / "images")
    path = tmp_path / "pref_data.json"
    path.write_text(json.dumps(rows))
    return path


def test_train_accepts_the_authors_format(tmp_path: Path, official: Path, model_dir: Path) -> None:
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


def test_a_loss_that_is_not_finite_exits_with_1(tmp_path: Path, records, model_dir: Path) -> None:
    data = tmp_path / "d.parquet"
    write_parquet(records(4), data)
    result = realign(
        "train", "--model", model_dir, "--data", data, "--out", tmp_path / "run", "--beta", 1e308
    )
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)  # the message, without a traceback
    assert re.search(r"^realign: step 1: .* must be finite, got ", result.output, re.MULTILINE)
    assert not (tmp_path / "run" / "checkpoint").exists()


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


def test_a_report_path_that_cannot_be_a_file_exits_with_2(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    result = realign("report", tmp_path, "--out", tmp_path)
    assert result.exit_code == 2
    assert f"out must be a file for the page, got the folder {tmp_path}. Add" in result.output
    result = realign("report", tmp_path, "--out", tmp_path / "metrics.jsonl" / "page.html")
    assert result.exit_code == 2
    assert "metrics.jsonl is a file. Choose another --out." in result.output


class WithOneMore(TrainConfig):
    """A section with one option more than `realign train` has."""

    dummy_rate: PositiveFloat = 0.25
    """Rate of nothing."""


def test_a_field_of_a_section_is_a_flag_a_set_key_and_a_config_key(
    tmp_path: Path, model_dir: Path, monkeypatch
) -> None:
    """Only the section declares the field."""
    from realign.training import run

    seen: list[WithOneMore] = []
    monkeypatch.setitem(SECTIONS, "train", WithOneMore)
    monkeypatch.setattr(run, "train", lambda section, dry_run: seen.append(section))
    (tmp_path / "d.parquet").touch()
    (tmp_path / "run.yaml").write_text("train: {dummy_rate: 0.5}")
    needed = ["--model", model_dir, "--data", tmp_path / "d.parquet", "--out", tmp_path / "o"]
    config = ["--config", tmp_path / "run.yaml"]
    override = ["--set", "train.dummy_rate=2"]
    for given in ([], config, config + override, [*config, *override, "--dummy-rate", "3e-1"]):
        result = realign("train", *needed, *given)
        assert result.exit_code == 0, result.output
    assert [section.dummy_rate for section in seen] == [0.25, 0.5, 2.0, 0.3]
    help_text = " ".join(realign("train", "--help").output.split())
    assert "--dummy-rate <float> Rate of nothing. [default: 0.25]" in help_text
    hinted = realign("train", *needed, "--set", "train.dummy_rat=1")
    assert "train has no option 'dummy_rat'. Did you mean 'dummy_rate'?" in hinted.output
    assert "--dummy-rate" in realign("train", *needed, "--dummy-rat", 1).output
    refused = realign("train", *needed, "--dummy-rate", -1)
    assert "train.dummy_rate: Input should be greater than 0, got '-1'." in refused.output


def test_flags_of_every_kind_reach_the_section(
    tmp_path: Path, model_dir: Path, monkeypatch
) -> None:
    from realign.building import run

    seen: list[BuildConfig] = []

    def build(section: BuildConfig, *, dry_run: bool) -> None:
        seen.append(section)
        raise RefusedError("enough.")

    monkeypatch.setattr(run, "build", build)
    needed = ["build", "--source", tmp_path, "--model", model_dir, "--out", tmp_path / "o"]
    realign(
        *needed, "--mask-rates", "objects=0.5", "--mask-rates", "colors=10%", "--keep-unmasked",
        "--max-hamming", "null", "--max-reject", "0.1%", "--turns", "each", "--top-k", "07",
        "--lexicon", tmp_path, "--set", "build.masker.model=m", "--mask", "model",
    )  # fmt: skip
    realign(*needed, "--no-keep-unmasked", "--set", "build.keep_unmasked=true")
    first, second = seen
    assert first.mask_rates == {"objects": 0.5, "colors": 0.1}
    assert (first.keep_unmasked, second.keep_unmasked) == (True, False)
    assert (first.max_hamming, first.max_reject, first.top_k) == (None, 0.001, 7)
    assert (first.turns, first.lexicon, second.mask_rates) == ("each", tmp_path, {})
    assert first.masker is not None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--mask-rates", "objects"], "--mask-rates must be CATEGORY=SHARE, got 'objects'. Put a"),
        (
            ["--mask-rates", "a=1", "--mask-rates", "a=1"],
            "must have different names, got 'a' twice",
        ),
        (["--top-k", "many"], "build.top_k: Input should be a valid integer, unable to parse"),
        (["--set", "build.masker.endpoint=e"], "Pass --set build.masker.model or set it in the YA"),
    ],
)
def test_flags_that_do_not_fit_are_refused(given: list[str], message: str) -> None:
    result = realign("build", "--source", "s", "--model", "m", "--out", "o", *given)
    assert result.exit_code == 2
    assert message in result.output


def test_help_lists_every_command_in_the_order_of_use() -> None:
    lines = realign("--help").output.splitlines()
    verbs = [match[1] for line in lines if (match := re.match(r"  ([a-z]+) +[A-Z]", line))]
    assert verbs[:6] == ["init", "build", "check", "cache", "train", "eval"]
    assert sorted(verbs) == sorted(command for command in get_command(app).commands)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("verb", SECTIONS)
def test_help_lists_every_option_of_the_section(verb: str, width: int, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    output = realign(verb, "--help").output
    assert max(map(len, output.splitlines())) <= width
    text = " ".join(output.split())
    letters = "".join(output.split())  # lines break at hyphens too
    for _, key, field in options(SECTIONS[verb]):
        assert field.description
        assert "".join(field.description.replace("``", "").split()) in letters
        if section := inner_section(field):
            assert f" {verb}.{key} " in text
            assert all(f" .{inner} " in text for inner in section.model_fields)
        else:
            assert f" {flag_name(key, field)} " in text
    required = sum(field.is_required() for field in SECTIONS[verb].model_fields.values())
    nested = text.partition("Nested options")[0]
    assert nested.count("Required, here or in --config.") == required


def test_help_begins_with_required_options_and_has_headings() -> None:
    output = realign("train", "--help").output
    headings = re.findall(r"^(\w.*):$", output, re.MULTILINE)
    assert headings[:3] == ["Options", "Objective", "Optimization"]
    assert headings[-1] == "Nested options, with --set train.lora.KEY=VALUE or in --config"
    first = output.partition("Objective:")[0]
    assert all(f"--{name} " in first for name in ("model", "data", "out", "config", "set", "help"))
    for section in output.split("\n\n"):
        assert section.count("\n  --") <= 12  # few enough to look through


def test_help_shows_types_and_defaults() -> None:
    text = " ".join(realign("train", "--help").output.split())
    for line in (
        "--beta <float> KL strength of the answer-pair term. [default: 0.1]",
        "--objective rdpo|dpo|vdpo|mdpo|symmetric|sft ",
        "--freeze-vision / --no-freeze-vision Do not train the vision tower. [default: true]",
        "--report-to TRACKER...",
        ".targets <str>|<list>",
    ):
        assert line in text


def run_process(*arguments: object, stderr: int) -> AbstractContextManager[subprocess.Popen[bytes]]:
    return running([sys.executable, "-m", "realign.cli", *arguments], stderr=stderr)


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


@pytest.mark.full
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
    deadline = time.monotonic() + 600  # of a machine that does other things
    while not list(folder.glob(pattern)):
        assert process.poll() is None, "the process ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill_when(process: subprocess.Popen[bytes], pattern: str, folder: Path) -> None:
    """SIGKILL as soon as a file of that name appears in the folder."""
    wait_for(process, pattern, folder)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_stopped_by_a_signal_resumes_to_the_same_files(
    tmp_path: Path, records, model_dir: Path, number: int, code: int
) -> None:
    write_parquet(records(12), tmp_path / "d.parquet")
    train = [
        "train", "--model", model_dir, "--data", tmp_path / "d.parquet", "--epochs", 2,
        "--set", "train.batch_size=4", "--set", "train.pairs_per_step=4", "--learning-rate", "1e-4",
        "--set", "train.save_steps=1", "--set", "train.logging_steps=1",
    ]  # fmt: skip
    with run_process(*train, "--out", tmp_path / "stopped", stderr=subprocess.PIPE) as process:
        wait_for(process, "steps/checkpoint-2", tmp_path / "stopped")
        process.send_signal(number)
        _, stderr = process.communicate()
    assert process.returncode == code
    assert b"Traceback" not in stderr
    assert b"saving before the end" in stderr
    assert not (tmp_path / "stopped" / "checkpoint").exists()
    for name in ("stopped", "whole"):
        assert realign(*train, "--out", tmp_path / name).exit_code == 0
    assert tree(tmp_path / "stopped") == tree(tmp_path / "whole")


@pytest.mark.full
def test_commands_ended_by_kill_9_resume_to_the_same_files(tmp_path: Path, model_dir: Path) -> None:
    from realign.demo.data import write_training_data
    from realign.demo.tasks import LEXICON_PATH

    write_training_data(tmp_path / "world", 40, seed=0)
    build = [
        "build", "--model", model_dir, "--source", tmp_path / "world" / "train.jsonl",
        "--images", tmp_path / "world" / "images", "--set", f"build.lexicon={LEXICON_PATH}",
        "--set", "build.window=8", "--set", "build.shard_size=8", "--workers", "1",
        "--set", "build.max_new_tokens=64", "--set", "build.top_k=3",
    ]  # fmt: skip
    with run_process(*build, "--out", tmp_path / "killed", stderr=subprocess.DEVNULL) as process:
        kill_when(process, "shards/00002.jsonl", tmp_path / "killed")
    assert not (tmp_path / "killed" / "dataset.parquet").exists()
    for name in ("killed", "whole"):
        assert realign(*build, "--out", tmp_path / name).exit_code == 0
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")
    data = tmp_path / "whole" / "dataset.parquet"
    assert len(read_records(data, None)) > 30

    cache = ["cache", "--model", model_dir, "--data", data, "--set", "cache.shard_size=8"]
    with run_process(*cache, "--out", tmp_path / "cache1", stderr=subprocess.DEVNULL) as process:
        kill_when(process, "*/shards/00001-*.safetensors", tmp_path / "cache1")
    for name in ("cache1", "cache2"):
        assert realign(*cache, "--out", tmp_path / name).exit_code == 0
    assert tree(tmp_path / "cache1") == tree(tmp_path / "cache2")

    train = [
        "train", "--model", model_dir, "--data", data, "--cache", tmp_path / "cache1",
        "--set", "train.batch_size=4", "--set", "train.pairs_per_step=4", "--learning-rate", "1e-4",
        "--epochs", 2, "--set", "train.save_steps=2", "--set", "train.logging_steps=3",
    ]  # fmt: skip
    with run_process(*train, "--out", tmp_path / "run1", stderr=subprocess.DEVNULL) as process:
        kill_when(process, "steps/checkpoint-6", tmp_path / "run1")
    for name in ("run1", "run2"):
        assert realign(*train, "--out", tmp_path / name).exit_code == 0
    assert tree(tmp_path / "run1") == tree(tmp_path / "run2")


def test_the_version_option_prints_the_package_version() -> None:
    result = realign("--version")
    assert (result.exit_code, result.stdout) == (0, f"realign {version('realign')}\n")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("realign tr", "train"),
        ("realign train --le", "--learning-rate"),
        ("realign eval w", "write"),
    ],
)
def test_the_shell_completes_commands_and_the_options_of_sections(words: str, found: str) -> None:
    number = str(len(words.split()) - 1)
    asked = {"_REALIGN_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": number}
    result = CliRunner().invoke(app, env=asked, prog_name="realign")
    assert result.stdout.splitlines() == [found]
