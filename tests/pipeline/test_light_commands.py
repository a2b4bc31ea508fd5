"""Commands for people start fast, and every command refuses wrong options fast: PyTorch,
transformers and datasets are imported for work that needs them alone.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from realign.cli import app
from realign.data.export.run import WRITERS
from realign.data.formats.parquet import write_parquet
from realign.demo.data import write_eval_data
from tests.conftest import running
from tests.realign.conftest import make_records

HEAVY = ("torch", "transformers", "datasets")
ROOMS = tuple(f"realign.{room}" for room in ("modeling", "training", "reference", "building"))
# in every Python process of a command: the name of each module is written when it is imported
RECORDER = """
import os, sys

class Recorder:
    def find_spec(self, name, path=None, target=None):
        if name in os.environ["WATCHED"].split(","):
            file = os.path.join(os.environ["RECORDED"], f"{os.getpid()}.txt")
            with open(file, "a") as lines:
                command = os.environ.get("COMMAND"), sys.orig_argv
                lines.write(f"{name} imported by {command}\\n")

sys.meta_path.insert(0, Recorder())
"""
# one process for many command lines; a line's exit code and output stand under its number
RUNNER = """
import contextlib, io, json, os, sys
from realign.cli import app

results = []
for line in json.load(open(sys.argv[1])):
    output, os.environ["COMMAND"] = io.StringIO(), " ".join(line)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            app(line)
        except SystemExit as stop:
            code = stop.code
    results.append([code, output.getvalue()])
json.dump(results, open(sys.argv[2], "w"))
"""


class Watched:
    """Processes of commands, and the modules that they and their children import."""

    def __init__(self, folder: Path, modules: tuple[str, ...]) -> None:
        self.folder = folder
        self.recorded = folder / "recorded"
        self.recorded.mkdir(parents=True)
        (folder / "sitecustomize.py").write_text(RECORDER)
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(folder), os.environ.get("PYTHONPATH")])
            ),
            "RECORDED": str(self.recorded),
            "WATCHED": ",".join(modules),
        }

    def run(self, *lines: list[object]) -> list[tuple[int, str]]:
        """Run command lines; return exit code and output of each."""
        (self.folder / "lines.json").write_text(json.dumps([[*map(str, line)] for line in lines]))
        code = ["-c", RUNNER, str(self.folder / "lines.json"), str(self.folder / "results.json")]
        subprocess.run([sys.executable, *code], check=True, env=self.environment)
        return [*map(tuple, json.loads((self.folder / "results.json").read_text()))]

    def imported(self) -> str:
        """Return a line for each watched module that any of the processes imported."""
        return "".join(path.read_text() for path in self.recorded.iterdir())


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path / "watched", (*HEAVY, *ROOMS))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """The folder of a run, with dataset, training and evaluation, and the authors' JSON in it."""
    folder = tmp_path_factory.mktemp("light") / "run"
    write_parquet(make_records(4), folder / "dataset" / "dataset.parquet")
    write_eval_data(folder / "world", 2, seed=0)
    lines = [
        f"export --data {folder / 'dataset'} --to official --out {folder / 'official'}",
        f"train --model {model_dir} --data {folder / 'dataset'} --out {folder}",
        f"eval --model a={model_dir} --model b={folder / 'checkpoint'} --out {folder / 'eval'}"
        f" --data {folder / 'world' / 'eval'} --images {folder / 'world' / 'images'}",
    ]
    for line in lines:
        result = CliRunner().invoke(app, line.split())
        assert result.exit_code == 0, result.output
    return folder


def test_help_imports_no_heavy_library(watched: Watched) -> None:
    command: Any = get_command(app)
    lines = [[], *([name] for name in command.commands)]
    lines += [["cache", name] for name in command.commands["cache"].commands]
    for code, output in watched.run(*([*line, "--help"] for line in lines)):
        assert code == 0
        assert "Usage: " in output
    assert not watched.imported()


def test_report_and_export_work_without_heavy_libraries(
    watched: Watched, run: Path, tmp_path: Path
) -> None:
    dataset = run / "dataset"
    authors = run / "official" / "pref_data.json"
    lines = [
        ["report", run, "--out", tmp_path / "run.html"],
        ["report", dataset, "--out", tmp_path / "dataset.html"],
        [
            "report",
            authors,
            "--images",
            authors.parent / "images",
            "--out",
            tmp_path / "authors.html",
        ],
        *(["export", "--data", dataset, "--to", to, "--out", tmp_path / to] for to in WRITERS),
    ]
    for (code, output), line in zip(watched.run(*lines), lines, strict=True):
        assert code == 0, (line, output)
    assert "POPE" in (tmp_path / "run.html").read_text()
    assert not watched.imported()


def test_card_works_without_heavy_libraries(tmp_path: Path, run: Path) -> None:
    watched = Watched(tmp_path / "watched", HEAVY)
    lines = [["card", run, "--overwrite"], ["card", run / "dataset", "--overwrite"]]
    for code, output in watched.run(*lines):
        assert code == 0, output
    (run / "checkpoint" / "README.md").unlink()  # other tests take the run as it was
    (run / "dataset" / "README.md").unlink()
    assert not watched.imported()


def test_check_works_without_heavy_libraries_and_so_do_its_workers(
    tmp_path: Path, run: Path
) -> None:
    watched = Watched(tmp_path / "watched", (*HEAVY, "realign.data.perceptual_hash"))
    ((code, output),) = watched.run(["check", "--data", run / "dataset"])
    assert code == 0, output
    assert "realign.data.image_worker" in watched.imported()  # processes of its own are seen
    assert not [name for name in HEAVY if f"{name} imported" in watched.imported()]


