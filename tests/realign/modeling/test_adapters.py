"""Adapters: where they go, what trains beside them, targets that match nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from realign.errors import RefusedError
from realign.modeling.adapters import add_adapter
from realign.modeling.loading import load_model
from realign.modeling.parts import part_of

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]


def adapted(model_dir: Path, dtype: torch.dtype = torch.float32, **options):
    given = {"rank": 2, "alpha": 4, "targets": "all-linear", "freeze_vision": True, **options}
    return add_adapter(load_model(model_dir, dtype), **given)


def trained(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, {"projector", "language"}),
        ({"freeze_vision": False}, {"vision", "projector", "language"}),
        ({"freeze_projector": True}, {"language"}),
        ({"freeze_language": True}, {"projector"}),
        # the authors' names occur in the CLIP tower too
        ({"targets": QKVO}, {"language"}),
        ({"targets": ["q_proj"], "freeze_vision": False}, {"vision", "language"}),
        ({"targets": r".*layers\.0\.mlp\.up_proj"}, {"language"}),
    ],
)
def test_adapters_are_on_the_parts_that_train(model_dir, options, parts: set[str]) -> None:
    names = trained(adapted(model_dir, **options))
    assert all("lora_" in name for name in names)
    assert {part_of(name) for name in names} == parts
    assert not [name for name in names if "lm_head" in name]


def test_the_projector_trains_in_full_and_in_float32(model_dir) -> None:
    model = adapted(model_dir, torch.bfloat16, train_projector=True)
    of_projector = {n: p for n, p in trained(model).items() if part_of(n) == "projector"}
    assert len(of_projector) == 4  # two linear layers with biases
    assert not [name for name in of_projector if "lora_" in name]
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    projector = model.get_base_model().model.multi_modal_projector
    features = torch.randn(1, 9, projector.original_module.linear_1.in_features).bfloat16()
    # before its first update, it computes what the reference does
    assert torch.equal(projector(features), projector.original_module(features))
    # updates that bfloat16 cannot hold are kept
    weight = of_projector[next(name for name in of_projector if name.endswith("weight"))]
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1e-5)
    assert (weight != before).all()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"targets": ["q_proj", "qproj"]}, r"got 'qproj', which matches none\. Layers: .*q_proj"),
        ({"targets": ["linear_1"], "freeze_projector": True}, r"'linear_1'.*frozen: projector"),
        ({"targets": ".*nothing"}, r"got '\.\*nothing', which matches none"),
        (
            {"freeze_language": True, "freeze_projector": True},
            "got 'all-linear', which matches none.*frozen: language, projector, vision",
        ),
    ],
)
def test_targets_that_match_nothing_are_refused(model_dir, options, reason: str) -> None:
    with pytest.raises(RefusedError, match=f"^lora.targets must name .*{reason}"):
        adapted(model_dir, **options)


def test_a_model_without_a_projector_cannot_train_one() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(RefusedError, match="train_projector must not be set for Sequential"):
        add_adapter(
            model, rank=1, alpha=1, targets=["0"], freeze_vision=False, train_projector=True
        )


def test_adapters_are_float32_and_compute_in_the_16_bit_dtype_of_the_base(model_dir) -> None:
    model = adapted(model_dir, torch.bfloat16)
    layer = next(
        m
        for n, m in model.named_modules()
        if n.endswith("language_model.layers.0.self_attn.q_proj")
    )
    first, second = layer.lora_A["default"], layer.lora_B["default"]
    assert first.weight.dtype == second.weight.dtype == torch.float32
    with torch.no_grad():
        second.weight.normal_(generator=torch.Generator().manual_seed(0))
    seen = []
    first.register_forward_hook(lambda module, args, output: seen.append((*args, output)))
    states = torch.randn(3, first.in_features).bfloat16()
    output = layer(states)
    output.float().sum().backward()
    ((given, low_rank),) = seen
    assert given.dtype == low_rank.dtype == output.dtype == torch.bfloat16
    expected = (states @ first.weight.bfloat16().T) @ second.weight.bfloat16().T * 2
    assert torch.equal(output, layer.base_layer(states) + expected)
    assert first.weight.grad.dtype == second.weight.grad.dtype == torch.float32
    assert first.weight.grad.abs().sum() > 0
