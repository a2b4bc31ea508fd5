"""Adapters that vLLM can serve are recognised by the names of their weights.

The rule is written here from its sources a second time: `vllm/lora/utils.py` takes names of
``base_model.model.``, a module, and ``lora_A.weight`` or ``lora_B.weight``; the weight mappers of
its models (`hf_to_vllm_mapper`) then rename ``model.language_model.`` to ``language_model.model.``,
and `vllm/lora/lora_model.py` wants the last part of the module to be a linear layer of the model.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from realign.modeling.adapters import add_adapter, quiet_peft
from realign.modeling.loading import load_model
from realign.review.cards.card import write_card
from realign.review.cards.model_card import CardOptions
from realign.review.cards.serving import max_lora_rank, obstacles, weight_names
from tests.realign.review.cards.conftest import BASE

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}  # of Llama


def parsed(name: str) -> tuple[str, str]:
    """Module of vLLM and half of the adapter, for a name that it reads."""
    parts = name.split(".")
    assert (parts[:2], parts[-1]) == (["base_model", "model"], "weight")
    assert parts[-2] in ("lora_A", "lora_B")
    module = ".".join(parts[2:-2])
    old, new = "model.language_model.", "language_model.model."
    return (new + module.removeprefix(old) if module.startswith(old) else module), parts[-2]


def test_every_weight_of_a_trained_adapter_is_a_language_model_layer(
    finished: Path,
) -> None:
    checkpoint = finished / "checkpoint"
    weights = load_file(checkpoint / "adapter_model.safetensors")
    assert sorted(weights) == sorted(weight_names(checkpoint))
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in weights.items():
        module, half = parsed(name)
        assert module.startswith("language_model.model.layers.")
        assert module.rpartition(".")[2] in LINEAR
        halves.setdefault(module, {})[half] = weight
    layers = len({module.split(".")[3] for module in halves})
    assert len(halves) == layers * len(LINEAR)
    for pair in halves.values():
        assert pair["lora_A"].shape[0] == pair["lora_B"].shape[1] == 4
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    assert obstacles(config, weights) == []
    assert max_lora_rank(config) == 8


def test_the_card_states_the_vllm_command(run: Path) -> None:
    options = CardOptions(repo="user/aligned", base_model=BASE)
    text = write_card(run, options).read_text()
    command = f"vllm serve {BASE} --enable-lora --max-lora-rank 8"
    assert f"\n{command} --lora-modules aligned=user/aligned\n" in text


@pytest.mark.parametrize(
    ("trained", "reasons"),
    [
        (
            {"train_projector": True},
            ["model.multi_modal_projector trained in full, which vLLM refuses"],
        ),
        ({}, ["it adapts layers of the projector, which vLLM leaves out without an error"]),
        (
            {"freeze_vision": False},
            ["it adapts layers of the projector and the vision tower, which vLLM leaves out"],
        ),
    ],
)
def test_adapters_that_vllm_cannot_serve_are_reported_with_a_remedy(
    trained: dict[str, object], reasons: list[str], run: Path, model_dir: Path
) -> None:
    options = {"rank": 4, "alpha": 8, "targets": "all-linear", "freeze_vision": True, **trained}
    model = load_model(model_dir, torch.float32, name=BASE)
    with quiet_peft():
        add_adapter(model, **options).save_pretrained(run / "checkpoint")
    config = json.loads((run / "checkpoint" / "adapter_config.json").read_text())
    found = obstacles(config, weight_names(run / "checkpoint"))
    assert len(found) == len(reasons)
    for reason, expected in zip(found, reasons, strict=True):
        assert reason.startswith(expected)
    text = write_card(run, CardOptions(repo="user/aligned"), overwrite=True).read_text()
    assert "vLLM does not serve the adapter as it was trained: " in text
    assert "realign merge --model user/aligned --out merged\nvllm serve merged" in text
    assert "--enable-lora" not in text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"peft_type": "IA3"}, "it is of the kind IA3, and vLLM takes LoRA alone"),
        ({"use_dora": True}, "it uses DoRA, which vLLM refuses"),
        ({"bias": "lora_only"}, "it has biases, which vLLM refuses"),
        ({"rank_pattern": {"q_proj": 600}}, "its rank is 600, and vLLM takes at most 512"),
    ],
)
def test_unservable_adapters_are_recognised_by_their_configuration(change, reason: str) -> None:
    config = {"peft_type": "LORA", "r": 16, "bias": "none", **change}
    name = "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.weight"
    assert obstacles(config, [name]) == [reason]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "model.language_model.layers.0.mlp.up_proj.lora_magnitude_vector",
            "it has weights beside lora_A and lora_B, which vLLM refuses",
        ),
        (
            "lm_head.lora_B.weight",
            "it adapts the embedding or the head, which vLLM takes for some models alone",
        ),
    ],
)
def test_weights_outside_the_language_model_are_recognised_by_their_names(
    name: str, reason: str
) -> None:
    found = obstacles({"peft_type": "LORA", "r": 16}, [f"base_model.model.{name}"])
    assert found == [reason]


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (2, 8), (128, 128), (129, 256), (512, 512)])
def test_the_served_rank_is_rounded_up_to_one_that_vllm_accepts(rank: int, served: int) -> None:
    assert max_lora_rank({"r": rank}) == served
