"""Building: the paper's algorithm by hand, and the whole verb on the embedded model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from realign.build.acceptance import Acceptance, refusal
from realign.build.corpus import Corpus
from realign.build.induction import Candidate, induce
from realign.build.lengths import PromptLength, position_limit
from realign.build.masker import Masked, MaskRules, mask_rows
from realign.build.masking import Lexicon
from realign.build.pipeline import build
from realign.build.prompts import COMPLETION_PROMPT, MASK_PROMPT
from realign.build.row import SourceRow
from realign.build.similarity import load_similarity
from realign.config import BuildConfig
from realign.dataset import read_records
from realign.demo.data import write_training_data
from realign.demo.tasks import LEXICON_PATH
from realign.demo.world import DESCRIBE
from realign.errors import RefusedError
from realign.generate.answer import Answer
from realign.generate.generator import Request
from realign.generate.transformers_generator import TransformersGenerator

LEXICON = Lexicon({"objects": ["dog", "cat", "house"], "attributes": ["red"]})


def rules(mask: str = "rule") -> MaskRules:
    return MaskRules(mask, LEXICON, {}, seed=0)


def acceptance(**options: Any) -> Acceptance:
    return Acceptance(
        **{
            "similarity": load_similarity("lexical"),
            "threshold": 0.95,
            "keep_unmasked": True,
            **options,
        }
    )


def asked_about(path: Path, prompt: str, answer: str, row_id: str = "a") -> SourceRow:
    return SourceRow(row_id, path.name, path, ({"role": "user", "content": prompt},), answer)


def always(prompt: str, image: Path) -> bool:
    return True


class Scripted:
    """Answers by the colour of the image; remembers what it was asked."""

    def __init__(
        self, answers: dict[tuple[int, int, int], str], cut: tuple[int, int, int] | None = None
    ) -> None:
        self.answers, self.cut, self.asked = answers, cut, []

    def __call__(self, requests) -> list[Answer]:
        self.asked += [request.prompt for request in requests]
        colors = [Image.open(request.image).getpixel((0, 0)) for request in requests]
        return [Answer(self.answers[color], color == self.cut) for color in colors]


COLORS = [(0, 0, 0), (10, 0, 0), (20, 0, 0), (30, 0, 0), (40, 0, 0)]


@pytest.fixture
def five_images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path, color in zip(paths, COLORS, strict=True):
        Image.new("RGB", (4, 4), color).save(path)
    return paths


def candidates(paths: list[Path]) -> list[Candidate]:
    return [Candidate(path.name, path, i, 1 - i / 10) for i, path in enumerate(paths, start=1)]


def test_the_papers_algorithm_step_by_step(five_images) -> None:
    """Candidates in order; the first one that differs enough is accepted and becomes v_l."""
    row = asked_about(five_images[0], "What is it?", "A red dog sits.")
    generator = Scripted(
        {
            COLORS[1]: "A red dog sits.",  # identical
            COLORS[2]: "A [MASK] dog sits.",  # not filled
            COLORS[3]: "A red cat sits.",  # accepted
            COLORS[4]: "A red house sits.",  # never asked
        }
    )
    masked = mask_rows([row], rules(), None, always)
    assert masked == [Masked("A [MASK] [MASK] sits.", "rule")]
    (outcome,) = induce(
        [row], masked, [candidates(five_images[1:])], acceptance(), generator, always
    )
    assert (outcome.completion, outcome.image, outcome.rank) == ("A red cat sits.", "3.png", 3)
    assert [attempt["reason"] for attempt in outcome.refused] == ["identical", "mask left unfilled"]
    assert outcome.reason == ""
    assert generator.asked == [f"What is it?\n{COMPLETION_PROMPT}\nA [MASK] [MASK] sits."] * 3


def test_no_candidate_passes(five_images) -> None:
    row = asked_about(five_images[0], "What is it?", "A red dog sits.")
    generator = Scripted(dict.fromkeys(COLORS, "A red dog sits."))
    masked = mask_rows([row], rules(), None, always)
    (outcome,) = induce(
        [row], masked, [candidates(five_images[1:])], acceptance(), generator, always
    )
    assert outcome.reason == "no candidate passed, mostly identical"
    assert len(outcome.refused) == 4


def test_a_completion_that_was_cut_is_never_a_rejected_answer(five_images) -> None:
    row = asked_about(five_images[0], "What is it?", "A red dog.")
    said = dict.fromkeys(COLORS, "A red cat.")
    generator = Scripted(said, cut=COLORS[1])
    masked = mask_rows([row], rules(), None, always)
    loose = acceptance(keep_unmasked=False)
    (outcome,) = induce([row], masked, [candidates(five_images[1:])], loose, generator, always)
    (attempt,) = outcome.refused
    assert (attempt["image"], attempt["reason"]) == ("1.png", "cut at max_new_tokens")
    assert outcome.image == "2.png"


def test_a_mask_that_was_cut_falls_back_to_the_rule(five_images) -> None:
    row = asked_about(five_images[0], "What?", "A red dog")
    cut = Scripted({COLORS[0]: "A red [MASK]"}, cut=COLORS[0])
    assert mask_rows([row], rules("model"), cut, always)[0].by == "rule after model"


def test_nothing_to_mask_is_dropped_with_its_reason(five_images) -> None:
    row = asked_about(five_images[0], "What?", "Nothing.")
    masked = mask_rows([row], rules(), None, always)
    (outcome,) = induce(
        [row], masked, [candidates(five_images[1:])], acceptance(), Scripted({}), always
    )
    assert (outcome.masked_by, outcome.reason, outcome.refused) == ("rule", "nothing to mask", [])


def test_a_models_mask_is_taken_or_falls_back_to_the_rule(five_images) -> None:
    rows = [
        asked_about(five_images[0], "What?", "A red dog sits.", "a"),
        asked_about(five_images[1], "What?", "A red dog sits.", "b"),
    ]
    generator = Scripted({COLORS[0]: "A red [MASK] sits.", COLORS[1]: "The [MASK] sits."})
    assert mask_rows(rows, rules("model"), generator, always) == [
        Masked("A red [MASK] sits.", "model"),
        Masked("A [MASK] [MASK] sits.", "rule after model"),
    ]
    assert generator.asked == [f"{MASK_PROMPT}\nA red dog sits."] * 2


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("", "empty"),
        ("A [MASK] dog sits.", "mask left unfilled"),
        ("A red dog sits.", "identical"),
        ("A <image> cat sits.", "special token"),
        ("A red cat sits.</s>", "special token"),
        ("The red cat sits.", "unmasked words changed"),
        ("A red cat sits.", ""),
    ],
)
def test_refusals(completion: str, reason: str) -> None:
    answer, masked = "A red dog sits.", "A [MASK] [MASK] sits."
    assert (
        refusal(answer, masked, Answer(completion), 0.5, acceptance(special=("</s>", ""))) == reason
    )


def test_similarity_at_the_threshold_is_too_similar() -> None:
    arguments = ("A red dog sits.", "A [MASK] dog sits.", Answer("A blue dog sits."))
    assert refusal(*arguments, 0.95, acceptance()) == "too similar"
    assert refusal(*arguments, 0.9499, acceptance()) == ""


def test_byte_duplicates_are_one_image_of_the_corpus(five_images) -> None:
    shutil.copy(five_images[0], five_images[1])
    rows = [asked_about(path, "x", "y", path.stem) for path in five_images]
    assert Corpus.of(rows).names == ["0.png", "2.png", "3.png", "4.png"]


@pytest.fixture
def config(tmp_path: Path, model_dir: Path) -> BuildConfig:
    write_training_data(tmp_path / "world", 20, seed=0)
    return BuildConfig(
        source=tmp_path / "world" / "train.jsonl",
        images=tmp_path / "world" / "images",
        model=str(model_dir),
        out=tmp_path / "out",
        lexicon=LEXICON_PATH,
        group_size=16,
        batch_size=8,
        top_k=3,
        max_new_tokens=72,
    )


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_verb_builds_records_with_provenance(config: BuildConfig) -> None:
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
        RefusedError, match=r"holds another run.*(\n.*)*config\.threshold: 0\.95 th"
    ):
        build(config.model_copy(update={"threshold": 0.5}))
    assert files(config.out) == before


def test_masking_by_the_model(config: BuildConfig) -> None:
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


@pytest.mark.parametrize("mask", ["rule", "model"])
def test_a_row_that_is_too_long_is_dropped_counted_and_never_given_to_the_model(
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
    assert "max_length" not in (config.out / "build.json").read_text()


def test_prompts_are_measured_as_the_generator_reads_them(config: BuildConfig) -> None:
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


def test_a_limit_on_the_prompt_is_part_of_what_the_run_is(config: BuildConfig) -> None:
    with pytest.raises(RefusedError, match=r"none from 40 rows: .*mostly prompt longer than max_l"):
        build(config.model_copy(update={"max_length": 20}))
    assert json.loads((config.out / "build.json").read_text())["config"]["max_length"] == 20


def test_an_answer_is_cut_when_no_end_of_turn_token_came(model_dir: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"object": 0.1}, r"must name categories of \['attributes', 'objects', .*got 'object'"),
        ({"objects": -3}, r"mask_rates\.objects must be in \[0, 1\], got -3"),
    ],
)
def test_bad_mask_rates(config: BuildConfig, rates: dict[str, float], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        build(config.model_copy(update={"mask_rates": rates}))
    assert not config.out.exists()


def test_the_models_special_tokens_are_refused_in_the_source(config: BuildConfig) -> None:
    text = config.source.read_text()
    config.source.write_text(text.replace('"prompt": "', '"prompt": "<pad>', 1))
    with pytest.raises(RefusedError, match=r"line 1: prompt must not contain .* '<pad>'"):
        build(config)
    assert not config.out.exists()


def test_one_image_is_not_enough(config: BuildConfig) -> None:
    line = config.source.read_text().splitlines()[0]
    config.source.write_text(line + "\n")
    with pytest.raises(RefusedError, match="at least 2 different images"):
        build(config)
    assert not config.out.exists()
