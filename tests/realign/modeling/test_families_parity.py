"""Every family scores the same in both layouts, and the same as a stock call on each sequence."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from realign.data.images import decode_image
from realign.errors import RefusedError
from realign.modeling.adapters import add_adapter
from realign.modeling.families import process
from realign.modeling.packing import choose_layout, why_not_shared
from realign.modeling.parts import VISION_MODULES, part_of
from realign.modeling.positions import rope_positions
from realign.modeling.preference_forward import attach_preference_forward
from realign_kernels import Objective
from tests.realign.modeling.families.family import Family
from tests.realign.modeling.families.pairs import all_kinds
from tests.realign.modeling.families.registry import FAMILIES, SEPARATE, SLIDING
from tests.realign.modeling.families.scoring import (
    collate,
    stock_inputs,
    stock_token_logps,
    token_logps,
)

SHARED = {**FAMILIES, **SLIDING}
ALL = {**SHARED, **SEPARATE}
TOKEN, SUM = 1e-5, 1e-6  # per token, and relative to a sum: what the project promises in float32
QUICK = ("llava-1.5", "llava-1.6-mistral-sliding", "qwen3-vl", "gemma-3", "paligemma", "janus")
SLOW = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in SHARED]
EXACT = 1e-10  # in float64, where a wrong mask or position would still show as 1e-3


def attached(name: str, dtype: torch.dtype) -> Family:
    family = ALL[name]()
    family.model.to(dtype)
    attach_preference_forward(family.model)
    return family


@pytest.mark.parametrize("name", ALL)
def test_log_probs_are_those_of_stock_calls(name: str) -> None:
    records = all_kinds()
    expected = stock_token_logps(ALL[name](), records, cells=4)
    family = attached(name, torch.float32)
    for shared in (True, False) if name in SHARED else (False,):
        with torch.no_grad():
            found = token_logps(family, collate(family, records, 4, shared=shared))
        assert found.keys() == expected.keys()
        for sequence, logps in found.items():
            torch.testing.assert_close(logps.double(), expected[sequence], atol=TOKEN, rtol=0)
            total = expected[sequence].sum()
            assert abs(logps.double().sum() - total) <= TOKEN + SUM * abs(total)


def step(family: Family, cells: int, *, shared: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities (cells, pairs) and gradients of one step."""
    records = all_kinds()
    batch = collate(family, records, cells, shared=shared)
    del batch["ids"]
    objective = {2: Objective.dpo(), 3: Objective.rdpo(), 4: Objective.symmetric()}[cells]
    ref_logps = torch.linspace(-40, -60, cells * len(records), dtype=family.model.dtype)
    model: Any = family.model
    model.zero_grad()
    output = model(**batch, ref_logps=ref_logps.view(cells, -1), objective=objective)
    output.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.logps, grads


def assert_same_gradients(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> None:
    """Relative to the largest gradient of the model: a bias before a softmax has none but noise."""
    assert found.keys() == expected.keys()
    largest = max(grad.norm() for grad in expected.values())
    for name, grad in expected.items():
        error = (found[name] - grad).norm()
        assert error <= tolerance * max(grad.norm(), 1e-2 * largest), (name, error, grad.norm())


@pytest.mark.parametrize(
    ("name", "cells"),
    [*((name, 4) for name in SHARED), ("llava-1.5", 2), ("qwen2.5-vl", 2), ("gemma-3", 2)],
)
def test_layouts_agree_to_rounding_in_float64(name: str, cells: int) -> None:
    family = attached(name, torch.float64)
    logps, grads = step(family, cells, shared=True)
    expected_logps, expected_grads = step(family, cells, shared=False)
    torch.testing.assert_close(logps, expected_logps, atol=EXACT, rtol=EXACT)
    # norms compute in float32 in any model
    assert_same_gradients(grads, expected_grads, 1e-6)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.full) for name in SHARED]
)
def test_gradients_agree_in_float32(name: str) -> None:
    family = attached(name, torch.float32)
    logps, grads = step(family, 3, shared=True)
    expected_logps, expected_grads = step(family, 3, shared=False)
    torch.testing.assert_close(logps, expected_logps, atol=TOKEN, rtol=SUM)
    assert_same_gradients(grads, expected_grads, 1e-5)


@pytest.mark.parametrize("name", SLOW)
def test_gradient_checkpointing_gives_equal_gradients(name: str) -> None:
    family = attached(name, torch.float32)
    _, expected = step(family, 3, shared=True)
    family.model.train()
    # transformers 5.23 renamed it
    enable = getattr(family.model, "activation_checkpointing_enable", None)
    (enable or family.model.gradient_checkpointing_enable)()
    layers = [m for m in family.model.modules() if getattr(m, "gradient_checkpointing", False)]
    assert layers
    _, found = step(family, 3, shared=True)
    assert_same_gradients(found, expected, 1e-6)


