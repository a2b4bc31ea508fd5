"""The files of a call in the order in which they are entered, and the steps done once a call."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import realign_kernels
from realign_kernels import rdpo_loss

PACKAGE = Path(realign_kernels.__file__).parent
PAGE = PACKAGE.parent / "docs" / "guides" / "head.md"


@pytest.fixture(params=[False, True], ids=["frozen", "trainable"])
def entered(request):
    """Functions of the package that one packed loss and its backward enter, in order."""
    hidden_states = torch.randn(18, 8, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=request.param)
    labels, sequence_ids = torch.arange(18), torch.arange(18) % 6

    def step():
        rdpo_loss(
            hidden_states, weight, labels, torch.zeros(3, 2), sequence_ids=sequence_ids
        ).loss.backward()

    functions = []

    def profile(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in path.parents:
            functions.append((path.relative_to(PACKAGE).as_posix(), frame.f_code.co_name))

    step()  # what is loaded and cached at the first call
    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(None)
    return functions


def test_a_call_passes_through_the_files_named_on_the_page(entered):
    walked = list(dict.fromkeys(file for file, _ in entered))
    section = PAGE.read_text(encoding="utf-8").split("## The files of a call")[1].split("\n## ")[0]
    named = re.findall(r"^\d+\. `([\w/]+\.py)`", section, flags=re.MULTILINE)
    assert walked == named
    assert len(walked) <= 12


def test_head_and_options_are_checked_once(entered):
    counts = Counter(name for _, name in entered)
    for name in ("check_options", "check_head", "check_call", "resolve_backend"):
        assert counts[name] == 1, name


def test_options_are_assembled_once(monkeypatch):
    module = sys.modules["realign_kernels.rdpo_loss"]
    made = []
    monkeypatch.setattr(
        module, "HeadOptions", lambda original=module.HeadOptions, **options: (
            made.append(1) or original(**options)
        ),
    )  # fmt: skip
    rdpo_loss(torch.zeros(6, 3, 2), torch.zeros(5, 2), torch.zeros(6, 3).long(), torch.zeros(3, 2))
    assert made == [1]
