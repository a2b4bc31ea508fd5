"""The whole of `realign build` on the embedded model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from realign.building.models import PromptLength
from realign.building.run import build
from realign.building.staging import Staging
from realign.config import BuildConfig
from realign.data.dataset import read_records
from realign.data.decisions import Decision, append_decision, decisions_path
from realign.demo.data import write_training_data
from realign.demo.tasks import LEXICON_PATH
from realign.demo.world import DESCRIBE
from realign.errors import RefusedError
from realign.generation.generator import Answer, Request
from realign.generation.transformers_generator import TransformersGenerator
from realign.modeling.lengths import ImageTokens, position_limit
from realign.modeling.processors import load_processor
from realign.runtime.run_folder import only_run


@pytest.fixture
def config(tmp_path: Path, model_dir: Path) -> BuildConfig:
    write_training_data(tmp_path / "world", 20, seed=0)
    return BuildConfig(
        source=tmp_path / "world" / "train.jsonl",
        images=tmp_path / "world" / "images",
        model=str(model_dir),
        out=tmp_path / "out",
        lexicon=LEXICON_PATH,
        window=16,
        shard_size=16,
        workers=1,
        batch_size=8,
        top_k=3,
        max_new_tokens=72,
    )


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_build_command_writes_records_with_provenance(config: BuildConfig) -> None:
    dataset = build(config)
    funnel = json.loads((config.out / "funnel.json").read_text())
    records = read_records(dataset, None)
    assert funnel["rows"] == 40
    assert funnel["accepted"] == len(records) == sum(funnel["accepted_by_rank"].values()) > 20
    assert funnel["accepted"] + sum(funnel["dropped"].values()) == 40
    for record in records:
        source = record.meta["source"]
        assert record.images == ((config.images / source["image"]).read_bytes(),)
        assert record.rejected_images == ((config.images / source["retrieved_image"]).read_bytes(),)
        assert source["image"] != source["retrieved_image"]
        assert record.meta["similarity"]["value"] < 0.95
        assert 1 <= record.meta["retrieval"]["rank"] <= 3
        assert "[MASK]" in record.meta["masked"]


def test_a_stopped_build_continues_to_the_same_bytes(config: BuildConfig, tmp_path: Path) -> None:
    build(config)
    whole = files(config.out)
    (config.out / "dataset.parquet").unlink()
    (config.out / "funnel.json").unlink()
    (config.out / "shards" / "00002.jsonl").unlink()
    kept = (config.out / "shards" / "00000.jsonl").stat().st_mtime_ns
    build(config)
    assert files(config.out) == whole
    assert (config.out / "shards" / "00000.jsonl").stat().st_mtime_ns == kept
    again = config.model_copy(update={"out": tmp_path / "again"})
    build(again)
    assert files(again.out) == whole


def test_a_folder_of_another_build_is_refused_and_kept(config: BuildConfig) -> None:
    build(config)
    before = files(config.out)
    with pytest.raises(
        RefusedError, match=r"holds another run.*(\n.*)*config\.threshold: stored 0\.95"
    ):
        build(config.model_copy(update={"threshold": 0.5}))
    assert files(config.out) == before


def test_the_model_masks_answers_when_it_is_the_masker(config: BuildConfig) -> None:
    build(config.model_copy(update={"mask": "model"}))
    masked_by = json.loads((config.out / "funnel.json").read_text())["masked_by"]
    assert sum(masked_by.values()) == 40
    assert masked_by["model"] >= 20  # the embedded model knows the masking prompt


def test_the_funnel_counts_completions_that_were_cut(config: BuildConfig) -> None:
    with pytest.raises(
        RefusedError, match=r"at least one pair, got none from 40 rows: .*mostly cut"
    ):
        build(config.model_copy(update={"max_new_tokens": 3}))
    funnel = json.loads((config.out / "funnel.json").read_text())
    assert funnel["accepted"] == 0
    assert funnel["refused_candidates"] == {"cut at max_new_tokens": 40 * 3}
    assert funnel["dropped"] == {"no candidate passed, mostly cut at max_new_tokens": 40}


@pytest.mark.parametrize("mask", ["rule", pytest.param("model", marks=pytest.mark.full)])
def test_a_row_longer_than_the_model_is_dropped_counted_and_not_generated(
    config: BuildConfig, mask: str, monkeypatch
) -> None:
    lines = config.source.read_text().splitlines()
    row = json.loads(lines[0])
    row["answer"] = " ".join([row["answer"]] * 400)
    config.source.write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n")
    asked: list[str] = []
    call = TransformersGenerator.__call__
    monkeypatch.setattr(
        TransformersGenerator,
        "__call__",
        lambda self, requests: (
            asked.extend(request.prompt for request in requests) or call(self, requests)
        ),
    )
    build(config.model_copy(update={"mask": mask}))
    assert max(map(len, asked)) < 2000
    funnel = json.loads((config.out / "funnel.json").read_text())
    reason = "no candidate passed, mostly prompt longer than max_length"
    assert funnel["dropped"][reason] == 1
    assert funnel["refused_candidates"]["prompt longer than max_length"] == config.top_k
    assert "max_length" not in json.loads((config.out / "build.json").read_text())["config"]


def test_prompt_lengths_equal_the_tokens_the_generator_reads(config: BuildConfig) -> None:
    generator = TransformersGenerator.load(Path(config.model), torch.float32, max_new_tokens=1)
    path = config.images / "train-00000.png"
    read: list[int] = []
    generate = generator.model.generate
    generator.model.generate = lambda **inputs: (
        read.append(inputs["input_ids"].shape[1]) or generate(**inputs)
    )
    generator([Request(DESCRIBE, path)])
    measured = PromptLength(generator.processor, limit=read[0])
    assert measured.tokens(DESCRIBE, path) == read[0]
    assert measured.fits(DESCRIBE, path)
    assert not PromptLength(generator.processor, limit=read[0] - 1).fits(DESCRIBE, path)
    assert position_limit(generator.model.config) == 512


def test_the_prompt_limit_is_part_of_the_run_identity(config: BuildConfig) -> None:
    with pytest.raises(RefusedError, match=r"none from 40 rows: .*mostly prompt longer than max_l"):
        build(config.model_copy(update={"max_length": 20}))
    assert json.loads((config.out / "build.json").read_text())["config"]["max_length"] == 20


def test_an_answer_without_an_end_of_turn_token_counts_as_cut(
    model_dir: Path, tmp_path: Path
) -> None:
    generator = TransformersGenerator.load(model_dir, torch.float32, max_new_tokens=72)
    Image.new("RGB", (96, 96), "white").save(tmp_path / "white.png")
    request = Request(DESCRIBE, tmp_path / "white.png")
    (whole,) = generator([request])
    assert not whole.is_cut
    tokens = generator.processor.tokenizer(whole.text, add_special_tokens=False).input_ids
    for limit, cut in ((len(tokens), True), (len(tokens) + 1, False)):
        generator.max_new_tokens = limit
        assert generator([request]) == [Answer(whole.text, cut)]
    generator.model.generation_config.eos_token_id = None  # nothing ends a turn
    generator.max_new_tokens = len(tokens) + 1
    assert generator([request])[0].is_cut


def test_mask_rates_of_unknown_categories_are_refused(config: BuildConfig) -> None:
    message = r"must name categories of \['attributes', 'objects', .*got 'object'"
    with pytest.raises(RefusedError, match=message):
        build(config.model_copy(update={"mask_rates": {"object": 0.1}}))
    assert not config.out.exists()


def test_the_models_special_tokens_are_refused_in_the_source(config: BuildConfig) -> None:
    text = config.source.read_text()
    config.source.write_text(text.replace('"prompt": "', '"prompt": "<pad>', 1))
    with pytest.raises(RefusedError, match=r"line 1: prompt must not contain .* '<pad>'"):
        build(config)
    assert not config.out.exists()


def test_a_source_of_one_image_is_refused(config: BuildConfig) -> None:
    line = config.source.read_text().splitlines()[0]
    config.source.write_text(line + "\n")
    with pytest.raises(RefusedError, match="at least 2 different images"):
        build(config)
    assert not (config.out / "build.json").exists()


def test_text_pairs_of_a_parquet_source_get_new_images_and_keep_their_texts(
    config: BuildConfig, tmp_path: Path
) -> None:
    """A dataset of ours is such a source: its pairs keep their texts and get images anew."""
    first = read_records(build(config), None)
    again = config.model_copy(
        update={"source": config.out / "dataset.parquet", "images": None, "out": tmp_path / "again"}
    )
    records = read_records(build(again), None)
    assert [(r.id, r.prompt, r.chosen, r.rejected) for r in records] == [
        (r.id, r.prompt, r.chosen, r.rejected) for r in first
    ]
    for record in records:
        assert record.rejected_images
        assert record.rejected_images != record.images
        assert record.meta["retrieval"]["rank"] == 1
        assert "masked" not in record.meta
        assert "generator" not in record.meta
    assert json.loads((again.out / "funnel.json").read_text())["masked_by"] == {}


def test_decisions_take_effect_when_the_build_is_called_again(config: BuildConfig) -> None:
    dataset = build(config)
    records = list(read_records(dataset, None))
    whole = dataset.read_bytes()
    path = decisions_path(dataset)
    for record, choice in zip(records, ("drop", "keep", "flag"), strict=False):
        append_decision(path, Decision(record.id, record.key, choice))
    build(config)
    assert [r.id for r in read_records(dataset, None)] == [r.id for r in records[1:]]
    funnel = json.loads((config.out / "funnel.json").read_text())
    assert funnel["accepted"] == len(records)
    assert funnel["decisions"]["dropped"] == 1
    append_decision(path, Decision(records[0].id, records[0].key, "keep"))
    build(config)
    assert dataset.read_bytes() == whole


def test_a_clip_model_retrieves_within_a_band(config: BuildConfig, tmp_path: Path) -> None:
    folder = tiny_clip(tmp_path / "clip")
    options = {"encoder": str(folder), "min_cosine": 0.2, "max_cosine": 0.9999, "top_k": 5}
    records = read_records(build(config.model_copy(update=options)), None)
    cosines = [record.meta["retrieval"]["cosine"] for record in records]
    assert all(0.2 <= cosine <= 0.9999 for cosine in cosines)
    assert {record.meta["retrieval"]["encoder"] for record in records} == {"clip"}
    identity = json.loads((config.out / "build.json").read_text())["models"]["encoder"]
    assert "model.safetensors" in identity["model"]


def tiny_clip(folder: Path) -> Path:
    """A real CLIPModel with random weights."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2}
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(
            text_config={**small, "vocab_size": 99, "max_position_embeddings": 8},
            vision_config={**small, "image_size": 32, "patch_size": 8},
            projection_dim=8,
        )
    ).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(crop_size=size, size=size).save_pretrained(folder)
    return folder


