"""Everything that cannot be asked is named and refused before a model is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import LlavaProcessor

from realign.config import EvalConfig
from realign.errors import RefusedError
from realign.evaluation.run import evaluate
from tests.realign.evaluation.published import write_published


@pytest.fixture
def config(tmp_path: Path, model_dir: Path, monkeypatch) -> EvalConfig:
    """Return a run on POPE, ScienceQA and MMBench that must not come to a model."""

    def load(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(
        "realign.generation.transformers_generator.TransformersGenerator.load", load
    )
    for name in ("pope", "scienceqa", "mmbench"):
        write_published(name, tmp_path / "data", tmp_path / "images")
    return EvalConfig(
        models={"base": str(model_dir)},
        data=tmp_path / "data",
        images=tmp_path / "images",
        out=tmp_path / "eval",
    )


def refusal(config: EvalConfig, **changes: Any) -> str:
    with pytest.raises(RefusedError) as refused:
        evaluate(config.model_copy(update=changes))
    assert not config.out.exists()
    return str(refused.value)


def test_missing_and_unreadable_images_are_all_named(config: EvalConfig) -> None:
    images = config.images
    assert images is not None
    (images / "pope" / "val2014" / "COCO_val2014_000000000001.jpg").unlink()
    (images / "pope" / "val2014" / "COCO_val2014_000000000002.jpg").write_text("junk")
    shutil.rmtree(images / "scienceqa")
    table = config.data / "mmbench_dev_20230712.tsv"
    cells = [line.split("\t") for line in table.read_text().split("\n")]
    cells[1][-1] = "not in base64!" * 9  # the image of two rows more
    cells[2][-1] = cells[3][-1] = "7"
    table.write_text("\n".join(map("\t".join, cells)))
    message = refusal(config)
    tried = [images / "pope" / "COCO_val2014_000000000001.jpg",
             images / "pope" / "val2014" / "COCO_val2014_000000000001.jpg",
             images / "COCO_val2014_000000000001.jpg",
             images / "val2014" / "COCO_val2014_000000000001.jpg"]  # fmt: skip
    for text in (
        f"images {images} must hold every image that is asked about, got:\n",
        "mmbench: 1 of 2 images cannot be read\n  mmbench_dev_20230712.tsv, row 1, 7: image must",
        f"pope: 1 of 2 images are missing; the first was looked for at "
        f"{' and '.join(map(str, tried))}\n"
        "  coco_pope_popular.json, line 2: image 'COCO_val2014_000000000001.jpg' does not exist\n",
        "pope: 1 of 2 images cannot be read\n  coco_pope_popular.json, line 1, "
        "COCO_val2014_000000000002.jpg: image must be a readable JPEG",
        "scienceqa: 1 of 1 images are missing",
        "Add or correct them, check --images, or name the other benchmarks with --benchmark.",
    ):
        assert text in message


def test_many_images_are_counted_and_twenty_are_named(config: EvalConfig) -> None:
    rows = [
        {"question_id": n, "image": f"{n}.jpg", "text": "Is it?", "label": "no"} for n in range(30)
    ]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (config.data / "coco_pope_popular.json").write_text(text)
    message = refusal(config, benchmarks=["pope"])
    assert "pope: 30 of 30 images are missing" in message
    assert message.count("does not exist") == 20
    assert "\n  ... and 10 more\n" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmarks": ["popeye"]}, "benchmark must be one of pope, .*, got 'popeye'"),
        ({"benchmarks": ["pope", "pope"]}, "must name each one once, got 'pope' again"),
        ({"benchmarks": ["pope", "vizwiz"]}, r"must hold the files of VizWiz-VQA \(val\.json\)"),
        (
            {"prompt": "official"},
            r"prompt must be one that every benchmark has, got 'official', which is none of "
            r"mmbench: llava, lmms-eval, vlmevalkit; scienceqa: llava, lmms-eval, vlmevalkit\. Nam",
        ),
    ],
)
def test_unknown_benchmark_and_option_names_are_refused(
    config: EvalConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RefusedError, match=message):
        evaluate(config.model_copy(update=changes))
    assert not config.out.exists()


def test_files_required_by_a_prompt_are_named(config: EvalConfig) -> None:
    (config.data / "problems.json").rename(config.data / "old.json")
    human = {"from": "human", "value": "What is it?\nA. a ball\nB. a cup"}
    row = {"id": "1", "conversations": [human, {"from": "gpt", "value": "A"}]}
    (config.data / "llava_test_CQM-A.json").write_text(json.dumps([row]))
    message = refusal(config, prompt="vlmevalkit")
    assert "data requires problems.json for the prompt vlmevalkit, got llava_test_CQM-A" in message
    write_published("textvqa", config.data, config.images or config.data)
    (config.data / "llava_textvqa_val_v051_ocr.jsonl").unlink()
    message = refusal(config, benchmarks=["textvqa"])
    assert "question 1: the prompt llava requires the question in llava_textvqa_val_v051" in message


def test_files_of_one_benchmark_in_two_folders_are_refused(config: EvalConfig) -> None:
    shutil.copytree(config.data, config.data / "pope")
    assert f"must hold POPE once, got files of it in {config.data} and in" in refusal(config)


def test_text_only_questions_are_refused_for_a_model_that_requires_images(
    config: EvalConfig, monkeypatch
) -> None:
    call = LlavaProcessor.__call__

    def needs_images(self, images=None, **options):
        if images is None:
            raise ValueError("`images` are required")
        return call(self, images=images, **options)

    monkeypatch.setattr(LlavaProcessor, "__call__", needs_images)
    message = refusal(config)
    assert (
        "problems.json, problem 5, a question without an image, model base: text must " in message
    )
    assert (
        "LlavaProcessor requires, got none (ValueError: `images` are required). Leave such"
        in message
    )


def test_files_that_are_not_read_are_reported(config: EvalConfig, capsys) -> None:
    (config.data / "gqa_pope_seem_random.json").write_text("{}")
    (config.images or config.data).rename(config.data / "elsewhere")
    refusal(config)
    printed = capsys.readouterr().err
    assert (
        "does not hold them: hallusionbench, amber-generative, amber-discriminative, chair, "
        in printed
    )
    assert (
        "pope: coco_pope_popular.json and so on are read; gqa_pope_seem_random.json in" in printed
    )
    assert "does not hold coco_pope_random.json, coco_pope_adversarial.json" in printed
