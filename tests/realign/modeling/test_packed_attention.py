"""Answers that share a prefix have the log-probabilities and gradients of separate forwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from realign.data.records import Record
from realign.errors import RefusedError
from realign.modeling.collate import PreferenceCollator
from realign.modeling.loading import load_model
from realign.modeling.packed_attention import PackedAttention, packed_attention
from realign.modeling.packing import Packing, choose_layout, why_not_shared
from realign.modeling.processors import load_processor
from realign_kernels import Objective

OBJECTIVES = {2: Objective.dpo(0.1), 3: Objective.rdpo(0.1), 4: Objective.symmetric(0.1)}


@pytest.fixture(scope="module")
def processor(model_dir) -> Any:
    return load_processor(model_dir)


@pytest.fixture
def model(model_dir) -> Any:
    return load_model(model_dir, torch.float32).train()


def score(
    model: nn.Module, processor: Any, rows: list[Record], cells: int, *, shared_prefix: bool
) -> tuple[Any, dict[str, Tensor]]:
    """The loss's output and the gradients."""
    batch = PreferenceCollator(processor, cells, shared_prefix=shared_prefix)(rows)
    del batch["ids"]
    model.zero_grad()
    output = model(**batch, objective=OBJECTIVES[cells])
    output.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output, gradients


def assert_equal_forwards(model: nn.Module, processor: Any, rows: list[Record], cells: int) -> None:
    """Compare outputs and the gradient of every parameter.

    The tolerance in float32 is its rounding, and in float64 that of the layers that always compute
    in float32 (RMSNorm, RoPE).
    """
    for dtype, of_logps, of_gradients in (
        (torch.float32, 1e-6, 1e-5),
        (torch.float64, 1e-7, 1e-6),
    ):
        model.to(dtype)
        separate, by_separate = score(model, processor, rows, cells, shared_prefix=False)
        shared, by_shared = score(model, processor, rows, cells, shared_prefix=True)
        assert torch.equal(shared.num_tokens, separate.num_tokens)
        error = (shared.logps - separate.logps).abs()
        assert (error <= 10 * of_logps + of_logps * separate.logps.abs()).all(), error
        assert by_shared.keys() == by_separate.keys()
        difference, total = (
            torch.stack([part.norm() for part in parts]).norm()
            for parts in (
                [by_shared[name] - by_separate[name] for name in by_separate],
                by_separate.values(),
            )
        )
        assert difference <= of_gradients * total
    # a key's bias changes no softmax: its gradient is rounding and nothing else
    for name, expected in by_separate.items():
        assert (by_shared[name] - expected).norm() <= 1e-5 * expected.norm() + 1e-9 * total, name
    model.float()


def lengthened(rows: list[Record]) -> list[Record]:
    """Answers of several lengths: y_l longer, shorter, and as long as y_w."""
    changed = []
    for number, row in enumerate(rows):
        longer = " ".join([row.rejected] * 2)
        which = ({"rejected": longer}, {"chosen": longer}, {})[number % 3]
        changed.append(dataclasses.replace(row, **which))
    return changed


@pytest.mark.parametrize("cells", [2, 3, 4])
def test_packed_log_probabilities_and_gradients_equal_separate_forwards(
    model, processor, records, cells: int
) -> None:
    assert_equal_forwards(model, processor, lengthened(records(3)), cells)


def test_gradient_checkpointing_gives_equal_forwards(model, processor, records) -> None:
    # transformers 5.23 renamed it
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    assert_equal_forwards(model, processor, lengthened(records(2)), 3)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda row: dataclasses.replace(row, rejected_images=()), id="no-image-pair"),
        pytest.param(
            lambda row: dataclasses.replace(row, images=(), rejected_images=()), id="text-only"
        ),
        pytest.param(
            lambda row: dataclasses.replace(
                row, images=row.images * 2, rejected_images=row.rejected_images * 2
            ),
            id="two-images",
        ),
    ],
)
def test_rows_of_every_kind_can_share_a_batch(
    model, processor, records, change: Callable[[Record], Record]
) -> None:
    first, second, third = lengthened(records(3))
    assert_equal_forwards(model, processor, [first, change(second), third], 3)
    assert_equal_forwards(model, processor, [change(first), change(second)], 3)


