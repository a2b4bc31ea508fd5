"""A trained adapter in plain transformers and peft, in a process that has neither of our packages,
and the example of its card.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from realign.modeling.loading import load_model
from realign.review.cards.card import write_card
from realign.review.cards.model_card import CardOptions
from tests.realign.review.cards.conftest import BASE, photo

WITHOUT_US = "import sys\nsys.modules['realign'] = sys.modules['realign_kernels'] = None\n"
PLAIN = """
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

base, adapter, out = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(base)
inputs = torch.load(f"{out}/inputs.pt", weights_only=True)
with torch.no_grad():
    before = model(**inputs).logits
    logits = PeftModel.from_pretrained(model, adapter).eval()(**inputs).logits
save_file({"before": before, "logits": logits}, f"{out}/plain.safetensors")
"""


def test_it_computes_the_same_logits(finished: Path, tmp_path: Path) -> None:
    image_tokens = torch.full((9,), 2)  # of one image of the embedded model
    inputs = {
        "input_ids": torch.cat((image_tokens, torch.arange(5, 25)))[None],
        "attention_mask": torch.ones(1, 29, dtype=torch.int64),
        "pixel_values": torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0)),
    }
    torch.save(inputs, tmp_path / "inputs.pt")
    places = [finished.parent / "base", finished / "checkpoint", tmp_path]
    command = [sys.executable, "-c", WITHOUT_US + PLAIN, *map(str, places)]
    subprocess.run(command, check=True)
    plain = load_file(tmp_path / "plain.safetensors")
    with torch.no_grad():
        ours = load_model(finished / "checkpoint", torch.float32)(**inputs).logits
    torch.testing.assert_close(plain["logits"], ours, atol=1e-6, rtol=1e-6)
    assert (plain["logits"] - plain["before"]).abs().max() > 0.01  # the adapter does something


def test_the_example_of_the_card_runs_as_it_stands(run: Path, finished: Path, tmp_path) -> None:
    text = write_card(run, CardOptions(repo="user/aligned", base_model=BASE)).read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    # the two repositories are folders here
    for repo, folder in ((BASE, finished.parent / "base"), ("user/aligned", run / "checkpoint")):
        assert f'"{repo}"' in example
        example = example.replace(f'"{repo}"', f'"{folder}"')
    photo(tmp_path)
    answer = subprocess.run(
        [sys.executable, "-c", WITHOUT_US + example],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.startswith(" There ")
