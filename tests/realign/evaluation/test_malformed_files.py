"""Files with wrong types, missing keys or damaged bytes are refused in one line that names them."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from realign.errors import RefusedError
from realign.evaluation import score
from realign.evaluation.registry import find_benchmark

VALUES = (None, 3, -1, 1.5, True, "", "x", [], {}, [1], {"a": 1})
GROUP = ("category", "subcategory", "set_id", "figure_id", "question_id")


def figure(visual_input: str, figure_id: str) -> dict[str, Any]:
    filename = None if visual_input == "0" else "a.png"
    texts = dict(zip(GROUP, ("VS", "map", "0", figure_id, "0"), strict=True))
    more = {"question": "Is it?", "gt_answer": "1", "filename": filename}
    return texts | more | {"visual_input": visual_input}


FIGURES = [figure("0", "0"), figure("1", "1")]
RATED = {"image_id": "a", "question": "Q?", "question_type": "other", "gt_answer": "x"}
QUESTION = {"question_id": 0, "image": "a.jpg", "text": "Q?", "category": "conv"}
TURNS = [{"from": "human", "value": "Q?\nA. x\nB. y"}, {"from": "gpt", "value": "A"}]
CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "pope": (
        "pope",
        {"coco_pope_random.json": [{"image": "1.jpg", "text": "q?", "label": "yes"}]},
        [{"question_id": 10000001, "prompt": "q?\nBe short.", "text": "Yes"}],
    ),
    "hallusionbench": (
        "hallusionbench",
        {"HallusionBench.json": FIGURES},
        [row | {"model_prediction": "Yes", "gpt4v_output_gpt_check": "1"} for row in FIGURES],
    ),
    "amber": (
        "amber-discriminative",
        {
            "query_discriminative.json": [{"id": 1, "image": "1.jpg", "query": "q?"}],
            "annotations.json": [{"id": 1, "type": "relation", "truth": "no"}],
        },
        [{"id": 1, "response": "No"}],
    ),
    "scienceqa of LLaVA": (
        "scienceqa",
        {"llava_test_CQM-A.json": [{"id": "1", "image": "1/a.png", "conversations": TURNS}]},
        [{"question_id": "1", "text": "A"}],
    ),
    "scienceqa": (
        "scienceqa",
        {
            "problems.json": {"1": {"question": "Q?", "choices": ["x", "y"], "answer": 0}},
            "pid_splits.json": {"test": ["1"]},
        },
        [{"question_id": "1", "pred": "A"}],
    ),
    "textvqa": (
        "textvqa",
        {
            "TextVQA_0.5.1_val.json": {
                "data": [{"image_id": "a", "question": "Q?", "answers": ["x"] * 10}]
            }
        },
        [{"question_id": "a", "prompt": "Q?\nBe short.", "text": "x"}],
    ),
    "vizwiz": (
        "vizwiz",
        {"val.json": [{"image": "1.jpg", "question": "Q?", "answers": [{"answer": "x"}] * 10}]},
        [{"image": "1.jpg", "answer": "x"}],
    ),
    "mme": (
        "mme",
        {"color.txt": "1.jpg\tIs it?\tYes\n1.jpg\tIs it not?\tNo\n"},
        [
            {"task": "color", "image": "1.jpg", "question": question, "answer": "No"}
            for question in ("Is it?", "Is it not?")
        ],
    ),
    "mmhal": (
        "mmhal",
        {"response_template.json": [RATED]},
        [RATED | {"model_answer": "Red.", "judge_reply": ["Rating: 5", "Rating: 4"]}],
    ),
    "responses of mmhal's judge": (
        "mmhal",
        {"response_template.json": [RATED]},
        [{"model": "m", "choices": [{"message": {"content": "Rating: 5"}}]}],
    ),
    "mm-vet": (
        "mm-vet",
        {
            "mm-vet.json": {
                "v1_0": {"imagename": "a", "question": "Q?", "answer": "x", "capability": ["ocr"]}
            }
        },
        {"v1_0": {"model": ["m", "m"], "content": ["0.5", "1"], "score": [0.5, 1.0]}},
    ),
    "llava-bench": (
        "llava-bench",
        {
            "questions.jsonl": [QUESTION],
            "context.jsonl": [{"image": "a.jpg", "caption": ["One.", "Two."]}],
            "answers_gpt4.jsonl": [{"question_id": 0, "text": "x"}],
            "rule.json": {
                f"llava_bench_{name}": {"role": "Assistant", "prompt": "Score them."}
                for name in ("conv", "detail", "complex")
            },
        },
        [{"question_id": 0, "category": "llava_bench_conv", "content": "8 9", "tuple": [8, 9]}],
    ),
}


def spelled(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content)


def places(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every value; only the first one of a list."""
    yield place
    if isinstance(content, (dict, list)):
        for key in content if isinstance(content, dict) else range(min(len(content), 1)):
            yield from places(content[key], (*place, key))


def changed(content: Any) -> Iterator[bytes]:
    """Yield a file with one value left out or another in its place, and with damaged bytes."""
    text = spelled(content)
    yield from (b"", b" \n", b"\xff" + text.encode(), text[:-3].encode(), b"[NaN]", b"[" * 2000)
    yield from (json.dumps(value).encode() for value in (*VALUES, *([value] for value in VALUES)))
    for place in [] if isinstance(content, str) else places(content):
        for value in (*VALUES, ...):  # the ellipsis stands for none
            if place:
                other = copy.deepcopy(content)
                holder = other
                for key in place[:-1]:
                    holder = holder[key]
                if value is ...:
                    del holder[place[-1]]
                else:
                    holder[place[-1]] = value
                yield json.dumps(other).encode()


def refusal(name: str, answers: Path, data: Path, rule: str) -> str:
    """Return why files are refused, or an empty string where they are scored."""
    try:
        json.dumps(score(name, answers, data, rule, allow_subset=True), allow_nan=False)
    except RefusedError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("case", CASES)
def test_a_changed_file_is_refused_or_scored(tmp_path: Path, case: str) -> None:
    name, data, records = CASES[case]
    files = {tmp_path / "data" / file: content for file, content in data.items()}
    answers = tmp_path / "answers.json"
    files[answers] = records
    (tmp_path / "data").mkdir()
    for path, content in files.items():
        path.write_text(spelled(content))
    rules = [*find_benchmark(name).rules]
    wanted = {rule: score(name, answers, tmp_path / "data", rule) for rule in rules}
    refused = 0
    for path, content in files.items():
        for damaged in changed(content):
            path.write_bytes(damaged)
            for rule in rules:
                message = refusal(name, answers, tmp_path / "data", rule)
                assert "\n" not in message
                refused += message != ""
        for marked in ("\ufeff{}", "{}\r\n"):  # a byte order mark, and line ends of Windows
            path.write_bytes(marked.format(spelled(content).replace("\n", "\r\n")).encode())
            found = {rule: score(name, answers, tmp_path / "data", rule) for rule in rules}
            assert found == wanted
        path.unlink()
        path.mkdir()
        with pytest.raises(RefusedError, match=re.escape(path.name)):
            score(name, answers, tmp_path / "data", rules[0])
        path.rmdir()
        path.write_text(spelled(content))
    assert refused > 50