def test_an_answer_does_not_attend_to_the_other_answer(model, processor, records) -> None:
    (row,) = records(1)
    other = dataclasses.replace(row, rejected="Something else altogether, and much longer. " * 3)
    with torch.no_grad():
        (a, _), (b, _) = (score_without_gradient(model, processor, r) for r in (row, other))
    assert (a[0, 0] - b[0, 0]).abs() <= 1e-5
    assert (a[2, 0] - b[2, 0]).abs() <= 1e-5
    assert (a[1, 0] - b[1, 0]).abs() > 1


def score_without_gradient(model, processor, row: Record) -> tuple[Tensor, Tensor]:
    batch = PreferenceCollator(processor, 3, shared_prefix=True)([row])
    del batch["ids"]
    output = model(**batch)
    return output.logps, output.num_tokens


@pytest.mark.parametrize("shared_prefix", [False, True])
def test_an_image_of_several_rows_is_encoded_once(
    model, processor, records, shared_prefix: bool
) -> None:
    first, second = records(2)
    again = dataclasses.replace(second, images=first.images, id="again")
    encoded = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len(kwargs.get("pixel_values", *args))),
        with_kwargs=True,
    )
    score(model, processor, [first, again], 3, shared_prefix=shared_prefix)
    assert sum(encoded) == 3  # one original for both, two retrieved
    assert_equal_forwards(model, processor, [first, again], 3)


def test_masks_are_built_without_reading_values_from_the_device() -> None:
    """Gemma's looks up which tokens are images. A tensor on ``meta`` has none to read, a GPU's host
    would wait for it.
    """
    packed = PackedAttention(Packing.of([(5, (3, 2)), (4, (2,))]))
    is_image = torch.zeros(1, 16, dtype=torch.bool, device="meta")
    packed.mask_functions.append(
        lambda batch, head, query, key: is_image[batch, query] & is_image[batch, key]
    )
    for row in packed.packing.rows:
        for answer, length in enumerate(row.answers):
            mask = packed.mask(0, row, answer, torch.device("meta"))
            queries = length if answer else row.prefix + length
            assert mask is not None
            assert mask.shape == (queries, row.prefix + length)


def test_ordinary_calls_of_the_model_are_unchanged(model, model_dir, processor, records) -> None:
    (row,) = records(1)
    batch = processor(
        text=["USER: <image>\nWhat is this? ASSISTANT:"],
        images=[row.open_images()],
        return_tensors="pt",
    )
    plain = type(model).from_pretrained(model_dir, attn_implementation="sdpa")
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
        assert torch.equal(
            model.generate(**batch, max_new_tokens=8), plain.generate(**batch, max_new_tokens=8)
        )
    assert "realign" not in model.config.to_json_string()


def test_reasons_against_sharing_prompts_are_named(model, capsys) -> None:
    assert why_not_shared(model) is None
    assert choose_layout(model) == "shared prefix"
    assert choose_layout(model, shared_prefix=False) == "separate"
    text = model.config.get_text_config()
    text.layer_types = ["linear_attention", "full_attention"]
    assert why_not_shared(model) == "LlamaModel has layers of type linear_attention"
    assert choose_layout(model) == "separate"
    assert "a row for every answer instead of a shared prefix" in capsys.readouterr().err
    with pytest.raises(RefusedError, match="shared_prefix must not be true for this model"):
        choose_layout(model, shared_prefix=True)
    text.layer_types = None
    text._attn_implementation = "flex_attention"
    assert "attention 'flex_attention' is not one of sdpa" in str(why_not_shared(model))


def test_packing_has_the_longest_answer_first() -> None:
    packing = Packing.of([(4, (3, 2)), (5, (1,))])
    first, second = packing.rows
    assert first.answer_starts == (4, 7)
    assert second.start == first.end == 9
    assert first.predicting(0) == [3, 4, 5]
    assert first.predicting(1) == [3, 7]
    assert second.predicting(0) == [13]
    with pytest.raises(ValueError, match="the longest first"):
        Packing.of([(4, (2, 3))])
    with packed_attention(packing) as arguments:
        assert arguments["packed"].packing is packing
