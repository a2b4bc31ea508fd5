"""Padding is masked and never scored, whichever token a tokenizer has for it, if any."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from realign.cli import app
from realign.data.formats.parquet import write_parquet
from realign.data.records import Record
from realign.generation.generator import Answer, Request
from realign.generation.transformers_generator import TransformersGenerator
from realign.modeling.collate import PreferenceCollator
from realign.modeling.families import process
from realign.modeling.loading import load_model
from realign.modeling.processors import load_processor

NAMED: dict[str, dict[str, Any]] = {
    "none": {"pad_token": None},
    "end of sequence": {"pad_token": "</s>"},
    "outside the embedding": {"pad_token": "[PAD]"},
    "on the left": {"padding_side": "left"},
}


def with_tokenizer(model_dir: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """Copy the embedded model with another tokenizer configuration; None removes a key."""
    shutil.copytree(model_dir, folder)
    file = folder / "tokenizer_config.json"
    kept = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: kept[name] for name in kept if kept[name] is not None}))
    return folder


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Any:
    return load_model(model_dir, torch.float32).eval()


def logps(model: Any, processor: Any, rows: list[Record], *, shared_prefix: bool) -> torch.Tensor:
    batch = PreferenceCollator(processor, 3, shared_prefix=shared_prefix)(rows)
    del batch["ids"]
    with torch.no_grad():
        result: torch.Tensor = model(**batch).logps
    return result


@pytest.mark.parametrize("shared_prefix", [False, True])
@pytest.mark.parametrize("name", NAMED)
def test_log_probs_do_not_depend_on_the_pad_token(
    tmp_path: Path, model_dir: Path, model, records, name: str, shared_prefix: bool
) -> None:
    rows = records(4)
    num_rows = model.get_input_embeddings().weight.shape[0]
    other = load_processor(with_tokenizer(model_dir, tmp_path / "model", NAMED[name]))
    is_outside = (other.tokenizer.pad_token_id or 0) >= num_rows
    assert is_outside == (name == "outside the embedding")
    found, expected = (
        logps(model, processor, rows, shared_prefix=shared_prefix)
        for processor in (other, load_processor(model_dir))
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", NAMED)
def test_batched_answers_equal_single_answers(
    tmp_path: Path, model_dir: Path, model, records, name: str
) -> None:
    processor = load_processor(with_tokenizer(model_dir, tmp_path / "model", NAMED[name]))
    requests = []
    for number, row in enumerate(records(3)):
        (tmp_path / f"{number}.png").write_bytes(row.images[0])
        prompt = row.prompt[0]["content"] + " Yes or no?" * number
        requests.append(Request(prompt, tmp_path / f"{number}.png"))

    def answers(batch_size: int) -> list[Answer]:
        return TransformersGenerator(model, processor, 40, batch_size)(requests)

    found = answers(3)
    assert found == answers(1)
    assert len({answer.text for answer in found}) > 1


def test_a_tokenizer_without_a_pad_token_is_not_modified(tmp_path: Path, model_dir: Path) -> None:
    processor = load_processor(with_tokenizer(model_dir, tmp_path / "model", NAMED["none"]))
    inputs = process(processor, ["a", "a longer text"], None, add_special_tokens=False)
    assert inputs["attention_mask"].sum(1).unique().numel() == 2
    assert processor.tokenizer.pad_token is None
    processor.tokenizer.eos_token = None  # not even that
    process(processor, ["a", "a longer text"], None, add_special_tokens=False)
    assert processor.tokenizer.pad_token is None


def test_every_command_accepts_a_tokenizer_without_a_pad_token(
    tmp_path: Path, model_dir: Path, records
) -> None:
    model = with_tokenizer(model_dir, tmp_path / "model", NAMED["none"])
    rows = records(3)
    write_parquet(rows, tmp_path / "d.parquet")
    (tmp_path / "0.png").write_bytes(rows[0].images[0])
    texts = ["Is there a house in the image?", "Is there a red tree at the top of the image?"]
    questions = [{"image": "0.png", "text": text, "label": "no"} for text in texts]
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    (tmp_path / "pope_random.jsonl").write_text(lines)
    data = ["--data", tmp_path / "d.parquet", "--model", model]
    on_images = ["--data", tmp_path, "--images", tmp_path]
    for command in (
        ["check", *data],
        ["cache", *data, "--out", tmp_path / "cache"],
        ["train", *data, "--out", tmp_path / "shared"],
        ["train", *data, "--out", tmp_path / "separate", "--set", "train.shared_prefix=false"],
        [*("eval", "--model", f"m={model}"), *on_images, "--out", tmp_path / "eval"],
    ):
        result = CliRunner().invoke(app, [*map(str, command)])
        assert result.exit_code == 0, (command, result.output)
    stored = json.loads((tmp_path / "shared/checkpoint/tokenizer_config.json").read_text())
    assert stored.get("pad_token") is None
