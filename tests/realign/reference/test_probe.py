"""The probe of a build, accepting other numerics, and what training compares while it runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from realign.config import CacheConfig, TrainConfig
from realign.data.formats.parquet import write_parquet
from realign.errors import RefusedError
from realign.modeling.collate import PreferenceCollator
from realign.modeling.loading import load_model
from realign.modeling.processors import load_processor
from realign.reference import build_cache, read_cache
from realign.reference.probe import probe_rows
from realign.reference.run import cache
from realign.reference.store import read_committed
from realign.training.run import train
from realign_kernels import Objective
from tests.realign.reference.scorings import identity, scoring


def build(records, folder: Path, root: Path, shard_size: int = 8, **options) -> Path:
    return build_cache(records, scoring(folder, **options), root, shard_size=shard_size)


def scorer(folder: Path, **options):
    return scoring(folder, **options).load


def test_the_probed_rows_do_not_depend_on_the_row_order() -> None:
    keys = [f"{number:064x}" for number in range(200)]
    chosen = probe_rows(keys)
    assert len({*chosen}) == 64
    assert probe_rows(keys[::-1]) == chosen
    assert probe_rows(keys[:5]) == keys[:5]


def test_the_probe_measures_the_variance_by_batch_and_layout(tmp_path, model_dir, records) -> None:
    rows = records(24)
    place = build(rows, model_dir, tmp_path)
    reference = read_cache(tmp_path, rows, identity(model_dir))
    score_alone = scorer(model_dir)().score_alone
    alone = np.concatenate([score_alone(row).logps for row in rows])
    off = np.abs(alone - np.stack([reference[row.key].numpy() for row in rows]))
    assert reference.variance.rows == 24
    assert reference.variance.rms == pytest.approx(np.sqrt((off**2).mean(0)), abs=1e-12)
    assert reference.variance.max == pytest.approx(off.max(0), abs=1e-12)
    assert 0 < reference.batch_variance == max(reference.variance.rms) < 1e-4
    assert json.loads((place / "manifest.json").read_text())["probe"]["rows"] == 24


def test_a_layout_that_changes_the_values_of_a_model_is_refused(
    tmp_path: Path, synthetic, monkeypatch
) -> None:
    class Wrong(synthetic.Scoring):
        def score_alone(self, record):
            rows = super().score_alone(record)
            rows.logps[0, 1] += 2e-4 + 1e-6 * abs(rows.logps[0, 1])
            return rows

    rows = synthetic.rows(8)
    shared = json.loads(json.dumps(synthetic.identity))
    shared["numerics"]["rows"] = "shared prefix"
    with pytest.raises(
        RefusedError,
        match=r"8 of 8 probed rows must have the same .*\(shared prefix\), first: row t.*, cell 1, "
        r"got .* alone, more than 0\.0001 \+ 1e-06 of .* set cache\.shared_prefix and train\.",
    ):
        synthetic.build(rows, tmp_path, identity=shared, scoring=Wrong())
    with pytest.raises(RefusedError, match="it is unfinished"):
        read_cache(tmp_path, rows, shared)  # it never opens as valid
    bfloat16 = json.loads(json.dumps(shared))
    bfloat16["numerics"]["dtype"] = "bfloat16"
    synthetic.build(rows, tmp_path, identity=bfloat16, scoring=Wrong())
    assert read_cache(tmp_path, rows, bfloat16).batch_variance > 2e-4


def test_other_numerics_are_accepted_only_if_the_probe_agrees(tmp_path, model_dir, records) -> None:
    rows = records(6)
    build(rows, model_dir, tmp_path, shared_prefix=False)
    needed = identity(model_dir)
    with pytest.raises(
        RefusedError, match=r"cached separate, needed shared prefix\n.*Only the num"
    ):
        read_cache(tmp_path, rows, needed)
    reference = read_cache(tmp_path, rows, needed, accepting=scorer(model_dir))
    accepted = reference.acceptance
    assert accepted["rows"] == 6
    assert "rows: cached separate, needed shared prefix" in accepted["differences"]
    assert accepted["max_difference_nats"] <= accepted["tolerance_nats"] < 1e-3
    other = identity(model_dir, rejected_scoring="top_non_label")
    with pytest.raises(RefusedError, match=r"semantics\.rejected_scoring"):  # never other semantics
        read_cache(tmp_path, rows, other, accepting=scorer(model_dir))


def test_accept_numerics_does_not_accept_differing_values(
    tmp_path: Path, model_dir, records, synthetic
) -> None:
    rows = records(3)
    other = identity(model_dir, shared_prefix=False)
    synthetic.build(rows, tmp_path, identity=other)  # what no model said
    with pytest.raises(
        RefusedError, match=r"3 of 3 rows must have the cached log-probabilities here too, first: "
    ):
        read_cache(tmp_path, rows, identity(model_dir), accepting=scorer(model_dir))


def test_accepted_numerics_are_recorded_in_the_run(tmp_path: Path, model_dir, records) -> None:
    data = tmp_path / "data.parquet"
    write_parquet(records(4), data)
    options = {"model": str(model_dir), "data": data}
    cache(CacheConfig(**options, out=tmp_path / "cache", shared_prefix=False))
    run = {**options, "out": tmp_path / "run", "cache": tmp_path / "cache"}
    with pytest.raises(RefusedError, match="--accept-numerics uses it if 64 rows"):
        train(TrainConfig(**run))
    train(TrainConfig(**run, accept_numerics=True))
    accepted = json.loads((tmp_path / "run" / "accepted_numerics.json").read_text())
    assert accepted["rows"] == 4
    assert accepted["differences"]


def test_a_cached_reference_gives_the_loss_of_a_live_one(tmp_path, model_dir, records) -> None:
    rows = records(6)
    build(rows, model_dir, tmp_path, batch_size=3)
    reference = read_cache(tmp_path, rows, identity(model_dir))
    policy = load_model(model_dir, torch.float32)
    objective = Objective.rdpo(0.1)
    with torch.no_grad():
        for weight in policy.lm_head.parameters():
            weight.mul_(1.05)
        batch = PreferenceCollator(
            load_processor(model_dir), 3, reference, shared_prefix=True
        )(rows)  # fmt: skip
        del batch["ids"]
        cached = policy(**batch, objective=objective)
        live = {k: v for k, v in batch.items() if k != "ref_logps"}
        live["ref_logps"] = load_model(model_dir, torch.float32)(**live).logps
        online = policy(**live, objective=objective)
    assert abs(cached.loss - online.loss) < 1e-6
    assert abs(online.loss - 2 * np.log(2)) > 1e-3  # and it is a loss of something


def test_bfloat16_margins_are_within_the_recorded_variance(tmp_path, model_dir, records) -> None:
    rows = records(8)
    build(rows, model_dir, tmp_path, dtype=torch.bfloat16, batch_size=2)
    reference = read_cache(tmp_path, rows, identity(model_dir, dtype=torch.bfloat16))
    model = load_model(model_dir, torch.bfloat16)
    collator = PreferenceCollator(load_processor(model_dir), 3, reference, shared_prefix=True)
    with torch.no_grad():
        batch = collator(rows)
        del batch["ids"]
        output = model(**batch, objective=Objective.rdpo(1.0))
    largest = reference.variance.max
    assert max(largest) > 1e-3
    assert output.text_margins.abs().max() <= 2 * (largest[0] + largest[1])
    assert output.image_margins.abs().max() <= 2 * (largest[0] + largest[2])


def test_rows_are_checked_while_they_are_collated(tmp_path: Path, model_dir, records) -> None:
    rows = records(3)
    build(rows, model_dir, tmp_path)
    reference = read_cache(tmp_path, rows, identity(model_dir))

    def collate(processor, cells: int = 3, **options) -> None:
        PreferenceCollator(processor, cells, watch=reference.check_inputs, **options)(rows)

    for cells in (1, 2, 3):
        for shared in (True, False):
            collate(load_processor(model_dir), cells, shared_prefix=shared)
    processor = load_processor(model_dir)
    processor.chat_template = processor.chat_template.replace("USER", "Human")
    assert processor.chat_template != load_processor(model_dir).chat_template
    with pytest.raises(RefusedError, match=r"^row r0: the tokens or labels of its chosen are not"):
        collate(processor)
    processor = load_processor(model_dir)
    processor.image_processor.image_mean = [0.5, 0.5, 0.499]
    with pytest.raises(RefusedError, match=r"^row r0: the pixels of its original image are not"):
        collate(processor)
    reference.acceptance = {}  # another machine's decoder may differ in the last bit
    collate(processor)


def test_pixels_are_compared_for_one_row_in_256(tmp_path: Path, synthetic) -> None:
    class WithoutPixels(synthetic.Scoring):
        def score(self, records):
            rows = super().score(records)
            return dataclasses.replace(rows, pixel_digest=np.zeros_like(rows.pixel_digest))

    rows = synthetic.rows(600)
    scoring = WithoutPixels(batch_size=8)
    place = synthetic.build(rows, tmp_path, scoring=scoring, shard_size=512)
    has_digest = read_committed(place).rows.pixel_digest[:, 0].any(axis=1)
    assert np.flatnonzero(has_digest).tolist() == [0, 256, 512]


def test_training_stops_at_a_row_with_changed_inputs(
    tmp_path: Path, model_dir, records, monkeypatch
) -> None:
    import realign.modeling.chat_template

    data = tmp_path / "data.parquet"
    write_parquet(records(2), data)
    options = {"model": str(model_dir), "data": data}
    cache(CacheConfig(**options, out=tmp_path / "cache"))
    render = realign.modeling.chat_template.Renderer.render

    def other(self, prompt, answer, num_images, where):  # such as a tokenizer that was patched
        row = render(self, prompt, answer, num_images, where)
        return dataclasses.replace(row, num_scored=row.num_scored - 1)

    monkeypatch.setattr(realign.modeling.chat_template.Renderer, "render", other)
    with pytest.raises(RefusedError, match="the tokens or labels of its chosen are not those"):
        train(TrainConfig(**options, out=tmp_path / "run", cache=tmp_path / "cache"))