def test_browse_works_without_heavy_libraries(watched: Watched, run: Path) -> None:
    command = [sys.executable, "-m", "realign", "browse", run / "dataset", "--port", "0"]
    with running(command, env=watched.environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = process.stderr
        address = next(found[0] for line in lines if (found := re.search(r"http\S+", line)))
        cookies = urllib.request.HTTPCookieProcessor()
        with urllib.request.build_opener(cookies).open(address) as page:
            assert b"There is" in page.read()
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert not watched.imported()


REFUSED = {
    "an unknown key": [
        ("build", "--set", "build.topk=1"),
        ("cache", "--set", "cache.cell=1"),
        ("train", "--set", "train.betta=1"),
        ("check", "--set", "check.maxreject=1"),
        ("eval", "--set", "eval.seeds=1"),
    ],
    "a wrong value": [
        ("build", *("--source", "s", "--model", "m", "--out", "o", "--top-k", "0")),
        ("build", *("--source", "RUN", "--model", "m", "--out", "o", "--format", "none")),
        ("cache", *("--data", "d", "--model", "m", "--out", "o", "--cells", "5")),
        ("train", *("--data", "d", "--model", "m", "--out", "o", "--objective", "ppo")),
        ("train", *("--data", "d", "--model", "m", "--out", "o", "--beta", "-1")),
        ("check", *("--data", "d", "--max-reject", "101%")),
        ("eval", *("--model", "m", "--data", "d", "--images", "i", "--out", "o")),
        ("export", *("--data", "DATASET", "--to", "none", "--out", "o")),
        ("browse", *("DATASET", "--port", "70000")),
        ("merge", *("--model", "m", "--out", "o", "--dtype", "int8")),
        ("card", *("RUN", "--license", "MIT")),
        ("card", *("RUN", "--base-model", "base")),
        ("push", *("RUN", "--repo", "name")),
    ],
    "a missing option": [(verb,) for verb in ("build", "cache", "train", "check", "eval")],
    "a missing file or folder": [
        ("build", *("--source", "NONE", "--model", "m", "--out", "o")),
        ("build", *("--source", "RUN", "--images", "NONE", "--model", "m", "--out", "o")),
        ("build", *("--source", "RUN", "--model", "NONE", "--out", "o")),
        ("build", *("--source", "RUN", "--model", "m", "--out", "o", "--lexicon", "NONE")),
        ("cache", *("--data", "NONE", "--model", "m", "--out", "o")),
        ("cache", *("--data", "DATASET", "--model", "NONE", "--out", "o")),
        ("cache", "verify", "NONE"),
        ("cache", "info", "NONE"),
        ("cache", *("merge", "NONE", "--out", "o")),
        ("cache", *("import", "--data", "NONE", "--model", "m", "--out", "o")),
        ("train", *("--data", "NONE", "--model", "m", "--out", "o")),
        ("train", *("--data", "DATASET", "--model", "NONE", "--out", "o")),
        ("train", *("--data", "DATASET", "--model", "m", "--out", "o", "--cache", "NONE")),
        ("train", *("--config", "NONE")),
        ("check", *("--data", "NONE")),
        ("check", *("--data", "DATASET", "--model", "NONE")),
        ("check", *("--data", "DATASET", "--eval-images", "NONE")),
        ("eval", *("--model", "a=m", "--data", "NONE", "--images", "RUN", "--out", "o")),
        ("eval", *("--model", "a=m", "--data", "RUN", "--images", "NONE", "--out", "o")),
        ("eval", *("--model", "a=NONE", "--data", "RUN", "--images", "RUN", "--out", "o")),
        ("report", "NONE"),
        ("browse", "NONE"),
        ("export", *("--data", "NONE", "--to", "trl", "--out", "o")),
        ("merge", *("--model", "NONE", "--out", "o")),
        ("card", "NONE"),
        ("card", *("RUN", "--eval", "NONE")),
        ("card", *("RUN", "--run", "NONE")),
        ("push", *("NONE", "--repo", "user/name")),
        ("push", *("RUN", "--repo", "user/name")),  # without a card
    ],
    "an output that is a file": [
        ("build", *("--source", "RUN", "--model", "m", "--out", "FILE")),
        ("cache", *("--data", "DATASET", "--model", "m", "--out", "FILE")),
        ("train", *("--data", "DATASET", "--model", "m", "--out", "FILE")),
        ("check", *("--data", "DATASET", "--out", "FILE")),
        ("eval", *("--model", "a=m", "--data", "RUN", "--images", "RUN", "--out", "FILE")),
        ("export", *("--data", "DATASET", "--to", "trl", "--out", "FILE")),
        ("merge", *("--model", "m", "--out", "FILE")),
        ("demo", *("--out", "FILE")),
    ],
}


def test_refusals_come_before_heavy_imports(tmp_path: Path, run: Path) -> None:
    watched = Watched(tmp_path / "watched", HEAVY)
    places = {
        "RUN": run,
        "DATASET": run / "dataset",
        "NONE": tmp_path / "none",
        "a=NONE": f"a={tmp_path / 'none'}",
        "FILE": run / "metrics.jsonl",
    }
    lines = [[places.get(word, word) for word in line] for line in chain(*REFUSED.values())]
    for (code, output), line in zip(watched.run(*lines), lines, strict=True):
        assert code == 2, (line, output)
        assert re.search(r"realign: .*(\. \S|Did you mean|, got )", output), (line, output)
    assert not watched.imported()
