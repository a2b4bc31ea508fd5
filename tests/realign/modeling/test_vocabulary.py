"""Tokens that the embedding has no row for are found before the model is loaded."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from typer.testing import CliRunner

from realign.building.run import build
from realign.cli import app
from realign.data.dataset import read_records
from realign.data.formats.parquet import write_parquet
from realign.errors import RefusedError
from realign.modeling.collate import PreferenceCollator
from realign.modeling.families import image_token_id
from realign.modeling.preference_forward import attach_preference_forward
from realign.modeling.processors import load_processor
from realign.modeling.row_checks import check_rows
from realign.modeling.vocabulary import Vocabulary
from tests.realign.conftest import build_config
from tests.realign.modeling.families.registry import FAMILIES

WORD = "griffin"


@pytest.fixture
def larger(tmp_path: Path, model_dir: Path) -> Path:
    """The embedded model with a word of its own in the tokenizer, and no row for it."""
    folder = Path(shutil.copytree(model_dir, tmp_path / "model"))
    processor = load_processor(folder)
    rows = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    tokenizer = processor.tokenizer
    tokenizer.add_tokens([f"unused{n}" for n in range(rows - len(tokenizer))] + [WORD])
    assert tokenizer.convert_tokens_to_ids(WORD) == rows
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def rows(records) -> list[Any]:
    """Rows of which one uses the word in an answer and one in the prompt."""
    rows = records(4)
    rows[1] = dataclasses.replace(rows[1], rejected=f"A {WORD} is at the top.")
    prompt = ({"role": "user", "content": f"Where is the {WORD}?"},)
    rows[2] = dataclasses.replace(rows[2], prompt=prompt)
    return rows


def test_every_command_reports_row_token_and_vocabulary_sizes(
    tmp_path: Path, larger: Path, rows
) -> None:
    write_parquet(rows, tmp_path / "d.parquet")
    write_parquet([rows[0], rows[3]], tmp_path / "good.parquet")
    size = json.loads((larger / "config.json").read_text())["text_config"]["vocab_size"]
    message = (
        f"must have tokens below {size}, the number of rows of the model's embedding, got {size} "
        f"({WORD!r}) of a tokenizer with {size + 1} tokens."
    )
    for command, code in (("check", 1), ("cache", 2), ("train", 2)):
        arguments = [command, "--model", larger, "--data", tmp_path / "d.parquet"]
        arguments += ["--out", tmp_path / command]
        result = CliRunner().invoke(app, [*map(str, arguments)])
        assert result.exit_code == code, result.output
        assert f"d.parquet, row r1: rejected {message}" in result.output
        assert f"d.parquet, row r2: prompt {message}" in result.output
        assert "row r0" not in result.output
        assert "row r3" not in result.output
        assert command == "check" or not (tmp_path / command).exists()
    # a tokenizer with more tokens than there are rows is worth a note where no row needs them
    arguments = ["check", "--model", larger, "--data", tmp_path / "good.parquet"]
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert (
        f"the tokenizer has {size + 1} tokens, but the model's embedding has only {size} rows;"
        in result.output
    )
    arguments = ["train", "--model", larger, "--data", tmp_path / "good.parquet"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output


def test_an_unknown_token_in_a_question_is_refused_before_generation(
    tmp_path: Path, larger: Path, rows
) -> None:
    (tmp_path / "0.png").write_bytes(rows[0].images[0])
    questions = [
        {"image": "0.png", "text": f"Is there a {noun}?", "label": "no"} for noun in ("cat", WORD)
    ]
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    (tmp_path / "pope_random.jsonl").write_text(lines)
    arguments = ["eval", "--model", f"m={larger}", "--data", tmp_path, "--images", tmp_path]
    result = CliRunner().invoke(app, [*map(str, arguments), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2, result.output
    assert "1 problem(s) in 2 rows" in result.output
    assert "pope_random.jsonl, line 2, 0.png, model m: text must have tokens below" in result.output
    assert not (tmp_path / "out").exists()


def test_a_source_row_with_an_unknown_token_is_left_out(tmp_path: Path, larger: Path, rows) -> None:
    config = build_config(rows, tmp_path, larger)
    with pytest.raises(
        RefusedError, match=r"^1 of 4 rows .*\nsource.jsonl, line 2: text must have"
    ):
        build(config)
    records = read_records(build(config.model_copy(update={"max_reject": 0.25})), None)
    assert [record.id for record in records] == ["r0", "r2", "r3"]


def with_image_token_outside(name: str) -> tuple[Any, Any]:
    """A family whose image token is the first one beyond the embedding."""
    family = FAMILIES[name]()
    model: Any = family.model
    processor: Any = family.processor
    tokenizer, rows = processor.tokenizer, model.config.get_text_config().vocab_size
    before = tokenizer.convert_ids_to_tokens(image_token_id(processor))
    most = max(tokenizer.get_vocab().values())
    tokenizer.add_tokens([f"<unused{n}>" for n in range(rows - most - 1)])
    tokenizer.add_tokens([AddedToken("<outside>", special=True)])
    index = tokenizer.convert_tokens_to_ids("<outside>")
    assert index == rows
    for holder in (processor, tokenizer):
        for key, value in vars(holder).items():
            if isinstance(value, str):
                setattr(holder, key, value.replace(before, "<outside>"))
    processor.image_token_id = index
    tokenizer.image_token = "<outside>"
    if name == "gemma-3":  # it writes all the tokens of an image
        written = processor.full_image_sequence.replace(before, "<outside>")
        processor.full_image_sequence = written
    model.config.image_token_index = model.config.image_token_id = index
    attach_preference_forward(model)
    return model, processor


@pytest.mark.parametrize(
    ("name", "replaces"),
    [("gemma-3", True), ("paligemma", True), ("llava-1.5", False), ("qwen2.5-vl", False)],
)
def test_an_image_token_outside_the_vocabulary_is_refused_if_it_is_embedded(
    records, name: str, replaces: bool
) -> None:
    model, processor = with_image_token_outside(name)
    rows, vocabulary = records(2), Vocabulary(processor, model.config)
    batch = PreferenceCollator(processor, 3)(rows)
    del batch["ids"]
    assert (batch["input_ids"] == image_token_id(processor)).any()
    if replaces:
        check_rows(rows, processor, cells=3, max_length=None, vocabulary=vocabulary)
        with torch.no_grad():
            assert torch.isfinite(model(**batch).logps).all()
    else:
        with pytest.raises(RefusedError, match=r"row r0: prompt must have .* \('<outside>'\)"):
            check_rows(rows, processor, cells=3, max_length=None, vocabulary=vocabulary)
        with pytest.raises(IndexError, match="index out of range"):
            model(**batch)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_configuration_gives_the_number_of_embedding_rows(name: str) -> None:
    family = FAMILIES[name]()
    rows = family.model.get_input_embeddings().weight.shape[0]
    assert family.model.config.get_text_config().vocab_size == rows
    assert family.model.get_output_embeddings().weight.shape[0] == rows
