"""ms-swift, LLaMA-Factory and TRL. The first two are not installed: their files are held against
the keys that their documentation names. TRL trains.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from realign.data.dataset import read_records
from realign.data.export.run import export
from realign.data.formats.parquet import write_parquet
from realign.data.formats.read_source import read_source


@pytest.fixture
def data(tmp_path: Path, built) -> Path:
    """The built records and one without an image pair."""
    alone = dataclasses.replace(built[0], id="alone", rejected_images=())
    write_parquet([*built, alone], tmp_path / "d.parquet")
    return tmp_path / "d.parquet"


def digests(folder: Path, names: list[str]) -> list[str]:
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]


def test_ms_swift_export_has_one_row_per_pair(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = export(data, None, "ms-swift", out)
    rows = [json.loads(line) for line in (out / "data.jsonl").read_text().splitlines()]
    assert result.counts == {
        "rows read": 5,
        "rows written": 9,
        "answer pairs": 5,
        "image pairs": 4,
        "rows without an image pair": 1,
        "images written": 8,
        "images renamed": 4,
    }
    records = read_records(data, None)
    for record in records:
        answer, *image = [row for row in rows if row["id"] == record.id]
        assert answer.keys() == {"id", "messages", "images", "rejected_response"}
        first, *others = record.prompt
        assert answer["messages"] == [
            {"role": "user", "content": f"<image>{first['content']}"},
            *others,
            {"role": "assistant", "content": record.chosen},
        ]
        assert answer["rejected_response"] == record.rejected
        assert digests(out, answer["images"]) == [
            hashlib.sha256(raw).hexdigest() for raw in record.images
        ]
        assert len(image) == len(record.rejected_images)
        for row in image:
            assert row.keys() == {"id", "messages", "images", "rejected_images"}
            assert (row["messages"], row["images"]) == (answer["messages"], answer["images"])
            assert digests(out, row["rejected_images"]) == [
                hashlib.sha256(raw).hexdigest() for raw in record.rejected_images
            ]


def test_llamafactory_export_has_the_answer_pairs(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = export(data, None, "llamafactory", out)
    descriptions = json.loads((out / "dataset_info.json").read_text())
    description = descriptions["realign"]
    assert descriptions["realign_rdpo"] == {
        **description,
        "file_name": "rdpo.jsonl",
        "formatting": "rdpo",
    }
    assert description == {
        "file_name": "data.json",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {
            "messages": "conversations",
            "chosen": "chosen",
            "rejected": "rejected",
            "images": "images",
        },
    }
    rows = json.loads((out / description["file_name"]).read_text())
    assert result.counts["image pairs, in rdpo.jsonl alone"] == 4
    assert "answer pairs alone: LLaMA-Factory has no image pair" in result.note
    for row, record in zip(rows, read_records(data, None), strict=True):
        assert row["chosen"] == {"from": "gpt", "value": record.chosen}
        assert row["rejected"] == {"from": "gpt", "value": record.rejected}
        senders = [turn["from"] for turn in row["conversations"]]
        assert senders == (["human", "gpt"] * 3)[: len(record.prompt)]
        texts = "".join(turn["value"] for turn in row["conversations"])
        assert texts.count("<image>") == len(row["images"]) == 1
        assert texts.startswith("<image>")
        assert digests(out, row["images"]) == [hashlib.sha256(record.images[0]).hexdigest()]


@pytest.mark.parametrize(
    ("to", "file"), [("ms-swift", "data.jsonl"), ("llamafactory", "data.json")]
)
def test_exported_files_are_read_as_a_build_source(
    data: Path, tmp_path: Path, to: str, file: str
) -> None:
    export(data, None, to, tmp_path / "out")
    source = read_source(tmp_path / "out" / file, tmp_path / "out")
    assert (source.format, source.problems) == (to, [])
    pairs = [(row.id, row.prompt, row.answer, row.rejected) for row in source.rows]
    records = read_records(data, None)
    assert pairs == [(row.id, row.prompt, row.chosen, row.rejected) for row in records]


def test_a_row_without_an_image_has_no_placeholder(tmp_path: Path, built) -> None:
    text_only = dataclasses.replace(built[0], images=(), rejected_images=())
    write_parquet([text_only], tmp_path / "d.parquet")
    export(tmp_path / "d.parquet", None, "llamafactory", tmp_path / "lf")
    (row,) = json.loads((tmp_path / "lf" / "data.json").read_text())
    assert row["images"] == []
    assert row["conversations"] == [{"from": "human", "value": built[0].prompt[0]["content"]}]


TRAIN = """
import sys
from datasets import load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer

data, model, out = sys.argv[1:]
dataset = load_dataset("parquet", data_files=data, split="train", cache_dir=out + "/cache")
config = DPOConfig(
    output_dir=out, max_steps=2, per_device_train_batch_size=2, max_length=None, use_cpu=True,
    bf16=False, logging_steps=1, save_strategy="no", report_to=[], learning_rate=1e-3,
)
trainer = DPOTrainer(
    AutoModelForImageTextToText.from_pretrained(model), args=config, train_dataset=dataset,
    processing_class=AutoProcessor.from_pretrained(model),
)
trainer.train()
import json
print(json.dumps([line for line in trainer.state.log_history if "loss" in line]))
"""


@pytest.mark.full
def test_trl_trains_on_the_exported_parquet_unchanged(
    tmp_path: Path, records, model_dir: Path
) -> None:
    """No column renamed or removed: the file goes into DPOTrainer as `realign` wrote it. In a
    process of its own: TRL's warnings are not ours.
    """
    write_parquet(records(4), tmp_path / "d.parquet")
    export(tmp_path / "d.parquet", None, "trl", tmp_path / "out")
    file = tmp_path / "out" / "dataset.parquet"
    assert file.read_bytes() == (tmp_path / "d.parquet").read_bytes()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(file), str(model_dir), str(tmp_path / "trl")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = json.loads(done.stdout.splitlines()[-1])
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)  # the policy is the reference
    assert second["loss"] != first["loss"]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-3)
