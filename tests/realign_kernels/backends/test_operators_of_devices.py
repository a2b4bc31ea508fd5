"""The plain kernels use only operators of torch that Apple's GPUs have, by torch's own table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchgen
import yaml

from realign_kernels import linear_logprob_stats, rdpo_loss
from realign_kernels.testing import make_head_inputs

COMPOSITE = {f"Composite{kind}" for kind in (
    "ImplicitAutograd", "ExplicitAutograd", "ExplicitAutogradNonFunctional"
)}  # fmt: skip
TABLE = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"


def operators_of(device):
    """All operators, and those of them that run on a device in any of their forms."""
    functions = {
        entry["func"].split("(")[0]: entry for entry in yaml.safe_load(TABLE.read_text("utf-8"))
    }
    every, supported = set(), set()
    for name, entry in functions.items():
        entry = functions[entry.get("structured_delegate", name)]
        keys = {key.strip() for keys in entry.get("dispatch", {}) for key in keys.split(",")}
        every.add(name.split(".")[0])
        if not keys or keys & {device, *COMPOSITE}:
            supported.add(name.split(".")[0])
    return every, supported


def call(memory):
    inputs = make_head_inputs(12, 11, 8, torch.float32, bias=True, rank=2).as_leaves()
    inputs.lm_head_weight.requires_grad_(memory != "frozen")
    options = {**inputs.options, "backend": "eager", "logit_softcap": 5.0}
    options["memory"] = "auto" if memory == "frozen" else memory
    ids, ref_logps = torch.arange(6).repeat_interleave(2), torch.zeros(3, 2)
    packed = rdpo_loss(
        *inputs.tensors[:2], inputs.labels, ref_logps, sequence_ids=ids, statistics=True,
        rejected_scoring="top_non_label", token_weights=torch.ones(12), **options,
    )  # fmt: skip
    padded = rdpo_loss(
        inputs.hidden_states.view(6, 2, 8), inputs.lm_head_weight, inputs.labels.view(6, 2),
        ref_logps, **options,
    )  # fmt: skip
    total = packed.loss + packed.logps.sum() + padded.loss
    if memory != "tile":
        options = {key: value for key, value in options.items() if key in ("backend", "memory")}
        stats = linear_logprob_stats(*inputs.tensors[:2], inputs.labels, **options)
        total = total + stats.token_logps.sum() + stats.entropy.sum() + stats.lse.sum()
    total.backward()


@pytest.mark.full  # it reads a table of 16,000 lines
def test_every_operator_runs_on_mps():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for memory in ("frozen", "stash", "recompute", "tile"):
            call(memory)
    used = {event.name[6:] for event in profile.events() if event.name.startswith("aten::")}
    every, supported = operators_of("MPS")
    assert {"mm", "searchsorted", "index_add_"} <= used & every
    # An older torch may lack this one; it is used where lengths are given, and by tiles.
    assert used & every - supported <= {"nonzero_static"}
