"""Every block of Python in the documentation runs, here or in the test that is named for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import realign_kernels
from realign.data.formats.parquet import write_parquet
from realign.demo.run import MODEL
from tests.docs.pages import ROOT, blocks, python_blocks
from tests.realign.conftest import make_records

Names = dict[str, Any]
# Blocks that other tests run: page to files of tests, each with the numbers of its blocks.
ELSEWHERE = {
    "README.md": {"tests/test_readme.py": [1]},
    "distributions/realign-kernels/README.md": {"tests/test_readme.py": [1]},
    "docs/guides/trainers/README.md": {"tests/test_trainer_pages.py": [1, 2]},
    "docs/guides/trainers/authors-code.md": {"tests/test_trainer_pages.py": [1, 2, 3]},
    "docs/guides/trainers/llama-factory.md": {"tests/test_trainer_pages.py": [1]},
    "docs/guides/trainers/ms-swift.md": {"tests/test_trainer_pages.py": [1]},
    "docs/guides/trainers/other-heads.md": {
        "tests/realign_kernels/compat/test_torch_and_cce_page.py": [1, 2, 3, 4, 5],
        "tests/realign_kernels/compat/test_other_heads_page.py": [*range(6, 15)],
    },
    "docs/guides/trainers/trl.md": {"tests/realign/integrations/trl/test_page.py": [3, 4]},
}


def batch(cells: int) -> Names:
    """Return the tensors that the blocks of docs/guides/head.md are given."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=False)
    return {
        **{name: getattr(realign_kernels, name) for name in realign_kernels.__all__},
        "torch": torch,
        "F": F,
        "hidden_states": torch.randn(cells * 3, 5, 16, generator=generator, requires_grad=True),
        "lm_head": head,
        "labels": torch.randint(50, (cells * 3, 5), generator=generator),
        "ref_logps": torch.full((cells * 3,), -15.0),
        "is_desirable": torch.arange(cells * 3) % 2 == 0,
        "kl": torch.tensor(0.3),
        "beta": 0.1,
        "weight": 0.1,
    }


def pope(folder: Path) -> Names:
    """Write the files that docs/guides/evaluation.md names: POPE's questions and two of answers."""
    data = folder / "POPE" / "output" / "coco"
    data.mkdir(parents=True)
    answers: dict[str, list[Any]] = {"llava-v1.5-13b": [], "base": [], "aligned": []}
    for split in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": i + 1, "image": f"{i}.jpg", "text": f"Is there a {split} dog?"}
            | {"label": ("yes", "no")[i % 2]}
            for i in range(6)
        ]
        (data / f"coco_pope_{split}.json").write_text("\n".join(map(json.dumps, rows)))
        for name, given in answers.items():
            for row in rows:
                text = "Yes" if name == "base" else row["label"]
                given.append({"id": f"{split}-{row['question_id']}", "answer": text})
    for name, given in answers.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, given)))
    return {}


def training(folder: Path) -> Names:
    """Put the embedded model and a few pairs where the page has them."""
    (folder / "runs").mkdir()
    (folder / "runs" / "model").symlink_to(MODEL)
    (folder / "runs" / "dataset").mkdir()
    write_parquet(make_records(4), folder / "runs" / "dataset" / "dataset.parquet")
    return {}


def models(folder: Path) -> Names:
    """Put a merged model and an adapter where docs/guides/serving.md has them."""
    import realign

    adapted = realign.add_adapter(
        realign.load_model(MODEL, torch.float32),
        rank=2,
        alpha=4,
        targets="all-linear",
        freeze_vision=True,
    )
    adapted.save_pretrained(folder / "runs" / "llava" / "checkpoint")
    (folder / "runs" / "llava" / "merged").symlink_to(MODEL)
    return {}


def trl(_: Path) -> Names:
    """Return what the trainers of docs/guides/trainers/trl.md are given."""
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from tests.realign.integrations.trl.stock import pairs

    return {
        "model": AutoModelForImageTextToText.from_pretrained(MODEL),
        "processor": AutoProcessor.from_pretrained(MODEL),
        "dataset": pairs(),
        "lora": LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        "reference": None,
    }


GIVEN: dict[tuple[str, int], Callable[[Path], Names]] = {
    ("docs/guides/evaluation.md", 1): pope,
    ("docs/guides/evaluation.md", 2): pope,
    ("docs/guides/head.md", 1): lambda _: batch(2),
    ("docs/guides/head.md", 2): lambda _: batch(2),
    ("docs/guides/head.md", 3): lambda _: batch(2),
    ("docs/index.md", 1): training,
    ("docs/guides/serving.md", 1): models,
    ("docs/guides/serving.md", 2): models,
    ("docs/guides/trainers/trl.md", 1): trl,
    ("docs/guides/trainers/trl.md", 2): trl,
    ("docs/guides/training.md", 1): training,
}
REPLACED = {
    "llava-hf/llava-1.5-7b-hf": str(MODEL),
    'DPOConfig("out"': 'DPOConfig("out", use_cpu=True, bf16=False, disable_tqdm=True',
}
EXECUTED = [
    (page, number)
    for page, number in python_blocks()
    if not any(number in numbers for numbers in ELSEWHERE.get(page, {}).values())
]


def run(page: str, number: int, folder: Path) -> Names:
    """Run a block with the names that it is given and return all names."""
    source = blocks(page, "python")[number - 1]
    for name, replacement in REPLACED.items():
        source = source.replace(name, replacement)
    names = GIVEN.get((page, number), lambda _: {})(folder)
    exec(compile(source, f"{page}, block {number}", "exec"), names)
    return names


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of TRL's configuration
@pytest.mark.parametrize(("page", "number"), EXECUTED)
def test_a_python_block_runs(
    page: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(page, number, tmp_path)
    if page == "docs/guides/head.md":
        names["loss"].backward()
        assert names["hidden_states"].grad.isfinite().all()
        assert names["hidden_states"].grad.any()
    if page == "docs/guides/evaluation.md" and number == 3:
        assert names["is_right"]({"label": "red"}, "It is red") == [1, True]
    if "checkpoint" in names:
        assert (names["checkpoint"] / "config.json").is_file()


def test_every_block_run_by_another_test_exists() -> None:
    everything = {*python_blocks()}
    assert {*GIVEN} <= {*EXECUTED}
    for page, tests in ELSEWHERE.items():
        for file, numbers in tests.items():
            assert {(page, number) for number in numbers} <= everything, (page, file)
            source = (ROOT / file).read_text(encoding="utf-8")
            assert Path(page).name in source, (page, file)
            assert "exec(" in source or '"-c"' in source, file


def test_a_block_that_does_not_run_is_detected() -> None:
    with pytest.raises(NameError, match="hidden_states"):
        exec(blocks("docs/guides/head.md", "python")[1], {"linear_logprob": SimpleNamespace})
