"""A trained adapter in plain transformers and peft, in a process that has neither of our packages,
and the example of its card.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from realign.modeling.loading import load_model
from realign.review.cards.card import write_card
from realign.review.cards.model_card import CardOptions
from tests.realign.review.cards.conftest import BASE, photo

REPO = "user/aligned"
# neither package can be imported
WITHOUT_US = """
import sys
sys.modules["realign"] = sys.modules["realign_kernels"] = None
"""
LOGITS = """
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
inputs = torch.load("inputs.pt", weights_only=True)
with torch.no_grad():
    before = model(**inputs).logits
    after = PeftModel.from_pretrained(model, sys.argv[2]).eval()(**inputs).logits
save_file({"before": before, "after": after}, "logits.safetensors")
"""


class Plain(NamedTuple):
    """The results that another process computed with the adapter."""

    inputs: dict[str, torch.Tensor]
    logits: dict[str, torch.Tensor]
    answer: str


@pytest.fixture(scope="module")
def plain(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """One process for both tests: its imports take most of the time."""
    folder = tmp_path_factory.mktemp("plain")
    base, adapter = finished.parent / "base", finished / "checkpoint"
    card = write_card(finished, CardOptions(repo=REPO, base_model=BASE))
    (example,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    card.unlink()  # other tests take the run as it was
    for repo, place in ((BASE, base), (REPO, adapter)):
        assert f'"{repo}"' in example
        example = example.replace(f'"{repo}"', f'"{place}"')  # folders instead of repositories
    photo(folder)
    image_tokens = torch.full((9,), 2)  # of one image of the embedded model
    inputs = {
        "input_ids": torch.cat((image_tokens, torch.arange(5, 25)))[None],
        "attention_mask": torch.ones(1, 29, dtype=torch.int64),
        "pixel_values": torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0)),
    }
    torch.save(inputs, folder / "inputs.pt")
    command = [sys.executable, "-c", WITHOUT_US + LOGITS + example, str(base), str(adapter)]
    run = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return Plain(inputs, load_file(folder / "logits.safetensors"), run.stdout)


def test_a_plainly_loaded_adapter_computes_the_same_logits(plain: Plain, finished: Path) -> None:
    with torch.no_grad():
        ours = load_model(finished / "checkpoint", torch.float32)(**plain.inputs).logits
    torch.testing.assert_close(plain.logits["after"], ours, atol=1e-6, rtol=1e-6)
    difference = plain.logits["after"] - plain.logits["before"]
    assert difference.abs().max() > 0.01  # the adapter does something


def test_the_example_of_the_card_runs_unchanged(plain: Plain) -> None:
    assert re.fullmatch(r" There (is|are) [\w ,]+\.\n", plain.answer)
