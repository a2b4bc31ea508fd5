"""Which parameters are of the vision tower, the projector and the language model."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from realign.errors import RefusedError
from realign.modeling.loading import load_model
from realign.modeling.parts import (
    freeze_parts,
    frozen_parts,
    part_of,
    parts_pattern,
    projector_modules,
)

# names as transformers 5.23 has them
NAMES = {
    "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1": "vision",  # LLaVA, Gemma-3
    "model.multi_modal_projector.linear_1": "projector",
    "model.image_newline": "projector",  # LLaVA-1.6
    "model.language_model.layers.0.self_attn.q_proj": "language",
    "lm_head": "language",
    "model.visual.blocks.0.attn.qkv": "vision",  # Qwen2-VL and later
    "model.visual.merger.mlp.0": "projector",
    "model.visual.deepstack_merger_list.0.linear_fc1": "projector",  # Qwen3-VL
    "model.connector.modality_projection.proj": "projector",  # Idefics3, SmolVLM
    "model.text_model.layers.0.mlp.up_proj": "language",
    "model.vision_model.embeddings.patch_embedding": "vision",
    "model.aligner.fc1": "projector",  # Janus
    "model.vqmodel.encoder.conv_in": "unused",
    "model.generation_aligner.fc1": "unused",
}


@pytest.mark.parametrize(("name", "part"), NAMES.items())
def test_parameter_names_of_every_family_map_to_parts(name: str, part: str) -> None:
    assert part_of(name) == part
    assert part_of(f"base_model.model.{name}.lora_A.default.weight") == part
    for other in ("vision", "projector", "language", "unused"):
        assert bool(re.fullmatch(parts_pattern({other}), name)) == (other == part), other
    assert re.fullmatch(parts_pattern({"vision", part}), name)


def test_exactly_the_requested_parts_are_frozen(model_dir) -> None:
    for frozen in ({"vision"}, {"projector"}, {"language"}, {"vision", "language"}):
        model = load_model(model_dir, torch.float32)
        options = {name: name in frozen for name in ("vision", "projector", "language")}
        freeze_parts(model, frozen_parts(**options))
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad != (part_of(name) in frozen), name


def test_nothing_to_train_is_refused(model_dir) -> None:
    model = load_model(model_dir, torch.float32)
    parts = frozen_parts(vision=True, projector=True, language=True)
    with pytest.raises(RefusedError, match="something to train, got language, projector, vision"):
        freeze_parts(model, parts)


@pytest.mark.parametrize("part", ["vision", "projector"])
def test_freezing_a_missing_part_is_refused(part: str) -> None:
    with pytest.raises(RefusedError, match=rf"Linear has no {part} named .*freeze_{part} to false"):
        freeze_parts(nn.Linear(1, 1), {part})


def test_projector_modules_are_the_outermost_callable_modules() -> None:
    visual = nn.Module()
    visual.merger = nn.Sequential(nn.Linear(1, 1))
    visual.deepstack_merger_list = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    model = nn.Module()
    model.visual = visual
    names = [name for name, _ in projector_modules(model)]
    assert names == [
        "visual.merger",
        "visual.deepstack_merger_list.0",
        "visual.deepstack_merger_list.1",
    ]
