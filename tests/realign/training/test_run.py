"""Training on the embedded model: first loss, metrics, trained parts, resuming and refusals."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import math
import os
import re
import shutil
import weakref
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from realign.config import CacheConfig, LoraSection, TrainConfig
from realign.data.formats.parquet import write_parquet
from realign.errors import RefusedError
from realign.modeling.acceleration import Numerics
from realign.modeling.collate import PreferenceCollator
from realign.modeling.loading import load_model
from realign.modeling.processors import load_processor
from realign.reference import Scoring, build_cache
from realign.reference.run import cache
from realign.runtime.run_folder import only_run
from realign.training.policy import load_policy
from realign.training.run import train
from realign.training.trainer import RDPOTrainer

# llava-hf/llava-1.5-7b-hf: nothing ends a turn but a space
LLAVA_1_5_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.fixture
def data(tmp_path: Path, records) -> Path:
    path = tmp_path / "dataset.parquet"
    write_parquet(records(12), path)
    return path


def config(model_dir: Path, data: Path, out: Path, **options) -> TrainConfig:
    return TrainConfig(
        **{
            "model": str(model_dir),
            "data": data,
            "out": out,
            "batch_size": 4,
            "pairs_per_step": 4,
            "learning_rate": 1e-4,
            "logging_steps": 1,
            **options,
        }
    )


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def test_the_facts_of_the_checkpoint_are_written_to_checkpoint_json(
    tmp_path: Path, model_dir, data
) -> None:
    checkpoint = train(config(model_dir, data, tmp_path / "run", epochs=2))
    facts = json.loads((tmp_path / "run" / "checkpoint.json").read_text())
    raw = (checkpoint / "model.safetensors").read_bytes()
    assert facts == {
        "realign": version("realign"),
        "model": str(model_dir),
        "revision": None,
        "data": str(data),
        "pairs": 12,
        "steps": metrics(tmp_path / "run")[-1]["step"],
        "weights": {"model.safetensors": hashlib.sha256(raw).hexdigest()},
    }


def test_rdpo_loss_starts_at_two_log_two_and_falls(tmp_path: Path, model_dir, data) -> None:
    train(config(model_dir, data, tmp_path / "run", epochs=8, learning_rate=3e-4))
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert lines[0]["loss"] == pytest.approx(2 * math.log(2), abs=1e-4)
    for kind in ("text", "image"):
        assert lines[0][f"rewards/{kind}_margins"] == pytest.approx(0, abs=1e-4)
        assert lines[-1][f"rewards/{kind}_margins"] > 0.05
    assert lines[-1]["loss"] < 1.3
    assert lines[-1]["rewards/text_accuracies"] == 1
    # half of the pairs say that an object is absent, which is as true of the retrieved image
    assert lines[-1]["rewards/image_accuracies"] >= 0.5
    expected = {f"{kind}/{cell}" for kind in ("logps", "rewards") for cell in (
        "chosen", "text_rejected", "image_rejected")}  # fmt: skip
    assert expected < set(lines[0])


def test_the_vision_tower_is_frozen_and_the_rest_trains(tmp_path: Path, model_dir, data) -> None:
    before, after = weights(model_dir), weights(train(config(model_dir, data, tmp_path / "run")))
    assert before.keys() == after.keys()
    for name in before:
        moved = not torch.equal(before[name], after[name])
        assert moved != ("vision_tower" in name), name


def test_the_checkpoint_loads_with_the_auto_classes(tmp_path: Path, model_dir, data) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    checkpoint = train(config(model_dir, data, tmp_path / "run"))
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert AutoProcessor.from_pretrained(checkpoint).chat_template
    assert not list(checkpoint.glob("*.bin"))  # no pickle


def test_lora_trains_adapters_outside_the_vision_tower(tmp_path: Path, model_dir, data) -> None:
    lora = LoraSection(r=4, alpha=8)
    out = tmp_path / "run"
    checkpoint = train(config(model_dir, data, out, lora=lora, learning_rate=1e-3, epochs=2))
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    assert adapter
    assert not [name for name in adapter if "vision_tower" in name]
    assert any(t.abs().sum() > 0 for name, t in adapter.items() if "lora_B" in name)
    assert metrics(out)[0]["loss"] == pytest.approx(2 * math.log(2), abs=1e-4)
    assert metrics(out)[-1]["rewards/text_margins"] > 0
    tuned = load_model(checkpoint, torch.float32)  # an adapter folder is a model folder
    assert type(tuned).__name__ == "PeftModel"


@pytest.mark.parametrize(
    ("objective", "first_loss"),
    [
        ("dpo", math.log(2)),
        ("vdpo", math.log(2)),
        pytest.param("mdpo", 3 * math.log(2), marks=pytest.mark.full),
        ("symmetric", 4 * math.log(2)),
    ],
)
def test_each_objective_begins_at_its_known_loss(
    tmp_path: Path, model_dir, data, objective: str, first_loss: float
) -> None:
    train(config(model_dir, data, tmp_path / "run", objective=objective))
    lines = metrics(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(first_loss, abs=1e-4)
    assert ("rewards/image_margins" in lines[0]) == (objective != "dpo")
    assert ("rewards/both_rejected" in lines[0]) == (objective == "symmetric")


@pytest.mark.parametrize("objective", ["dpo", "sft"])
@pytest.mark.parametrize("option", [{"image_weight": 0.5}, {"image_beta": 0.1}], ids=str)
def test_options_that_an_objective_does_not_read_are_refused(
    tmp_path: Path, model_dir, data, objective: str, option: dict[str, float]
) -> None:
    (name,) = option
    with pytest.raises(
        RefusedError, match=rf"^{name} must not be set with objective '{objective}'"
    ):
        train(config(model_dir, data, tmp_path / "run", objective=objective, **option))
    assert not (tmp_path / "run").exists()


def test_the_last_step_is_logged_once_for_any_interval(tmp_path: Path, model_dir, data) -> None:
    for name, interval, steps in (("long", 10, [1, 6]), ("even", 3, [1, 3, 6])):
        train(config(model_dir, data, tmp_path / name, epochs=2, logging_steps=interval))
        assert [line["step"] for line in metrics(tmp_path / name)] == steps


def test_the_nll_is_logged_where_it_has_a_weight(tmp_path: Path, model_dir, data) -> None:
    options = {"batch_size": 12, "pairs_per_step": 12}
    sft = train(config(model_dir, data, tmp_path / "sft", objective="sft", **options)).parent
    both = train(config(model_dir, data, tmp_path / "both", nll_weight=2.0, **options)).parent
    plain = train(config(model_dir, data, tmp_path / "plain", **options)).parent
    (line,) = metrics(sft)
    assert line["nll"] == pytest.approx(line["loss"], abs=1e-6)
    nll = metrics(both)[0]["nll"]
    assert nll == pytest.approx(line["nll"], abs=1e-5)
    assert metrics(both)[0]["loss"] == pytest.approx(2 * math.log(2) + 2 * nll, abs=1e-4)
    assert "nll" not in metrics(plain)[0]


def test_sft_is_the_mean_nll_of_the_chosen_answers(tmp_path, model_dir, data, records) -> None:
    options = {"batch_size": 12, "pairs_per_step": 12, "epochs": 4}
    train(config(model_dir, data, tmp_path / "run", objective="sft", **options))
    lines = metrics(tmp_path / "run")
    collator, model = (
        PreferenceCollator(load_processor(model_dir), cells=1),
        load_model(model_dir, torch.float32),
    )
    means = []
    for row in records(12):
        batch = collator([row])
        inputs = {name: batch[name] for name in ("input_ids", "pixel_values")}
        with torch.no_grad():
            logps = model(**inputs).logits[0].log_softmax(-1)
        means.append(-logps[batch["answer_index"], batch["answer_labels"]].mean().item())
    assert lines[0]["loss"] == pytest.approx(sum(means) / 12, abs=1e-5)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]


def test_top_non_label_scoring_has_its_own_cache_and_starts_at_two_log_two(
    tmp_path: Path, model_dir, data
) -> None:
    out = tmp_path / "run"
    train(config(model_dir, data, out, rejected_scoring="top_non_label"))
    train(config(model_dir, data, tmp_path / "label"))
    authors, paper = metrics(out)[0], metrics(tmp_path / "label")[0]
    assert authors["loss"] == pytest.approx(2 * math.log(2), abs=1e-4)
    assert authors["logps/chosen"] == pytest.approx(paper["logps/chosen"], abs=1e-4)
    assert authors["logps/text_rejected"] != pytest.approx(paper["logps/text_rejected"], abs=0.1)


def test_a_given_cache_is_used_and_never_written(tmp_path: Path, model_dir, data, records) -> None:
    place = build_cache(
        records(12),
        Scoring(model_dir, 3, "label", Numerics(torch.float32), batch_size=4),
        tmp_path / "cache",
    )
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    train(config(model_dir, data, tmp_path / "run", cache=tmp_path / "cache"))
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "run" / "cache").exists()


def test_an_empty_cache_stops_before_training(tmp_path: Path, model_dir, data) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(RefusedError, match="does not fit this run: it is empty"):
        train(config(model_dir, data, tmp_path / "run", cache=tmp_path / "none"))
    assert not (tmp_path / "run" / "steps").exists()


def test_equal_seeds_give_equal_weights(tmp_path: Path, model_dir, data) -> None:
    first, second = (train(config(model_dir, data, tmp_path / name)) for name in "ab")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.mark.parametrize("verb", ["train", "train with a cache", "cache"])
def test_rows_that_are_too_long_are_refused_before_anything_is_written(
    verb: str, tmp_path: Path, model_dir, data, records
) -> None:
    collator = PreferenceCollator(load_processor(model_dir), cells=3)
    lengths = collator.lengths(records(12))
    longest = max(lengths)
    if verb == "train with a cache":
        cache(CacheConfig(model=str(model_dir), data=data, out=tmp_path / "cache"))
    out = tmp_path / "run"

    def run(max_length: int) -> Path:
        if verb == "cache":
            return cache(
                CacheConfig(model=str(model_dir), data=data, out=out, max_length=max_length)
            )
        given = tmp_path / "cache" if verb == "train with a cache" else None
        return train(config(model_dir, data, out, cache=given, max_length=max_length))

    with pytest.raises(
        RefusedError,
        match=rf"^{lengths.count(longest)} of 12 rows are longer than max_length = {longest - 1} "
        rf"tokens: first row r{lengths.index(longest)}, longest row .* with {longest}\. Raise",
    ):
        run(longest - 1)
    assert not out.exists()
    assert run(longest).exists()  # the remedy that the message names
    assert run(longest + 100).exists()  # a limit that nothing reaches is no other run


def test_a_model_without_weights_does_not_claim_the_folder(tmp_path: Path, model_dir, data) -> None:
    broken = Path(shutil.copytree(model_dir, tmp_path / "model"))
    (broken / "model.safetensors").unlink()
    with pytest.raises(RefusedError, match="must hold safetensors weights"):
        train(config(broken, data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_log_lines_that_span_a_checkpoint_are_equal_after_a_resume(
    tmp_path: Path, model_dir, data, monkeypatch
) -> None:
    """The run saves at step 4, stops in step 5 and logs at steps 3 and 6."""
    options = {"save_steps": 4, "logging_steps": 3, "epochs": 3, "learning_rate": 3e-4}
    train(config(model_dir, data, tmp_path / "whole", **options))
    compute_loss = RDPOTrainer.compute_loss

    def stopped(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RDPOTrainer, "compute_loss", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(config(model_dir, data, tmp_path / "stopped", **options))
    train(config(model_dir, data, tmp_path / "stopped", **options))
    assert [line["step"] for line in metrics(tmp_path / "whole")] == [1, 3, 6, 9]
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")


def test_image_metrics_are_means_over_pairs_with_a_retrieved_image(
    tmp_path: Path, model_dir, records, monkeypatch
) -> None:
    """Half of the pairs have no retrieved image and must not enter the means as zeros."""
    rows = records(4)
    text_only = [dataclasses.replace(row, rejected_images=()) for row in rows[2:]]
    names = ("logps/image_rejected", "rewards/image_margins", "rewards/image_accuracies")
    lines = {}
    monkeypatch.setattr("realign.training.preflight._say_missing_images", lambda *_: ())
    for name, data in (("all", rows[:2]), ("half", [*rows[:2], *text_only]), ("none", text_only)):
        write_parquet(data, tmp_path / f"{name}.parquet")
        options = {"batch_size": len(data), "epochs": 3, "learning_rate": 3e-4}
        train(config(model_dir, tmp_path / f"{name}.parquet", tmp_path / name, **options))
        lines[name] = metrics(tmp_path / name)
    first = names[0]
    assert lines["half"][0][first] == pytest.approx(lines["all"][0][first], abs=1e-4)
    assert lines["half"][0]["loss"] == pytest.approx(1.5 * math.log(2), abs=1e-4)
    for name in names:
        assert name in lines["half"][-1]
        assert name not in lines["none"][-1]


def test_rows_without_a_retrieved_image_are_announced_or_refused(
    tmp_path: Path, model_dir, records, capsys
) -> None:
    rows = [dataclasses.replace(row, rejected_images=()) for row in records(4)]
    write_parquet(rows, tmp_path / "none.parquet")
    write_parquet([*rows[:3], records(4)[3]], tmp_path / "some.parquet")
    some, none = (
        config(model_dir, tmp_path / f"{name}.parquet", tmp_path / name)
        for name in ("some", "none")
    )
    train(some)
    announced = "3 of 4 rows have no retrieved image; their image term is dropped\n"
    assert capsys.readouterr().err.count(announced) == 1
    with pytest.raises(RefusedError, match=r"must have retrieved images .* none in 4 rows\. Fill"):
        train(none)
    assert not none.out.exists()
    train(none.model_copy(update={"objective": "dpo"}))
    assert "retrieved" not in capsys.readouterr().err


def test_every_file_of_a_run_follows_the_umask(tmp_path: Path, model_dir, data) -> None:
    before = os.umask(0o027)
    try:
        train(config(model_dir, data, tmp_path / "run"))
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".jsonl"}
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == dict.fromkeys(
        (path.name for path in files), 0o640
    )


def test_repeating_a_finished_run_does_nothing(tmp_path: Path, model_dir, data) -> None:
    checkpoint = train(config(model_dir, data, tmp_path / "run"))
    before = (checkpoint / "model.safetensors").stat().st_mtime_ns
    assert train(config(model_dir, data, tmp_path / "run")) == checkpoint
    assert (checkpoint / "model.safetensors").stat().st_mtime_ns == before


def test_a_finished_run_with_damaged_weights_is_refused(tmp_path: Path, model_dir, data) -> None:
    options = config(model_dir, data, tmp_path / "run")
    weights = train(options) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(RefusedError, match=r"model\.safetensors must be the file that this run"):
        train(options)
    weights.unlink()
    with pytest.raises(RefusedError, match=r"wrote, got none\. Restore it, or remove .*checkpoint"):
        train(options)
    shutil.rmtree(weights.parent)
    train(options)
    assert weights.read_bytes() == whole


def test_a_folder_of_another_run_is_refused_and_kept(tmp_path: Path, model_dir, data) -> None:
    train(config(model_dir, data, tmp_path / "run"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(
        RefusedError, match=r"holds another run.*\n  config\.beta: stored 0\.1, requested 0\.5"
    ):
        train(config(model_dir, data, tmp_path / "run", beta=0.5))
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert before == after


def test_accumulated_micro_batches_give_the_full_batch_step(
    tmp_path: Path, model_dir, data
) -> None:
    whole = train(config(model_dir, data, tmp_path / "a", batch_size=12, pairs_per_step=12))
    parts = train(config(model_dir, data, tmp_path / "b", batch_size=3, pairs_per_step=12))
    a, b, start = weights(whole), weights(parts), weights(model_dir)
    name = next(key for key in a if "language_model" in key and key.endswith("up_proj.weight"))
    assert not torch.equal(a[name], start[name])
    torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=0)
    assert metrics(tmp_path / "a")[0]["loss"] == pytest.approx(
        metrics(tmp_path / "b")[0]["loss"], abs=1e-6
    )


@pytest.mark.parametrize(
    "lora",
    [
        pytest.param(None, marks=pytest.mark.full, id="full"),
        pytest.param(LoraSection(r=4, alpha=8), id="lora"),
    ],
)
def test_gradient_checkpointing_changes_nothing(
    tmp_path: Path, model_dir, data, lora: LoraSection | None, monkeypatch
) -> None:
    checkpointed = []
    monkeypatch.setattr(
        "transformers.modeling_utils.checkpoint",
        lambda *args, **kwargs: checkpointed.append(1) or checkpoint(*args, **kwargs),
    )
    options = {"lora": lora, "learning_rate": 1e-3, "epochs": 2}
    train(config(model_dir, data, tmp_path / "a", **options))
    assert not checkpointed
    train(config(model_dir, data, tmp_path / "b", gradient_checkpointing=True, **options))
    assert checkpointed
    for a, b in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert a == pytest.approx(b, abs=1e-4, rel=1e-4)


@pytest.mark.parametrize(
    "lora",
    [
        pytest.param(None, marks=pytest.mark.full, id="full"),
        pytest.param(LoraSection(r=4, alpha=8), id="lora"),
    ],
)
def test_training_in_bfloat16_starts_near_the_known_loss(
    tmp_path: Path, model_dir, data, lora: LoraSection | None
) -> None:
    out = tmp_path / "run"
    options = {"batch_size": 2, "learning_rate": 1e-3, "epochs": 2, "lora": lora}
    checkpoint = train(config(model_dir, data, out, dtype="bfloat16", **options))
    lines = metrics(out)
    # the cache is computed in batches of 4, and bfloat16 rounds by batch
    assert lines[0]["loss"] == pytest.approx(2 * math.log(2), abs=0.1)
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[-1]["rewards/text_margins"] > 0
    (stored,) = checkpoint.glob("*model.safetensors")
    if lora is None:
        assert {t.dtype for t in load_file(stored).values()} == {torch.bfloat16}
    assert load_model(checkpoint, torch.bfloat16)


def test_training_works_with_the_chat_template_of_llava_1_5(
    tmp_path: Path, model_dir, data
) -> None:
    model = Path(shutil.copytree(model_dir, tmp_path / "model"))
    (model / "chat_template.jinja").write_text(LLAVA_1_5_TEMPLATE)
    train(config(model, data, tmp_path / "run", epochs=2))
    lines = metrics(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(2 * math.log(2), abs=1e-4)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_reference_is_gone_before_the_policy_is_loaded(
    tmp_path: Path, model_dir, data, monkeypatch
) -> None:
    models = []
    load = load_model

    def remember(*args, **kwargs):
        models.append(weakref.ref(load(*args, **kwargs)))
        return models[-1]()

    def load_policy_alone(plan):
        assert [model() for model in models] == [None]
        return load_policy(plan)

    monkeypatch.setattr("realign.reference.scoring.load_model", remember)
    monkeypatch.setattr("realign.training.run.load_policy", load_policy_alone)
    gc.disable()  # nothing but the run itself may collect it
    try:
        train(config(model_dir, data, tmp_path / "run"))
    finally:
        gc.enable()


def test_a_second_run_into_a_folder_in_use_is_refused(tmp_path: Path, model_dir, data) -> None:
    out = tmp_path / "run"
    with (
        only_run(out, "train"),
        pytest.raises(RefusedError, match="must be written by one `realign train` at a time"),
    ):
        train(config(model_dir, data, out))
    assert train(config(model_dir, data, out)).is_dir()


def test_a_named_tracker_writes_into_the_run_folder(
    tmp_path: Path, model_dir: Path, data: Path, capsys
) -> None:
    out = tmp_path / "run"
    train(config(model_dir, data, out, report_to="tensorboard"))
    (events,) = (out / "tensorboard").iterdir()
    assert events.name.startswith("events.out.tfevents.")
    assert b"train/rewards/text_margins" in events.read_bytes()
    assert not (out / "steps").exists()
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"train: 3/3, .*; loss [\d.]+, accuracy [\d.]+, margin ", last)
