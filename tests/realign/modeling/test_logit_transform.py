"""The transform of logits is found by running the model, whatever its configuration says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from realign.errors import RefusedError
from realign.modeling.loading import attach_preference_forward, load_model
from realign.modeling.logit_transform import LogitTransform, find_logit_transform

TEXT = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14, "projection_dim": 32,
}  # fmt: skip


def tiny(family: str, text: str, vision: str, dtype: torch.dtype, **text_options: Any) -> Any:
    config = CONFIG_MAPPING[family](
        text_config={**TEXT, "model_type": text, **text_options},
        vision_config={**VISION, "model_type": vision},
    )
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()


CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
CAPS_PALIGEMMA = Version(transformers.__version__) >= Version("5.23")  # its forward, on Gemma 2
FAMILIES = {
    "LLaVA": (("llava", "llama", CLIP), {}, LogitTransform()),
    # LLaVA's forward applies none of what its text model would
    "LLaVA on Granite": (("llava", "granite", CLIP), {"logits_scaling": 8.0}, LogitTransform()),
    "Cohere2 Vision": (("cohere2_vision", "cohere2", SIGLIP), {"logit_scale": 0.25},
                       LogitTransform()),
    "PaliGemma": (("paligemma", "gemma2", SIGLIP), {"final_logit_softcapping": 30.0},
                  LogitTransform(softcap=30.0 if CAPS_PALIGEMMA else None)),
    "Gemma 3": (("gemma3", "gemma3_text", SIGLIP), {}, LogitTransform()),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_logit_transform_is_found_from_the_logits_of_the_model(
    family: str, dtype: torch.dtype
) -> None:
    types, options, expected = FAMILIES[family]
    model = tiny(*types, dtype, **options)
    assert find_logit_transform(model) == expected
    assert "forward" not in vars(model.model)  # as it was


SCALES = {"granite_docling": 1 / 8, "hyperclovax_vision_v2": 8.0}


# transformers has Granite Docling since 5.23
@pytest.mark.parametrize(
    ("name", "expected"), [item for item in SCALES.items() if item[0] in CONFIG_MAPPING]
)
def test_logits_scaling_divides_or_multiplies_by_model_type(name: str, expected: float) -> None:
    config = CONFIG_MAPPING[name]()
    text = config.get_text_config()
    for option, value in {**TEXT, "logits_scaling": 8.0}.items():
        setattr(text, option, value)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    head = torch.nn.Linear(32, 128, bias=False)
    model.set_output_embeddings(head)
    assert find_logit_transform(model) == LogitTransform(scale=expected)


@pytest.mark.parametrize("has_zeros", [False, True], ids=["meta", "zeros"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_logit_transform_is_found_without_loaded_weights(family: str, has_zeros: bool) -> None:
    """Other ranks hold empty weights while the first rank reads the model for them."""
    types, options, expected = FAMILIES[family]
    model = tiny(*types, torch.bfloat16, **options).to("meta")
    if has_zeros:
        model.to_empty(device="cpu")
        for weight in model.parameters():
            torch.nn.init.zeros_(weight)
    weight = model.get_output_embeddings().weight
    assert find_logit_transform(model) == expected
    assert model.get_output_embeddings().weight is weight


def test_scored_log_probabilities_are_those_of_a_softcapped_model() -> None:
    model = tiny("paligemma", "gemma2", SIGLIP, torch.float32, final_logit_softcapping=2.0)
    model.get_output_embeddings().weight.data *= 20  # logits well beyond the cap
    ids = torch.randint(3, 127, (3, 7), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "token_type_ids": torch.ones_like(ids)}
    scored_tokens = {
        "answer_index": (torch.arange(3)[:, None] * 7 + torch.arange(6)).flatten(),
        "answer_labels": ids[:, 1:].flatten(),
        "sequence_ids": torch.arange(3).repeat_interleave(6),
        "num_tokens": [[6]] * 3,
    }
    with torch.no_grad():
        own = model(**inputs).logits.log_softmax(-1)[:, :-1]
        expected = own.gather(-1, ids[:, 1:, None])[..., 0].sum(1)
        attach_preference_forward(model)
        scored = model(**inputs, **scored_tokens).logps
    torch.testing.assert_close(scored[:, 0], expected, atol=1e-4, rtol=1e-5)


def test_unknown_logit_transforms_are_refused_only_for_scoring(
    model_dir: Path, shifted_logits
) -> None:
    with pytest.raises(
        RefusedError, match=r"model LlavaForConditionalGeneration must compute .* differ by 1 from"
    ):
        load_model(model_dir, torch.float32)
    assert load_model(model_dir, torch.float32, scoring=False)