@pytest.mark.full
def test_the_index_does_not_change_the_result(config: BuildConfig, tmp_path: Path) -> None:
    exact = build(config).read_bytes()
    flat = config.model_copy(update={"index": "flat", "out": tmp_path / "flat"})
    assert build(flat).read_bytes() == exact


def test_a_row_with_another_image_changes_the_run_identity(config: BuildConfig) -> None:
    """The identity changes even if the set of images stays the same."""
    rows = [json.loads(line) for line in config.source.read_text().splitlines()]
    first, second, *_ = dict.fromkeys(row["image"] for row in rows)
    images = config.images
    assert images is not None
    copy = images / "copy.png"
    shutil.copy(images / first, copy)
    last = rows[-1]["image"]
    for row in rows:
        if row["image"] == last:
            row["image"] = "copy.png"
    config.source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = build(config)
    whole = dataset.read_bytes()
    shutil.copy(images / second, copy)
    for is_finished in (True, False):
        if not is_finished:
            dataset.unlink()
        with pytest.raises(RefusedError, match=r"holds another run(.|\n)*\n +rows: "):
            build(config)
    copy.unlink()
    with pytest.raises(RefusedError, match="holds another run"):
        build(config.model_copy(update={"max_reject": 0.5}))
    shutil.copy(images / first, copy)
    assert build(config).read_bytes() == whole


