"""Convert a LLaVA-1.6 model to the form that the paper's authors train.

    python examples/llava_next_single_view.py MODEL OUT

Their code shows the model one padded square view with 576 tokens, instead of the tiles of its own
processor with up to 2,880. That is the architecture of LLaVA-1.5 with the weights of LLaVA-1.6.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaNextForConditionalGeneration,
    LlavaProcessor,
)

from realign import RefusedError

# options of LlavaNextConfig that LlavaConfig has as well
SHARED_OPTIONS = (
    "image_token_index",
    "projector_hidden_act",
    "vision_feature_select_strategy",
    "vision_feature_layer",
    "multimodal_projector_bias",
    "tie_word_embeddings",
)


def save_single_view(model: str, out: Path) -> None:
    """Write a LLaVA-1.6 model as a model with a single padded view, in its own precision.

    Args:
        model: Folder or hub id of a ``LlavaNextForConditionalGeneration``.
        out: New folder.
    Raises:
        RefusedError: The model is not a LLaVA-1.6, or ``out`` exists already.
    """
    if out.exists():
        raise RefusedError(f"out must be a new folder, got {out}. Remove it or name another.")
    tiled = AutoModelForImageTextToText.from_pretrained(model, dtype="auto", use_safetensors=True)
    if not isinstance(tiled, LlavaNextForConditionalGeneration):
        raise RefusedError(
            f"model must be a LLaVA-1.6 (llava_next), got {model}, a {type(tiled).__name__}. Other "
            "families have no second way to see an image."
        )
    config: Any = tiled.config
    with torch.device("meta"):
        single = LlavaForConditionalGeneration(
            LlavaConfig(
                text_config=config.text_config,
                vision_config=config.vision_config,
                **{name: getattr(config, name) for name in SHARED_OPTIONS},
            )
        )
    weights = tiled.state_dict()
    del weights["model.image_newline"]  # the embedding that ends a row of tiles
    single.load_state_dict(weights, assign=True)
    single.generation_config = tiled.generation_config
    single.save_pretrained(out)
    _single_view_processor(AutoProcessor.from_pretrained(model), config).save_pretrained(out)


def _single_view_processor(processor: Any, config: Any) -> LlavaProcessor:
    side = config.vision_config.image_size
    return LlavaProcessor(
        LlavaImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            do_pad=True,  # to a square, in the mean colour
            image_mean=processor.image_processor.image_mean,
            image_std=processor.image_processor.image_std,
        ),
        processor.tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # CLIP's class token
        image_token=processor.image_token,
        chat_template=processor.chat_template,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder or hub id of a LLaVA-1.6")
    parser.add_argument("out", type=Path, help="new folder")
    arguments = parser.parse_args()
    try:
        save_single_view(arguments.model, arguments.out)
    except RefusedError as refusal:
        sys.exit(str(refusal))
