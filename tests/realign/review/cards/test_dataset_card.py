"""The card of a dataset: true to its rows and its build, and readable for the hub's libraries."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from huggingface_hub import DatasetCard
from typer.testing import CliRunner

from realign.cli import app
from realign.data.formats.parquet import FEATURES, write_parquet
from realign.errors import RefusedError
from realign.review.cards.card import write_card
from realign.review.cards.dataset_card import size_category
from realign.review.cards.licence import Licence
from realign.review.cards.model_card import CardOptions


def written(path: Path, **options) -> tuple[DatasetCard, str]:
    place = write_card(path, CardOptions(**options))
    return DatasetCard.load(place), place.read_text(encoding="utf-8")


def test_the_metadata_match_the_schema_of_the_hub(run: Path) -> None:
    data = written(run / "dataset", licence=Licence("cc-by-4.0"), repo="user/pairs")[0].data
    assert (data.license, data.pretty_name) == ("cc-by-4.0", "pairs")
    assert (data.task_categories, data.size_categories) == (["image-text-to-text"], ["n<1K"])
    assert data.annotations_creators == ["machine-generated"]
    assert data.configs == [
        {
            "config_name": "default",
            "data_files": [{"split": "train", "path": "dataset.parquet"}],
        }
    ]
    # as the library itself would write them
    expected = datasets.Features.from_dict(FEATURES)._to_yaml_list()
    assert data.dataset_info["features"] == expected


def test_the_folder_loads_with_datasets_through_its_card(run: Path, tmp_path: Path) -> None:
    """The library reads the metadata of the card when it loads a folder, and holds the rows to
    them.
    """
    counts = json.loads((run / "dataset" / "funnel.json").read_text())
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "dataset.parquet").write_bytes((run / "dataset" / "dataset.parquet").read_bytes())
    write_card(folder, CardOptions())
    rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == counts["accepted"]
    assert rows[0]["images"][0].size == (96, 96)
    assert rows.features["rejected_images"] == datasets.List(datasets.Image())


def test_the_dataset_card_states_how_the_pairs_were_made(run: Path) -> None:
    text = written(run / "dataset")[1]
    counts = json.loads((run / "dataset" / "funnel.json").read_text())
    for part in (
        f"{counts['accepted']} preference pairs",
        f"replaced by `[MASK]` (rows: rule {counts['accepted']})",
        "The 10 nearest other images",
        "(encoder: vision path of the model)",
        "`base` (transformers, greedy) filled the masks",
        "less than 0.33 or more than 3 times",
        "if it changed a word that was not masked",
        "(lexical) was 0.95 or more.",
        f"| in the source | {counts['rows']} |",
        f"| accepted | {counts['accepted']} |",
        "come from the source (`train.jsonl`)",
    ):
        assert part in text
    for reason, count in counts["refused_candidates"].items():
        assert f"| refused: {reason} | {count} |" in text
    assert str(run.parent) not in text


def test_the_card_of_rows_of_unknown_origin_states_no_origin(tmp_path: Path, records) -> None:
    write_parquet(records(4), tmp_path / "own" / "dataset.parquet")
    card, text = written(tmp_path / "own")
    assert "The folder does not record how." in text
    assert "written by a model" not in text
    assert card.data.annotations_creators is None
    assert "license" not in card.data.to_dict()


def test_row_text_cannot_close_its_code_block(tmp_path: Path, records) -> None:
    from dataclasses import replace

    (row,) = records(1)
    wild = replace(row, rejected="```\n<script>alert(1)</script>\n---\nlicense: mit\n---\n|")
    write_parquet([wild], tmp_path / "dataset.parquet")
    card, text = written(tmp_path)
    assert "license" not in card.data.to_dict()
    assert text.count("\n```") == 6  # three blocks, opened and closed


def test_pairs_without_a_second_image_are_counted(tmp_path: Path, records) -> None:
    from dataclasses import replace

    rows = [replace(row, rejected_images=()) if i < 3 else row for i, row in enumerate(records(5))]
    write_parquet(rows, tmp_path / "dataset.parquet")
    assert "and in 2 of them a retrieved image" in " ".join(written(tmp_path)[1].split())


@pytest.mark.parametrize(
    ("rows", "category"),
    [(999, "n<1K"), (1000, "1K<n<10K"), (11_000, "10K<n<100K"), (10**9, "100M<n<1B")],
)
def test_size_categories_are_those_of_the_hub(rows: int, category: str) -> None:
    assert size_category(rows) == category


@pytest.mark.parametrize(
    ("option", "flag"), [("--base-model", "base-model"), ("--dataset", "dataset")]
)
def test_model_options_are_refused_for_a_dataset(option: str, flag: str, run: Path) -> None:
    result = CliRunner().invoke(app, ["card", str(run / "dataset"), option, "user/name"])
    assert result.exit_code == 2
    assert f"{flag} must not be set for a dataset, got user/name. Drop --{flag}." in result.output


def test_a_dataset_without_rows_is_refused(tmp_path: Path) -> None:
    write_parquet([], tmp_path / "dataset.parquet")
    with pytest.raises(RefusedError, match="must have at least one row"):
        write_card(tmp_path, CardOptions())
