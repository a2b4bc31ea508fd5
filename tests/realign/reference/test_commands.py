"""``realign cache`` and its commands as a user meets them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from typer.testing import CliRunner

from realign.cli import app
from realign.data.formats.parquet import write_parquet
from realign.modeling.acceleration import Numerics
from realign.reference import Scoring, read_cache
from realign.reference.import_columns import COLUMNS


def realign(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def data(tmp_path: Path, records) -> Path:
    path = tmp_path / "data.parquet"
    write_parquet(records(4), path)
    return path


@pytest.fixture
def built(tmp_path: Path, data: Path, model_dir) -> Path:
    result = realign(
        "cache", "--model", model_dir, "--data", data, "--out", tmp_path / "cache",
        "--set", "cache.shard_size=2", "--set", "cache.batch_size=2",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return tmp_path / "cache"


def test_help_describes_the_cache_and_its_commands() -> None:
    shown = " ".join(realign("cache", "--help").output.split())
    for text in (
        "Usage: realign cache [OPTIONS] COMMAND [ARGS]...",
        "Without one of the commands below, it builds a cache.",
        "verify Check every byte of a cache against its hashes.",
        "info Show what a cache was computed from",
        "merge Merge caches of the same model and numerics.",
        "import Make a cache from the log-probabilities of another trainer.",
        "--shard-size <int> Rows per shard, rounded up to whole batches. A killed run loses at",
        "[default: 1024]",
    ):
        assert text in shown.replace("root", "realign"), text
    for command in ("verify", "info", "merge", "import"):
        assert realign("cache", command, "--help").exit_code == 0


def test_verify_reports_every_damaged_file(built: Path) -> None:
    result = realign("cache", "verify", built)
    assert result.exit_code == 0
    assert "whole, 4 rows in 2 shards, root " in result.output
    one, two = sorted(built.glob("*/shards/*"))
    one.write_bytes(one.read_bytes()[:-1])
    two.unlink()
    result = realign("cache", "verify", built)
    assert result.exit_code == 2
    assert f"{one} must have " in result.output
    assert f"{two} is in the manifest but does not exist" in result.output
    assert "Run `realign cache` with the same options" in result.output
    next(built.glob("*/manifest.json")).unlink()
    result = realign("cache", "verify", next(iter(built.iterdir())))
    assert result.exit_code == 2
    assert "is unfinished: it has no manifest.json. Run `realign cache` again" in result.output


def test_info_prints_the_identity_and_size_of_a_cache(built: Path) -> None:
    result = realign("cache", "info", built)
    assert result.exit_code == 0
    for text in (
        "4 rows in 2 shards, ",
        "probe: 4 rows computed alone differ by ",
        "  computed from:\n",
        "      cells: 3\n",
        "      dtype: float32\n",
        "        model.safetensors: sha256 ",
    ):
        assert text in result.output, text
    (place,) = built.iterdir()
    shutil.copy(
        next(place.glob("shards/00000-*")), place / "shards" / f"00009-{'0' * 16}.safetensors"
    )
    assert "  1 more shards of a build that was stopped" in realign("cache", "info", built).output
    next(built.glob("*/manifest.json")).unlink()
    next(built.glob("*/shards/00009-*")).unlink()
    assert "unfinished: 2 shards so far" in realign("cache", "info", built).output


@pytest.mark.parametrize("command", ["verify", "info"])
def test_a_folder_that_is_not_a_cache_is_refused(tmp_path: Path, command: str) -> None:
    result = realign("cache", command, tmp_path)
    assert result.exit_code == 2
    assert f"got {tmp_path}, which holds none. Check the path" in result.output.replace("\n", "")


def test_options_before_a_command_are_refused(tmp_path: Path) -> None:
    for options in (["--data", "d"], ["--set", "cache.cells=4"]):
        result = realign("cache", *options, "verify", tmp_path)
        assert result.exit_code == 2
        assert f"{options[0]} must be given after 'verify'" in result.output
    assert "No such command 'verfy'" in realign("cache", "verfy", tmp_path).output


def test_merge_joins_caches_and_keeps_existing_shards(tmp_path: Path, synthetic) -> None:
    rows = synthetic.rows(20)
    synthetic.build(rows[:8], tmp_path / "a")
    synthetic.build(rows[6:14], tmp_path / "b")
    place = synthetic.build(rows[12:], tmp_path / "out")
    kept = {path: path.read_bytes() for path in place.glob("shards/*")}
    result = realign("cache", "merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert f"-> {place}" in result.output.replace("\n", "")
    assert {path: path.read_bytes() for path in kept} == kept
    merged = read_cache(tmp_path / "out", rows, synthetic.identity)
    expected = synthetic.values(rows)
    for index, row in enumerate(rows):
        assert merged[row.key].tolist() == expected.logps[index].tolist()
    assert merged.variance.rows == 8 + 8 + 8
    assert realign("cache", "verify", tmp_path / "out").exit_code == 0
    total = sum(len(list(path.glob("shards/*"))) for path in (place,))
    assert total == 4  # two of its own, one of what each part added


def test_merge_refuses_caches_of_another_identity(tmp_path: Path, synthetic) -> None:
    rows = synthetic.rows(4)
    other = json.loads(json.dumps(synthetic.identity))
    other["numerics"]["dtype"] = "bfloat16"
    synthetic.build(rows, tmp_path / "a")
    synthetic.build(rows, tmp_path / "b", identity=other)
    result = realign("cache", "merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "o")
    assert result.exit_code == 2
    assert "numerics.dtype: cached float32, needed bfloat16" in result.output
    assert not (tmp_path / "o").exists()
    synthetic.build(rows, tmp_path / "a", identity=other)
    result = realign("cache", "merge", tmp_path / "a", "--out", tmp_path / "o")
    assert "must be of one identity" in result.output
    (tmp_path / "c" / "0" / "shards").mkdir(parents=True)
    result = realign("cache", "merge", tmp_path / "c", "--out", tmp_path / "o")
    assert "must be finished, got one that is not" in result.output


def with_columns(data: Path, values: dict[str, list[Any]]) -> Path:
    table = pyarrow.parquet.read_table(data)
    for name, column in values.items():
        table = table.append_column(name, pyarrow.array(column))
    path = data.with_name("columns.parquet")
    pyarrow.parquet.write_table(table, path)
    return path


@pytest.fixture
def live(model_dir, records) -> dict[str, list[float]]:
    """Return the log-probabilities of the model row by row, as another trainer computes them."""
    scorer = Scoring(model_dir, 3, "label", Numerics(torch.float32), batch_size=1).load()
    logps = torch.tensor([scorer.score_alone(row).logps[0].tolist() for row in records(4)])
    return {name: logps[:, cell].tolist() for cell, name in enumerate(COLUMNS[:3])}


@pytest.mark.parametrize("cells", [2, pytest.param(3, marks=pytest.mark.full)])
def test_reference_columns_of_trl_are_imported(
    tmp_path: Path, data: Path, model_dir, live, records, cells: int
) -> None:
    columns = with_columns(data, dict(list(live.items())[:cells]))
    out = tmp_path / "imported"
    result = realign("cache", "import", "--data", columns, "--model", model_dir, "--out", out)
    assert result.exit_code == 0, result.output
    assert "imported: not probed" in realign("cache", "info", out).output
    train = ["train", "--model", model_dir, "--data", data, "--cache", out]
    train += ["--objective", "dpo" if cells == 2 else "rdpo"]
    result = realign(*train, "--out", tmp_path / "run")
    assert result.exit_code == 2  # never without being asked
    assert "--accept-numerics uses it if 64 rows computed here agree" in result.output
    assert "semantics" not in result.output
    result = realign(*train, "--accept-numerics", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["rewards/text_margins"] == pytest.approx(0, abs=1e-4)
    accepted = json.loads((tmp_path / "run" / "accepted_numerics.json").read_text())
    assert any("imported: cached ref_chosen_logps" in line for line in accepted["differences"])
    if cells == 2:
        result = realign(
            "train", "--model", model_dir, "--data", data, "--cache", out, "--accept-numerics",
            "--out", tmp_path / "rdpo",
        )  # fmt: skip
        assert result.exit_code == 2
        assert "semantics.cells: cached 2, needed 3" in result.output


def test_reference_columns_of_another_model_are_refused(
    tmp_path: Path, data: Path, model_dir, live
) -> None:
    shifted = {name: [value - 0.1 for value in values] for name, values in live.items()}
    columns, out = with_columns(data, shifted), tmp_path / "imported"
    assert realign("cache", "import", "--data", columns, "--model", model_dir, "--out", out
                   ).exit_code == 0  # fmt: skip
    result = realign(
        "train", "--model", model_dir, "--data", data, "--cache", out, "--accept-numerics",
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert result.exit_code == 2
    assert "4 of 4 rows must have the cached log-probabilities here too" in result.output
    assert not (tmp_path / "run").exists()


BAD_COLUMNS = {
    "none": ({}, "must have the columns ref_chosen_logps and ref_rejected_logps"),
    "one": ({"ref_chosen_logps": [-1.0] * 4}, "got ['ref_chosen_logps']"),
    "a gap": (
        {name: [-1.0] * 4 for name in (*COLUMNS[:2], COLUMNS[3])},
        "got ['ref_chosen_logps', 'ref_rejected_logps', 'ref_both_rejected_logps']",
    ),
    "texts": (
        {COLUMNS[0]: ["-1.0"] * 4, COLUMNS[1]: [-1.0] * 4},
        "ref_chosen_logps must be a column of numbers, one summed log-probability per row, got st",
    ),
    "one value per token": (
        {COLUMNS[0]: [-1.0] * 4, COLUMNS[1]: [[-1.0, -2.0]] * 4},
        "ref_rejected_logps must be a column of numbers, one summed log-probability per row, got l",
    ),
    "positive": (
        {COLUMNS[0]: [-1.0] * 4, COLUMNS[1]: [-1.0, -1.0, 0.5, -1.0]},
        "row 3 (counting from 1): ref_rejected_logps must be a summed log-probability",
    ),
    "NaN": (
        {COLUMNS[0]: [-1.0, float("nan"), -1.0, -1.0], COLUMNS[1]: [-1.0] * 4},
        "row 2 (counting from 1): ref_chosen_logps must be a summed log-probability, finite",
    ),
}


@pytest.mark.parametrize("case", BAD_COLUMNS)
def test_reference_columns_with_bad_values_are_refused(
    case: str, tmp_path: Path, data: Path, model_dir
) -> None:
    values, message = BAD_COLUMNS[case]
    columns, out = with_columns(data, values), tmp_path / "o"
    result = realign("cache", "import", "--data", columns, "--model", model_dir, "--out", out)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not out.exists()


def test_a_moved_cache_is_read_unchanged(tmp_path: Path, built: Path, model_dir, records) -> None:
    identity = Scoring(model_dir, 3, "label", Numerics(torch.float32)).identity()
    shutil.move(built, tmp_path / "elsewhere")
    assert len(read_cache(tmp_path / "elsewhere", records(4), identity)) == 4