def test_a_build_without_its_funnel_is_unfinished(config: BuildConfig) -> None:
    dataset = build(config)
    whole = files(config.out)
    (config.out / "funnel.json").unlink()
    dataset.write_bytes(b"half")
    assert build(config) == dataset
    assert files(config.out) == whole


def test_a_damaged_dataset_is_written_again(config: BuildConfig) -> None:
    dataset = build(config)
    whole = dataset.read_bytes()
    for damaged in (whole[: len(whole) // 2], b""):
        dataset.write_bytes(damaged)
        assert build(config).read_bytes() == whole


@pytest.mark.parametrize("out", [".", "out"])
def test_an_output_inside_the_source_folder_is_refused(config: BuildConfig, out: str) -> None:
    source = config.images  # any folder; every file below it would be a part of the source
    before = files(source)
    with pytest.raises(RefusedError, match=r"out must lie outside the source folder .*images, all"):
        build(config.model_copy(update={"source": source, "out": source / out}))
    assert files(source) == before


def test_decisions_that_drop_every_row_and_damaged_decisions_are_refused(
    config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = build(config)
    path = decisions_path(dataset)
    for record in read_records(dataset, None):
        append_decision(path, Decision(record.id, record.key, "drop"))
    for _ in range(2):
        with pytest.raises(RefusedError, match=r"decisions\.jsonl must keep at least one row"):
            build(config)
    path.write_text("{}\n" + path.read_text())
    monkeypatch.setattr(Staging, "retrieve", lambda *_: pytest.fail("too late"))
    with pytest.raises(RefusedError, match=r"decisions\.jsonl, line 1"):
        build(config)


def test_an_image_that_changes_during_a_build_is_refused(
    config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    induce = Staging.induce

    def then_change(self: Staging, *arguments: Any) -> Any:
        outcomes = induce(self, *arguments)
        for path in config.images.iterdir():
            Image.new("RGB", (8, 8)).save(path)
        return outcomes

    monkeypatch.setattr(Staging, "induce", then_change)
    with pytest.raises(RefusedError, match=r"train-0.*png must not change during a build"):
        build(config)
    assert not (config.out / "dataset.parquet").exists()


def test_a_damaged_shard_is_named(config: BuildConfig) -> None:
    dataset = build(config)
    dataset.unlink()
    shard = config.out / "masked" / "00001.jsonl"
    shard.write_text("".join(shard.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(RefusedError, match=r"00001\.jsonl must have 16 lines, has 15\. Delete it"):
        build(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_cosine": 0.9, "max_cosine": 0.1}, "min_cosine must be at most max_cosine"),
        ({"similarity": "./none"}, "similarity"),
        ({"encoder": "./none"}, "none"),
    ],
)
def test_options_that_cannot_work_are_refused_before_the_folder_is_claimed(
    config: BuildConfig, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RefusedError, match=message):
        build(config.model_copy(update=options))
    assert not (config.out / "build.json").exists()
    assert not (config.out / "embeddings").exists()


def test_the_suggested_max_reject_admits_the_bad_rows(config: BuildConfig) -> None:
    lines = config.source.read_text().splitlines()[:11]
    lines[0] = "{}"
    config.source.write_text("\n".join(lines) + "\n")
    with pytest.raises(RefusedError, match=r"1 of 11 rows .* bad") as refused:
        build(config)
    share = float(re.search(r"max_reject=(\S+)", str(refused.value))[1])
    assert build(config.model_copy(update={"max_reject": share})).is_file()


def test_omitting_bad_rows_is_not_advised_when_too_few_images_remain(config: BuildConfig) -> None:
    good = [json.loads(line) for line in config.source.read_text().splitlines()]
    (first, *_), others = good, [row for row in good if row["image"] != good[0]["image"]]
    bad = {"id": "bad", "image": first["image"], "prompt": "What?", "scores": [1], "note": "x"}
    for rows, is_advised in (([bad], False), ([bad, first], False), ([bad, first, *others], True)):
        config.source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(RefusedError, match=r"^1 of \d+ rows .* bad") as refused:
            build(config)
        assert ("max_reject" in str(refused.value)) == is_advised
        assert "got a row whose keys ['note', 'scores'] are not read. Fill it in" in str(
            refused.value
        )
    config.source.write_text(json.dumps(bad) + "\n" + json.dumps(first) + "\n")
    with pytest.raises(
        RefusedError, match=r"2 different images .*got 1, and these bad rows:\n.*li"
    ):
        build(config.model_copy(update={"max_reject": 1.0}))
    assert not (config.out / "rejected.jsonl").exists()


def test_several_bad_turns_of_one_row_count_as_one_bad_row(
    config: BuildConfig, tmp_path: Path
) -> None:
    (config.images / "broken.png").write_bytes(b"GIF89a")
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A red dog."}] * 3
    names = ["broken.png", *sorted(path.name for path in config.images.glob("train*"))]
    conversations = [{"id": n, "image": n, "conversations": turns} for n in names[:4]]
    source = tmp_path / "llava.json"
    source.write_text(json.dumps(conversations))
    each = config.model_copy(update={"source": source, "turns": "each"})
    with pytest.raises(RefusedError, match=r"^1 of 4 rows (.|\n)*max_reject=0\.25"):
        build(each)


def test_embedded_images_keep_their_file_names(config: BuildConfig, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in config.source.read_text().splitlines()]
    table = {
        "image": [
            {"bytes": (config.images / row["image"]).read_bytes(), "path": f"own-{row['image']}"}
            for row in rows
        ],
        "prompt": [row["prompt"] for row in rows],
        "answer": [row["answer"] for row in rows],
    }
    text = Value("string")
    features = Features({"image": ImageFeature(), "prompt": text, "answer": text})
    Dataset.from_dict(table, features=features).to_parquet(tmp_path / "rows.parquet")
    embedded = config.model_copy(update={"source": tmp_path / "rows.parquet", "images": None})
    for record in read_records(build(embedded), None):
        assert record.source["image"].startswith("own-train-")
        assert record.source["retrieved_image"].startswith("own-train-")
        assert record.source["image"] != record.source["retrieved_image"]


def test_a_second_build_into_a_folder_in_use_is_refused(config: BuildConfig) -> None:
    with (
        only_run(config.out, "build"),
        pytest.raises(RefusedError, match="another one is running"),
    ):
        build(config)
    assert not (config.out / "build.json").exists()
    assert build(config).is_file()


def test_missing_paths_are_refused_before_the_model_is_opened(
    config: BuildConfig,
) -> None:
    for name in ("source", "images"):
        with pytest.raises(RefusedError, match=rf"{name} must be .*nothing"):
            build(config.model_copy(update={name: Path("nothing"), "model": "./none"}))
    with pytest.raises(RefusedError, match=r"^encoder must be .* Check --encoder\."):
        build(config.model_copy(update={"encoder": "./none"}))


def test_a_sample_reads_only_the_images_of_sampled_rows(
    config: BuildConfig, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in config.source.read_text().splitlines()]
    sampled = config.model_copy(update={"sample": 12, "seed": 1})
    dataset = build(sampled)
    funnel = json.loads((config.out / "funnel.json").read_text())
    assert (funnel["rows"], funnel["unsampled"]) == (12, 28)
    drawn = [json.loads(line)["id"] for line in read_lines(config.out / "shards")]
    whole = dataset.read_bytes()
    shown = {row["image"] for row in rows if row["id"] in drawn}
    assert 1 < len(shown) < len({row["image"] for row in rows})
    for path in config.images.iterdir():
        if path.name not in shown:
            path.write_bytes(b"damaged")
    again = sampled.model_copy(update={"out": tmp_path / "again", "workers": 2, "shard_size": 32})
    assert build(again).read_bytes() == whole
    with pytest.raises(RefusedError, match=r"config\.sample: stored 12, requested 13"):
        build(sampled.model_copy(update={"sample": 13, "max_reject": 1.0}))
    with pytest.raises(RefusedError, match=r"at most the 40 good rows of train\.jsonl, got 41"):
        build(sampled.model_copy(update={"sample": 41}))


def test_bad_rows_do_not_count_towards_the_sample_size(config: BuildConfig) -> None:
    rows = [json.loads(line) for line in config.source.read_text().splitlines()]
    bad = [{**rows[0], "id": f"bad-{number}", "answer": ""} for number in range(4)]
    config.source.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *bad]))
    build(config.model_copy(update={"sample": 10, "max_reject": 0.1}))  # 4 of 44, not 4 of 14
    assert len((config.out / "rejected.jsonl").read_text().splitlines()) == 4


def test_only_embedded_images_of_sampled_rows_are_written(
    config: BuildConfig, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in config.source.read_text().splitlines()]
    names = [row["image"] for row in rows]
    table = {
        "image": [{"bytes": (config.images / name).read_bytes()} for name in names],
        "prompt": [row["prompt"] for row in rows],
        "answer": [row["answer"] for row in rows],
    }
    Dataset.from_dict(table).to_parquet(tmp_path / "rows.parquet")
    update = {"source": tmp_path / "rows.parquet", "images": None, "sample": 10}
    records = read_records(build(config.model_copy(update=update)), None)
    written = {path.read_bytes() for path in (config.out / "source_images").iterdir()}
    drawn = [int(json.loads(line)["id"]) for line in read_lines(config.out / "shards")]
    assert len(drawn) == 10
    assert written == {table["image"][i]["bytes"] for i in drawn}
    assert {record.images[0] for record in records} <= written


def test_a_dry_run_loads_the_model_for_a_few_rows_and_writes_nothing(
    config: BuildConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The source may hold its images itself, and some of them may be damaged."""
    rows = [json.loads(line) for line in config.source.read_text().splitlines()]
    images = [{"bytes": (config.images / row["image"]).read_bytes()} for row in rows]
    for image in images[:4]:
        image["bytes"] = image["bytes"][:100]
    table = {name: [row[name] for row in rows] for name in ("prompt", "answer")}
    Dataset.from_dict({"image": images, **table}).to_parquet(tmp_path / "rows.parquet")
    update = {"source": tmp_path / "rows.parquet", "images": None, "sample": 30, "mask": "model"}
    build(config.model_copy(update=update), dry_run=True)
    assert not config.out.exists()
    printed = capsys.readouterr().err
    assert "30 rows, " in printed
    model = Path(config.model).name
    assert f"masker {model} (loaded here): 30 requests, up to 60 if it changes" in printed
    assert f"inducer {model} (loaded here): 30 requests, up to 90 if every" in printed
    assert printed.count("time: about ") == 2
    assert printed.count(", a batch of ") == 2
    # 16 patches of the demo's images, one placeholder in the text
    reader = ImageTokens(load_processor(Path(config.model)))
    assert f" of text and {reader((96, 96))} of the image each), about" in printed


def test_the_refusal_names_the_option_that_finds_the_images(
    config: BuildConfig, tmp_path: Path
) -> None:
    """The source names images as in COCO train2017, and the folder is that of train2014."""
    folder = tmp_path / "train2014"
    folder.mkdir()
    for path in config.images.iterdir():
        shutil.copy(path, folder / f"COCO_train2014_{path.name}")
    other = config.model_copy(update={"images": folder})
    with pytest.raises(RefusedError, match=r"^40 of 40 rows") as refused:
        build(other)
    *shown, more, last = str(refused.value).splitlines()[1:]
    assert len(shown) == 5
    assert more == "... and 35 more (missing in image)"
    assert re.fullmatch(
        r"COCO_train2014_train-\d+\.png exists: pass --set "
        r"build\.image_name=COCO_train2014_\{name\}\.",
        last,
    )
    update = {"image_name": "COCO_train2014_{name}"}
    build(other.model_copy(update=update), dry_run=True)


@pytest.mark.full
def test_the_refusal_of_a_large_image_names_the_option_that_admits_it(
    config: BuildConfig, tmp_path: Path
) -> None:
    row = json.loads(config.source.read_text().splitlines()[0])
    Image.new("L", (10_000, 9_000), 90).save(config.images / row["image"], "JPEG")
    with pytest.raises(
        RefusedError,
        match=r"at most 89478485 pixels, got \(10000, 9000\)\. Shrink it, or raise build\.max_",
    ):
        build(config)
    records = read_records(build(config.model_copy(update={"max_pixels": 100_000_000})), None)
    (copy,) = (config.out / "source_images").iterdir()
    shown = [record for record in records if record.source.get("is_shrunk")]
    assert shown
    assert {record.images[0] for record in shown} == {copy.read_bytes()}
    assert {record.source["image"] for record in shown} == {row["image"]}
    # a lower limit refuses it again, copy or not
    lower = config.model_copy(update={"max_pixels": 89_500_000})
    with pytest.raises(RefusedError, match=r"at most 89500000 pixels, got \(10000, 9000\)"):
        build(lower)
    with pytest.raises(
        RefusedError, match=r"config\.max_pixels: stored 100000000, requested 89500000"
    ):
        build(lower.model_copy(update={"max_reject": 1.0}))


def read_lines(folder: Path) -> list[str]:
    return [line for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]
