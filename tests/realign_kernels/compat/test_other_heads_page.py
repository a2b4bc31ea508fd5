"""The Python of docs/guides/trainers/other-heads.md on verl and Liger runs, and gives numbers."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

PAGE = Path(__file__).parents[3] / "docs" / "guides" / "trainers" / "other-heads.md"
SECTIONS = dict(
    re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
)
BLOCKS = {
    f"{peer} {number}": block
    for peer in ("verl", "Liger")
    for number, block in enumerate(
        re.findall(r"```python\n(.*?)```", SECTIONS[f"Coming from {peer}"], re.DOTALL)
    )
}
# What the blocks replace; verl itself cannot be installed beside what this project needs.
REPLACED = {
    "verl.utils.experimental.torch_functional": "FusedLinearForPPO",
    "verl.utils.kernel.linear_cross_entropy": "linear_cross_entropy",
    "verl.models.mcore.model_forward_1f1b_overlap": "linear_cross_entropy",
    "verl.models.mcore.model_forward_fused": "linear_cross_entropy",
}


def make_names():
    """The names that the blocks use without making them."""
    torch.manual_seed(0)
    heads = [torch.nn.Linear(8, 31, bias=False) for _ in range(2)]
    return {
        "torch": torch,
        "F": F,
        "hidden_states": torch.randn(4, 6, 8, requires_grad=True),
        "ref_hidden_states": torch.randn(4, 6, 8),
        "labels": torch.randint(0, 31, (4, 6)),
        "lm_head": heads[0],
        "ref_lm_head": heads[1],
        "ref_logps": torch.full((2, 2), -20.0),
        "temperature": 0.7,
        "smoothing": 0.1,
    }


@pytest.fixture
def verl(monkeypatch):
    """Stand-ins for the modules of verl that are changed, each with the name that is replaced."""
    modules = {}
    for path, name in REPLACED.items():
        parts = path.split(".")
        for count in range(1, len(parts) + 1):
            package = ".".join(parts[:count])
            modules.setdefault(package, types.ModuleType(package))
            parent, _, child = package.rpartition(".")
            if parent:
                setattr(modules[parent], child, modules[package])
        setattr(modules[path], name, None)
    for path, module in modules.items():
        monkeypatch.setitem(sys.modules, path, module)
    return modules


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.usefixtures("verl")
def test_a_code_block_of_the_page_runs(block):
    names = make_names()
    exec(compile(block, str(PAGE), "exec"), names)
    assert not names["hidden_states"].isnan().any()
    for name in {"loss", "logprobs", "log_probs", "nll"} & names.keys():
        assert names[name].isfinite().all()
        assert names[name].requires_grad


def test_every_use_of_the_function_in_verl_is_replaced(verl):
    from realign_kernels.compat import verl as ours

    for name, block in BLOCKS.items():
        if "import verl." in block:
            assert name.startswith("verl")
            exec(compile(block, str(PAGE), "exec"), make_names())
    for path, name in REPLACED.items():
        assert getattr(verl[path], name) is getattr(ours, name)


def test_a_precomputed_reference_equals_that_of_the_model():
    by_model, _, by_cache, *_ = (
        block for name, block in BLOCKS.items() if name.startswith("Liger")
    )
    names = make_names(), make_names()
    for block, own in zip((by_model, by_cache), names, strict=True):
        exec(compile(block, str(PAGE), "exec"), own)
    torch.testing.assert_close(names[0]["loss"], names[1]["loss"])


def test_the_written_out_loss_equals_robust_dpo():
    block = next(block for block in BLOCKS.values() if "smoothing" in block)
    names = make_names()
    exec(compile(block, str(PAGE), "exec"), names)
    log_probs = names["lm_head"](names["hidden_states"]).log_softmax(dim=-1)
    logps = log_probs.gather(-1, names["labels"][..., None]).squeeze(-1).sum(dim=1).view(2, 2)
    ratios = logps - names["ref_logps"]
    x = 0.1 * (ratios[0] - ratios[1])
    clean, flipped = -F.logsigmoid(x), -F.logsigmoid(-x)
    torch.testing.assert_close(names["loss"], ((0.9 * clean - 0.1 * flipped) / 0.8).mean())
