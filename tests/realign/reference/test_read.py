"""A cache of the embedded model: its values are the model's, found by content, and refused when of
something else.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from realign.data.dataset import read_records
from realign.errors import RefusedError
from realign.modeling.collate import PreferenceCollator
from realign.modeling.loading import load_model
from realign.modeling.processors import load_processor
from realign.reference import build_cache, identity_folder, read_cache
from tests.realign.reference.scorings import identity, scoring


def build(records, folder: Path, root: Path, shard_size: int = 4, **options) -> Path:
    made = scoring(folder, **{"batch_size": 2, **options})
    return build_cache(records, made, root, shard_size=shard_size)


@pytest.fixture
def model_copy(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def test_cached_values_equal_the_log_probabilities_of_the_model(
    tmp_path: Path, model_dir, records
) -> None:
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


def test_row_order_filtering_and_repetition_do_not_change_values(
    tmp_path: Path, model_dir, records
) -> None:
    rows = records(6)
    build([*rows, rows[0]], model_dir, tmp_path)
    whole = read_cache(tmp_path, rows, identity(model_dir))
    some = [rows[4], rows[1], rows[4]]
    part = read_cache(tmp_path, some, identity(model_dir))
    assert part.keys() == {row.key for row in some}
    assert all(torch.equal(part[key], whole[key]) for key in part)


def test_edited_and_new_rows_are_reported_as_missing_by_name(
    tmp_path: Path, model_dir, records
) -> None:
    rows = records(2)
    build(rows, model_dir, tmp_path)
    edited = dataclasses.replace(rows[1], chosen=rows[1].chosen + "!")
    with pytest.raises(RefusedError, match=r"lacks 1 of 2 rows, first: row r1\. .*edited"):
        read_cache(tmp_path, [rows[0], edited], identity(model_dir))


def test_a_later_build_adds_rows_and_keeps_old_ones(tmp_path: Path, model_dir, records) -> None:
    rows = records(6)
    place = build(rows[:4], model_dir, tmp_path)
    (first,) = place.glob("shards/*")
    before = first.read_bytes()
    build(rows, model_dir, tmp_path)
    assert first.read_bytes() == before
    (second,) = place.glob("shards/00001-*")
    assert len(load_file(second)["key"]) == 2
    assert len(read_cache(tmp_path, rows, identity(model_dir))) == 6


def test_a_replaced_image_file_makes_its_row_missing(tmp_path: Path, model_dir, records) -> None:
    """The new file has the same name, size and time."""
    folder = tmp_path / "images"
    folder.mkdir()
    row = records(1)[0]
    (folder / "a.png").write_bytes(row.images[0])
    (folder / "b.png").write_bytes(row.rejected_images[0])
    turn = {"role": "user", "content": f"<image>\n{row.prompt[0]['content']}"}
    answers = {
        name: [turn, {"role": "assistant", "content": getattr(row, name)}]
        for name in ("chosen", "rejected")
    }
    names = {"image": "a.png", "retrieved_image": "b.png"}
    data = tmp_path / "data.json"
    data.write_text(json.dumps([names | answers]))
    build(read_records(data, folder), model_dir, tmp_path / "cache")
    times = os.stat(folder / "b.png")
    changed = bytearray(row.rejected_images[0])
    changed[-1] ^= 1  # the checksum of PNG's last chunk, which no decoder looks at
    (folder / "b.png").write_bytes(changed)
    os.utime(folder / "b.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(RefusedError, match="lacks 1 of 1 rows"):
        read_cache(tmp_path / "cache", read_records(data, folder), identity(model_dir))


def test_the_identity_folder_is_accepted_as_a_cache(tmp_path: Path, model_dir, records) -> None:
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


def test_a_missing_cache_folder_is_refused(tmp_path: Path, model_dir, records) -> None:
    with pytest.raises(RefusedError, match=r"got .*none, which does not exist\. Check --cache"):
        read_cache(tmp_path / "none", records(1), identity(model_dir))


def test_an_empty_cache_folder_is_refused(tmp_path: Path, model_dir, records) -> None:
    with pytest.raises(RefusedError, match=r"it is empty\.\nRun `realign cache`"):
        read_cache(tmp_path, records(1), identity(model_dir))


def test_a_non_finite_log_probability_is_not_stored(tmp_path: Path, model_copy, records) -> None:
    weights = load_file(model_copy / "model.safetensors")
    name = next(name for name in weights if name.endswith("norm.weight"))
    weights[name] = torch.full_like(weights[name], torch.nan)
    save_file(weights, model_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FloatingPointError, match=r"of row r0 must be finite, got .*nan"):
        build(records(2), model_copy, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_cache_has_the_files_that_the_documentation_lists(
    tmp_path: Path, model_dir, records
) -> None:
    place = build(records(10), model_dir, tmp_path)
    assert place == identity_folder(tmp_path, identity(model_dir))
    names = sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())
    assert [name.partition("-")[0] for name in names] == [
        "build.lock", "identity.json", "manifest.json", "shards/00000", "shards/00001",
        "shards/00002",
    ]  # fmt: skip
    assert json.loads((place / "identity.json").read_text()) == identity(model_dir)
    assert json.loads((place / "manifest.json").read_text())["rows"] == 10


def test_values_do_not_depend_on_the_shard_size(tmp_path: Path, model_dir, records) -> None:
    rows = records(9)
    references = []
    for size in (2, 5, 100):  # 5 is rounded up to whole batches
        build(rows, model_dir, tmp_path / str(size), batch_size=2, shard_size=size)
        references.append(read_cache(tmp_path / str(size), rows, identity(model_dir)))
    for other in references[1:]:
        assert all(torch.equal(other[key], references[0][key]) for key in references[0])
