"""The Python of docs/guides/trainers/other-heads.md on torch and Cut Cross-Entropy is right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

PAGE = Path(__file__).parents[3] / "docs" / "guides" / "trainers" / "other-heads.md"
SECTIONS = dict(
    re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
)
V, D = 31, 8


def blocks(section):
    return re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL)


def run(block, **names):
    """Return the loss of a block, and the loss that anyone would write."""
    names |= {"torch": torch, "lm_head": torch.nn.Linear(D, V, bias=False)}
    names["hidden_states"].requires_grad_()
    exec(compile(block, str(PAGE), "exec"), names)
    assert names["loss"].requires_grad
    return names["loss"], names["lm_head"](names["hidden_states"])


@pytest.mark.parametrize("block", blocks("Coming from torch"))
def test_a_code_block_on_torch_runs(block):
    labels = torch.randint(0, V, (6,))
    labels[2] = -100
    loss, logits = run(block, hidden_states=torch.randn(6, D), labels=labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))


@pytest.mark.parametrize("block", blocks("Coming from Cut Cross-Entropy"))
def test_a_code_block_on_cut_cross_entropy_runs(block):
    labels = torch.randint(0, V, (4, 6))
    labels[1, :3] = -100
    loss, logits = run(block, hidden_states=torch.randn(4, 6, D), labels=labels)
    logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    if "softcap" in block:
        logits = 30 * torch.tanh(logits / 30)
    expected = F.cross_entropy(logits, labels)
    if "lse" in block:
        expected = expected + 1e-4 * logits.logsumexp(-1)[labels != -100].square().mean()
    torch.testing.assert_close(loss, expected)


def test_every_section_of_the_page_has_its_code_blocks():
    assert len(blocks("Coming from torch")) == 2
    assert len(blocks("Coming from Cut Cross-Entropy")) == 3
