"""Configuration by a YAML file, overrides and flags; the nearest known key is named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from realign.config import NEAR_DUPLICATE_BITS, SECTIONS, BuildConfig, TrainConfig
from realign.config_file import inner_section, load_config
from realign.data.perceptual_hash import NEAR_BITS
from realign.errors import RefusedError

NEEDED = {"model": "m", "data": Path("d"), "out": Path("o")}


def test_flags_win_over_set_which_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {beta: 0.2, epochs: 3, seed: 1}\nbuild: {top_k: 5}\n")
    config = load_config(
        TrainConfig, path, ["train.epochs=2", "train.seed=5"], {**NEEDED, "seed": 7, "images": None}
    )
    assert (config.beta, config.epochs, config.seed) == (0.2, 2.0, 7)


def test_values_of_nested_sections_are_set(tmp_path: Path) -> None:
    config = load_config(TrainConfig, None, ["train.lora.r=8", "train.lora.alpha=16"], NEEDED)
    assert config.lora is not None
    assert (config.lora.r, config.lora.alpha, config.lora.targets) == (8, 16, "all-linear")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.bta=1", r"train has no option 'bta'\. Did you mean 'beta'\?"),
        ("trian.beta=1", r"unknown section 'trian'\. Did you mean 'train'\?"),
        (
            "train.lora.rank=1",
            r"train\.lora has no option 'rank'\. Known: alpha, r, targets",
        ),
        ("build.topk=1", r"build has no option 'topk'\. Did you mean 'top_k'\?"),
        ("beta=1", r"--set must be section\.key=value, got 'beta=1'"),
        ("train.beta", r"--set must be section\.key=value"),
        ("train.beta=[", r"--set train\.beta must have a YAML value, got '\['"),
        ("train.beta=-1", r"train\.beta: Input should be greater than 0, got -1"),
        ("train.objective=ppo", r"train\.objective: Input should be 'rdpo', .* got 'ppo'"),
        ("train.beta.x=1", "--set must not go below 'beta', which holds a value"),
        ("train.beta=1:30", r"--set train\.beta must have decimal numbers, got 1:30 .* as 90"),
        ("train.lora={r: 2, r: 3}", r"--set train\.lora must have every key once, got 'r' twice"),
        ("train.lora.targets=[]", r"train\.lora\.targets.*: List should have at least 1 item"),
        ("train.lora.r=99999999999999999999", r"train\.lora\.r: Input should be less than 2147"),
    ],
)
def test_invalid_overrides_are_refused(override: str, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        load_config(TrainConfig, None, ["train.beta=0.5", override], NEEDED)


def numeric_options(section: type[BaseModel], path: str) -> Iterator[tuple[str, bool]]:
    """Path of each option that holds a number, and whether it may have a fraction."""
    for key, field in section.model_fields.items():
        if inner := inner_section(field):
            yield from numeric_options(inner, f"{path}.{key}")
        elif re.search(r"\b(int|float)\b", str(field.annotation)):
            number = f"{path}.{key}.any" if "dict" in str(field.annotation) else f"{path}.{key}"
            yield number, "float" in str(field.annotation)


NUMERIC = [it for verb in SECTIONS for it in numeric_options(SECTIONS[verb], verb)]


def refused(path: str, value: object) -> str:
    """Return the message about the value of an option, without that about others."""
    verb = path.partition(".")[0]
    with pytest.raises(RefusedError) as error:
        load_config(SECTIONS[verb], None, [f"{path}={value}"])
    messages = [line for line in str(error.value).splitlines() if line.startswith(f"{path}: ")]
    assert messages, error.value
    return messages[0]


@pytest.mark.parametrize(("path", "has_fraction"), NUMERIC)
def test_every_number_is_bounded_and_finite(path: str, has_fraction: bool) -> None:
    assert re.search(r"Input should be greater than .*, got -2\.", refused(path, -2))
    for value in (".inf", ".nan") if has_fraction else (".inf",):
        assert "Input should be a finite number, got" in refused(path, value)


@pytest.mark.parametrize(("path", "has_fraction"), NUMERIC)
def test_a_truth_value_is_not_read_as_a_number(path: str, has_fraction: bool) -> None:
    assert re.search(r"must be a (number|share from 0 to 1), got true", refused(path, "yes"))


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        ("build.threshold", 1.01, "less than or equal to 1, got 1.01"),
        ("build.threshold", 0, "greater than 0, got 0"),
        ("build.mask_rates.objects", 1.01, "less than or equal to 1, got 1.01"),
        ("build.max_reject", "101%", "less than or equal to 1, got '101%'"),
        ("build.min_cosine", 1.01, "less than or equal to 1, got 1.01"),
        ("build.max_cosine", 1.01, "less than or equal to 1, got 1.01"),
        ("build.max_hamming", 64, "less than or equal to 63, got 64"),
        ("build.top_k", 0, "greater than 0, got 0"),
        ("build.seed", 2**32, "less than 4294967296, got 4294967296"),
        ("build.annotator.max_retries", 1001, "less than or equal to 1000, got 1001"),
        ("check.max_hamming", 64, "less than or equal to 63, got 64"),
        ("train.learning_rate", 1.01, "less than or equal to 1, got 1.01"),
        ("train.projector_learning_rate", 1.01, "less than or equal to 1, got 1.01"),
        ("train.warmup_ratio", 1.01, "less than or equal to 1, got 1.01"),
        ("train.seed", 2**32, "less than 4294967296, got 4294967296"),
        ("train.lora.r", 0, "greater than 0, got 0"),
        ("eval.bootstrap", 0, "greater than 0, got 0"),
        ("eval.seed", 2**32, "less than 4294967296, got 4294967296"),
    ],
)
def test_numbers_out_of_range_are_refused(path: str, value: float, rule: str) -> None:
    assert refused(path, value) == f"{path}: Input should be {rule}."


def test_a_missing_required_option_is_refused_with_its_flag() -> None:
    with pytest.raises(RefusedError, match=r"train\.model is required\. Pass --model"):
        load_config(TrainConfig, None, [], {"data": Path("d"), "out": Path("o")})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "must map sections"),
        ("train: 3\n", "must map sections"),
        ("a: [", "must be YAML"),
        (
            "train:\n  beta: 1\n  beta: 2\n",
            "every key once, got 'beta' twice in the section that begins in line 2",
        ),
        ("eval: {models: {a: x, b: y, a: z}}\n", "config must have every key once, got 'a' twice"),
        ("1: {beta: 2}\n", "has an unknown section 1. Known: build, cache, check, eval, train"),
        ("train: {betta: 1}\n", "Did you mean 'beta'"),
        ("train:\n  seed: 010\n", "config must have decimal numbers, got 010 in line 2, which"),
    ],
)
def test_invalid_configuration_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(RefusedError, match=message):
        load_config(TrainConfig, path, [], NEEDED)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="does not exist"):
        load_config(TrainConfig, tmp_path / "none.yaml", [], NEEDED)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masker": {"model": "m"}}, "masker requires mask: model, got mask: rule"),
        (
            {"inducer": {"model": "m", "temperature": 1.0}},
            "inducer: temperature require an endpoint",
        ),
        (
            {"min_length_ratio": 2, "max_length_ratio": 1.5},
            "build: min_length_ratio must be at most max_length_ratio 1.5, got 2. Lower it.",
        ),
        ({"annotation_prompt": "Describe it."}, "annotation_prompt: String should match"),
        ({"image_name": "COCO_"}, "image_name: String should match"),
        (
            {"inducer": {"model": "m", "timeout": 3}},
            "'timeout'. Did you mean 'timeout_s'",
        ),
        ({1: 2}, "build has no option 1"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    options: dict[Any, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    needed = {"source": "s", "model": "m", "out": "o"}
    path.write_text(yaml.safe_dump({"build": needed | options}))
    with pytest.raises(RefusedError, match=message):
        load_config(BuildConfig, path)


def test_the_near_duplicate_default_equals_that_of_the_perceptual_hash() -> None:
    """The default is a separate constant, so that help need not load image libraries."""
    assert NEAR_DUPLICATE_BITS == NEAR_BITS


def test_a_number_without_a_point_is_sent_to_a_server_as_a_number() -> None:
    override = "build.inducer={model: a, endpoint: 'http://a', extra_body: {top_p: 9e-1}}"
    needed = {"source": "s", "model": "m", "out": "o"}
    config = load_config(BuildConfig, None, [override], needed)
    assert config.inducer is not None
    assert config.inducer.extra_body == {"top_p": 0.9}


@pytest.mark.parametrize("names", ["none", ["none"]])
def test_no_tracker_is_the_name_none(names: str | list[str]) -> None:
    assert load_config(TrainConfig, None, [], {**NEEDED, "report_to": names}).report_to == []