@pytest.mark.parametrize("name", SLOW)
def test_gradients_of_adapters_agree(name: str) -> None:
    family = attached(name, torch.float32)
    adapted = add_adapter(family.model, rank=4, alpha=8, targets="all-linear", freeze_vision=True)
    adapters = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert adapters
    assert not [n for n in adapters if part_of(n) == "vision"]
    with torch.no_grad():
        for parameter in adapters.values():  # B begins at 0, and A without a gradient
            parameter.copy_(0.3 * torch.randn_like(parameter))
    family = Family(adapted, family.processor)
    logps, grads = step(family, 3, shared=True)
    expected_logps, expected_grads = step(family, 3, shared=False)
    assert grads.keys() == adapters.keys()  # none on parts that only draw (Janus)
    torch.testing.assert_close(logps, expected_logps, atol=TOKEN, rtol=SUM)
    assert_same_gradients(grads, expected_grads, 1e-5)


@pytest.mark.parametrize(
    ("name", "shared"), [*((name, True) for name in FAMILIES), ("llava-1.5", False)]
)
def test_each_set_of_images_is_encoded_once(name: str, shared: bool) -> None:
    family = attached(name, torch.float32)
    # five sets among the fourteen images of sixteen sequences
    records = all_kinds()
    batch = collate(family, records, 4, shared=shared)
    sizes: list[int] = []
    modules = family.model.named_modules()
    tower = next(module for name, module in modules if name.rpartition(".")[2] in VISION_MODULES)
    tower.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(_first_size(args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        token_logps(family, batch)
    sets = {images for row in records for images in (row.images, row.rejected_images) if images}
    assert sorted(batch["images"].counts) == sorted(map(len, sets))
    alone = process(
        family.processor,
        [family.processor.image_token * len(images) for images in sets],
        [[decode_image(image, "") for image in images] for images in sets],
        add_special_tokens=False,
    )
    expected = alone["pixel_values"]
    if "image_sizes" in alone or "pixel_attention_mask" in alone:  # padded tiles are not encoded
        expected = expected[expected.flatten(2).abs().sum(-1) > 0]
    assert sizes == [len(expected)]


def _first_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    (pixels,) = (*args[:1], *([kwargs["pixel_values"]] if "pixel_values" in kwargs else []))
    return len(pixels)


@pytest.mark.parametrize("name", FAMILIES)
def test_images_used_by_no_row_do_not_change_the_log_probs(name: str) -> None:
    family = attached(name, torch.float32)
    model: Any = family.model
    *with_images, text_only = all_kinds()
    batch = collate(family, [text_only], 3, shared=True)
    filled = collate(family, with_images, 3, shared=True)
    del batch["ids"]
    expected = model(**batch).logps
    unseen = {key: filled[key] for key in filled.keys() - batch.keys() - {"ids"}}
    output = model(**batch, unseen_images=unseen)
    assert torch.equal(output.logps, expected)
    output.loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if part_of(n) == "projector"]
    assert grads
    assert all(grad is not None and not grad.any() for grad in grads)


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_positions_are_those_of_single_sequences(name: str) -> None:
    family = attached(name, torch.float32)
    body: Any = family.model.model
    records = all_kinds()
    for shared in (True, False):
        batch = collate(family, records, 4, shared=shared)
        packing = batch["packing"]
        found = rope_positions(body, batch, packing, batch["images"])
        assert found is not None
        assert found.shape == (3, *batch["input_ids"].shape)
        ids, index = batch["sequence_ids"], batch["answer_index"]
        for sequence in sorted(set(ids.tolist())):
            cell, pair = divmod(sequence, len(records))
            inputs, start = stock_inputs(family, records[pair], cell)
            expected, _ = body.get_rope_index(
                inputs["input_ids"], inputs["mm_token_type_ids"], inputs.get("image_grid_thw")
            )
            # of the tokens that predict: the prefix's last one and all of the answer but its last
            predicting = found.flatten(1)[:, index[ids == sequence]]
            assert torch.equal(predicting, expected[:, 0, start - 1 : -1])


@pytest.mark.parametrize("name", SHARED)
def test_listed_families_support_a_shared_prefix(name: str) -> None:
    assert why_not_shared(SHARED[name]().model) is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        # the latter before transformers 5.23, which gave it SDPA
        (
            "paligemma-2",
            "attention 'eager' is not one of sdpa, flash_attention_2|caps its attention scores",
        ),
        ("qwen3.5", "linear_attention"),
    ],
)
def test_families_that_cannot_share_prompts_fall_back_and_report_the_reason(
    name: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = SEPARATE[name]().model
    assert choose_layout(model) == "separate"
    printed = " ".join(capsys.readouterr().err.split())
    assert "a row for every answer instead of a shared prefix" in printed
    assert re.search(reason, printed)
    with pytest.raises(RefusedError, match="shared_prefix must not be true for this model"):
        choose_layout(model, shared_prefix=True)


@pytest.mark.parametrize(("name", "seen"), [("gemma-3", "images"), ("paligemma", "prompts")])
def test_flash_attention_is_refused_for_masks_it_would_ignore(name: str, seen: str) -> None:
    model = FAMILIES[name]().model
    model.config.get_text_config()._attn_implementation = "flash_attention_2"
    with pytest.raises(
        RefusedError, match=f"attention must be sdpa for .* attends to {seen} in both"
    ):
        attach_preference_forward(model)
