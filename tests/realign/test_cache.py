"""The reference cache: found by content, refused when of something else, continued after a stop."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import SiglipImageProcessorPil

from realign.cache import build_cache, identity_folder, read_cache, reference_identity
from realign.collate import PreferenceCollator
from realign.errors import RefusedError
from realign.modeling import load_model, load_processor

OPTIONS = {"cells": 3, "rejected_scoring": "label", "dtype": torch.float32}


def build(records, folder: Path, root: Path, **options) -> Path:
    return build_cache(
        records, folder, root, **{**OPTIONS, "batch_size": 2, "shard_size": 4, **options}
    )


def identity(folder: Path, **options):
    return reference_identity(folder, **{**OPTIONS, **options})


@pytest.fixture
def model_copy(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def test_values_are_the_models_own_log_probabilities(tmp_path: Path, model_dir, records) -> None:
    rows = records(3)
    build(rows, model_dir, tmp_path)
    cached = read_cache(tmp_path, rows, identity(model_dir))
    model = load_model(model_dir, torch.float32).double().eval()
    collator = PreferenceCollator(load_processor(model_dir), cells=3)
    for row in rows:
        batch = collator([row])
        pixels = batch["pixel_values"][list(batch["images"].rows)].double()
        with torch.no_grad():
            logits = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                pixel_values=pixels,
            ).logits
        logps = logits.log_softmax(-1).flatten(0, 1)
        scored = logps[batch["answer_index"], batch["answer_labels"]]
        sums = torch.zeros(3, dtype=torch.float64).index_add(0, batch["sequence_ids"], scored)
        torch.testing.assert_close(cached[row.key], sums, atol=1e-4, rtol=1e-6)


def test_order_filtering_and_repetition_do_not_matter(tmp_path: Path, model_dir, records) -> None:
    rows = records(6)
    build([*rows, rows[0]], model_dir, tmp_path)
    whole = read_cache(tmp_path, rows, identity(model_dir))
    some = [rows[4], rows[1], rows[4]]
    part = read_cache(tmp_path, some, identity(model_dir))
    assert part.keys() == {row.key for row in some}
    assert all(torch.equal(part[key], whole[key]) for key in part)


def test_an_edited_or_new_row_is_missed_by_name(tmp_path: Path, model_dir, records) -> None:
    rows = records(2)
    build(rows, model_dir, tmp_path)
    edited = dataclasses.replace(rows[1], chosen=rows[1].chosen + "!")
    with pytest.raises(RefusedError, match=r"lacks 1 of 2 rows, first: row r1\. .*edited"):
        read_cache(tmp_path, [rows[0], edited], identity(model_dir))


def test_a_stopped_build_continues_to_the_same_bytes(tmp_path: Path, model_dir, records) -> None:
    rows = records(10)
    whole = build(rows, model_dir, tmp_path / "whole")
    stopped = identity_folder(tmp_path / "stopped", identity(model_dir))
    (stopped / "shards").mkdir(parents=True)
    shutil.copy(whole / "shards" / "00000.safetensors", stopped / "shards")
    with pytest.raises(RefusedError, match="it is unfinished"):
        read_cache(tmp_path / "stopped", rows, identity(model_dir))
    build(rows, model_dir, tmp_path / "stopped")
    names = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert len(names) == 5  # identity, manifest, three shards
    for name in names:
        assert (whole / name).read_bytes() == (stopped / name).read_bytes(), name


def test_more_rows_are_added_and_old_ones_kept(tmp_path: Path, model_dir, records) -> None:
    rows = records(6)
    place = build(rows[:4], model_dir, tmp_path)
    first = (place / "shards" / "00000.safetensors").read_bytes()
    build(rows, model_dir, tmp_path)
    assert (place / "shards" / "00000.safetensors").read_bytes() == first
    assert len(load_file(place / "shards" / "00001.safetensors")["key"]) == 2
    assert len(read_cache(tmp_path, rows, identity(model_dir))) == 6


def test_another_model_is_refused_by_the_file_that_differs(
    tmp_path: Path, model_copy, records
) -> None:
    rows = records(2)
    build(rows, model_copy, tmp_path / "cache")
    for name in ("model.safetensors", "config.json", "chat_template.jinja", "tokenizer.json"):
        before = (model_copy / name).read_bytes()
        (model_copy / name).write_bytes(before + b"\n")
        with pytest.raises(RefusedError, match=rf"something else.\n  semantics.files.{name}: cach"):
            read_cache(tmp_path / "cache", rows, identity(model_copy))
        (model_copy / name).write_bytes(before)
    assert read_cache(tmp_path / "cache", rows, identity(model_copy))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"cells": 4}, "semantics.cells: cached 3, needed 4"),
        ({"rejected_scoring": "top_non_label"}, "semantics.rejected_scoring: cached label"),
        ({"dtype": torch.bfloat16}, "numerics.dtype: cached float32, needed bfloat16"),
    ],
)
def test_other_scoring_or_numerics_are_refused(
    tmp_path: Path, model_dir, records, options, field: str
) -> None:
    rows = records(1)
    build(rows, model_dir, tmp_path)
    with pytest.raises(RefusedError, match=field):
        read_cache(tmp_path, rows, identity(model_dir, **options))


def processor_with_other_images(folder: str | Path):
    processor = load_processor(folder)
    processor.image_processor = SiglipImageProcessorPil()
    return processor


VERSION = "realign.numerics.version"
NUMERICS = {
    "GPU": ("torch.cuda.get_device_name", lambda: "H200", "device: cached cpu, needed H200"),
    "Pillow": (VERSION, lambda name: "0", r"packages\.pillow: cached .*, needed 0"),
    "peft": (VERSION, lambda name: "0", r"packages\.peft: cached .*, needed 0"),
    "image processor": ("realign.cache.load_processor", processor_with_other_images,
                        "image_processor: cached CLIPImageProcessor.*, needed Siglip"),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMERICS)
def test_another_machine_is_refused_by_what_differs(
    name: str, tmp_path: Path, model_dir, records, monkeypatch
) -> None:
    rows = records(1)
    build(rows, model_dir, tmp_path)
    target, value, message = NUMERICS[name]
    if name == "GPU":
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(target, value)
    with pytest.raises(RefusedError, match=rf"numerics\.{message}"):
        read_cache(tmp_path, rows, identity(model_dir))


def test_float32_products_of_another_precision_are_refused(
    tmp_path: Path, model_dir, records
) -> None:
    rows = records(1)
    build(rows, model_dir, tmp_path)
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(
            RefusedError, match=r"numerics\.float32\.matmul: cached .*, needed tf32"
        ):
            read_cache(tmp_path, rows, identity(model_dir))
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def test_any_changed_bit_of_a_shard_is_found(tmp_path: Path, model_dir, records) -> None:
    rows = records(4)
    place = build(rows, model_dir, tmp_path)
    shard = place / "shards" / "00000.safetensors"
    good = shard.read_bytes()
    rng = random.Random(0)
    for _ in range(40):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        shard.write_bytes(bad)
        with pytest.raises(RefusedError, match="was changed after it was written"):
            read_cache(tmp_path, rows, identity(model_dir))
    shard.unlink()
    with pytest.raises(RefusedError, match=r"lacks shard 00000\.safetensors"):
        read_cache(tmp_path, rows, identity(model_dir))


def test_the_printed_folder_is_a_cache_too(tmp_path: Path, model_dir, records) -> None:
    rows = records(2)
    place = build(rows, model_dir, tmp_path)
    whole = read_cache(tmp_path, rows, identity(model_dir))
    printed = read_cache(place, rows, identity(model_dir))
    assert printed.keys() == whole.keys()
    build(rows, model_dir, tmp_path, cells=4)  # beside it; not what was given
    with pytest.raises(
        RefusedError,
        match=r"it was computed from something else\.\n  semantics\.cells: cached 3",
    ):
        read_cache(place, rows, identity(model_dir, cells=4))
    (place / "manifest.json").unlink()
    with pytest.raises(RefusedError, match="it is unfinished"):
        read_cache(place, rows, identity(model_dir))


def test_a_folder_that_does_not_exist_says_so(tmp_path: Path, model_dir, records) -> None:
    with pytest.raises(RefusedError, match=r"got .*none, which does not exist\. Check --cache"):
        read_cache(tmp_path / "none", records(1), identity(model_dir))


def test_an_empty_folder_says_so(tmp_path: Path, model_dir, records) -> None:
    with pytest.raises(RefusedError, match=r"it is empty\.\nRun `realign cache`"):
        read_cache(tmp_path, records(1), identity(model_dir))


def test_a_log_probability_that_is_not_finite_is_never_stored(
    tmp_path: Path, model_copy, records
) -> None:
    from safetensors.torch import save_file

    weights = load_file(model_copy / "model.safetensors")
    name = next(name for name in weights if name.endswith("norm.weight"))
    weights[name] = torch.full_like(weights[name], torch.nan)
    save_file(weights, model_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FloatingPointError, match="reference log-probabilities of row r0 are not"):
        build(records(2), model_copy, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_identity_is_readable_json(tmp_path: Path, model_dir, records) -> None:
    place = build(records(1), model_dir, tmp_path)
    stored = json.loads((place / "identity.json").read_text())
    assert stored == identity(model_dir)
    assert set(stored["numerics"]) == {
        "dtype", "attention", "image_processor", "device", "float32", "packages"
    }  # fmt: skip
    assert not list(place.rglob(".*"))  # no temporary file is left


def test_a_deleted_shard_is_computed_again_and_no_other_is_replaced(
    tmp_path: Path, model_dir, records
) -> None:
    rows = records(10)
    place = build(rows, model_dir, tmp_path)
    whole = read_cache(tmp_path, rows, identity(model_dir))
    (place / "shards" / "00000.safetensors").unlink()
    (place / "manifest.json").unlink()
    build(rows, model_dir, tmp_path)
    repaired = read_cache(tmp_path, rows, identity(model_dir))
    assert all(torch.equal(repaired[key], whole[key]) for key in whole)
    assert json.loads((place / "manifest.json").read_text())["rows"] == 10
