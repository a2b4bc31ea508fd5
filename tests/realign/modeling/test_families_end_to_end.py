"""A model folder of every family is loaded, cached, trained and loaded again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from realign.config import LoraSection, TrainConfig
from realign.data.formats.parquet import write_parquet
from realign.data.image_pool import DecodedRow, ImagePool, decoded_rows
from realign.generation.generator import Request
from realign.generation.transformers_generator import TransformersGenerator
from realign.modeling.collate import PreferenceCollator
from realign.modeling.lengths import ImageTokens, RowLengths
from realign.modeling.loading import load_model
from realign.modeling.processors import load_processor
from realign.training.run import train
from tests.realign.modeling.families.pairs import WIDE, all_kinds
from tests.realign.modeling.families.registry import FAMILIES, SEPARATE, SLIDING

ALL = {**FAMILIES, **SLIDING, **SEPARATE}
QUICK = ("llava-1.5", "qwen2.5-vl", "gemma-3")
NAMES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ALL]


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return ALL[request.param]().save(tmp_path / "model")


@pytest.mark.parametrize("folder", NAMES, indirect=True)
@pytest.mark.parametrize(
    "lora",
    [
        pytest.param(LoraSection(r=2, alpha=4), id="lora"),
        pytest.param(None, id="full", marks=pytest.mark.full),
    ],
)
def test_a_model_folder_trains_two_steps_and_loads_again(
    folder: Path, lora: LoraSection | None, tmp_path: Path
) -> None:
    write_parquet(all_kinds(), tmp_path / "data.parquet")
    config = TrainConfig(
        model=str(folder), data=tmp_path / "data.parquet", out=tmp_path / "run", lora=lora,
        batch_size=3, pairs_per_step=3, logging_steps=1, learning_rate=1e-3, warmup_ratio=0,
        gradient_checkpointing=lora is None,
    )  # fmt: skip
    checkpoint = train(config)
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for pair in ("text", "image"):  # policy and cached reference are the same at first
        assert abs(lines[0][f"rewards/{pair}_margins"]) <= 1e-5
    assert abs(lines[1]["rewards/text_margins"]) > 1e-4
    model, processor = load_model(checkpoint, torch.float32), load_processor(checkpoint)
    batch = PreferenceCollator(processor, 3)(all_kinds())
    del batch["ids"]
    assert torch.isfinite(model(**batch).logps).all()


@pytest.mark.parametrize("folder", NAMES, indirect=True)
def test_predicted_lengths_equal_those_of_the_collator(folder: Path) -> None:
    processor = load_processor(folder)
    lengths = RowLengths(processor, {})
    with ImagePool(1) as pool:
        for row in decoded_rows(all_kinds(), pool):
            assert isinstance(row, DecodedRow)
            assert list(lengths.problems(row.record, *row.sizes)) == []
    assert lengths.rows == PreferenceCollator(processor, 3).lengths(all_kinds())


@pytest.mark.parametrize("folder", NAMES, indirect=True)
def test_a_family_answers_about_an_image(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "wide.png").write_bytes(WIDE)
    requests = [Request(text, tmp_path / "wide.png") for text in ("Describe.", "Is it a boat?")]
    generator = TransformersGenerator.load(folder, torch.float32, max_new_tokens=3)
    assert len(generator(requests)) == 2


@pytest.mark.parametrize("folder", NAMES, indirect=True)
def test_a_family_answers_without_an_image(folder: Path) -> None:
    generator = TransformersGenerator.load(folder, torch.float32, max_new_tokens=3)
    short, long = Request("Describe.", None), Request("Is it a boat, or is it a house?", None)
    answers = generator.generate([short, long])
    assert all(answer.num_tokens is not None and answer.num_tokens <= 3 for answer in answers)
    assert generator.generate([short]) == answers[:1]  # whatever is padded beside it
    reader = ImageTokens(generator.processor)
    reader.check(short.prompt, None)
