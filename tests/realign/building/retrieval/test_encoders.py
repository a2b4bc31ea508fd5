"""Encoders: the demo model against formulas, tiny models of other families, CLIP and SigLIP."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from PIL import Image
from torch import nn

from realign.building.retrieval.encoders import (
    ClipEncoder,
    VisionPathEncoder,
    embed_shard,
    unit_rows,
)
from realign.demo.drawing import draw
from realign.demo.world import free_scene
from realign.errors import RefusedError
from realign.modeling.loading import load_model
from realign.modeling.processors import load_processor

VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
LLAMA = {"model_type": "llama", **TEXT}
CLIP = {"model_type": "clip_vision_model", "image_size": 28, **VISION}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "image_size": 56,
    "vision_use_head": False,
    **VISION,
}
PINPOINTS = [[28, 56], [56, 28], [56, 56]]
SQUARE = {"height": 56, "width": 56}
CROPPED = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
TILED = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}

# family: configuration, its arguments, image processor, its arguments
FAMILIES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "llava_next": (
        "LlavaNextConfig",
        {
            "vision_config": CLIP,
            "text_config": LLAMA,
            "image_token_index": 1,
            "image_grid_pinpoints": PINPOINTS,
        },
        "LlavaNextImageProcessorPil",
        {**CROPPED, "image_grid_pinpoints": PINPOINTS},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        {
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 16,
                "fullatt_block_indexes": [1],
                "window_size": 56,
            },
            "text_config": TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        },
        "Qwen2VLImageProcessorPil",
        {"min_pixels": 28 * 28, "max_pixels": 4 * 56 * 56},
    ),
    "idefics3": (
        "Idefics3Config",
        {
            "vision_config": {"image_size": 56, **VISION},
            "text_config": LLAMA,
            "scale_factor": 2,
            "image_token_id": 1,
        },
        "Idefics3ImageProcessorPil",
        TILED,
    ),
    "smolvlm": (
        "SmolVLMConfig",
        {
            "vision_config": {"image_size": 56, **VISION},
            "text_config": LLAMA,
            "scale_factor": 2,
            "image_token_id": 1,
        },
        "SmolVLMImageProcessorPil",
        TILED,
    ),
    "gemma3": (
        "Gemma3Config",
        {
            "vision_config": SIGLIP,
            "text_config": TEXT,
            "mm_tokens_per_image": 4,
            "image_token_index": 1,
        },
        "Gemma3ImageProcessorPil",
        {"size": SQUARE},
    ),
    "paligemma": (
        "PaliGemmaConfig",
        {
            "vision_config": SIGLIP,
            "text_config": {"model_type": "gemma", **TEXT},
            "projection_dim": 16,
            "image_token_index": 1,
        },
        "SiglipImageProcessorPil",
        {"size": SQUARE},
    ),
}


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Noise of three shapes."""
    random = np.random.default_rng(0)
    shapes = ((40, 60, 3), (56, 56, 3), (80, 30, 3))
    return [Image.fromarray(random.integers(255, size=s, dtype=np.uint8)) for s in shapes]


def scenes(folder: Path, count: int) -> list[Path]:
    random = Random(0)
    paths = [folder / f"{number}.png" for number in range(count)]
    for path in paths:
        draw(free_scene(random)).save(path)
    return paths


def test_demo_model_embeddings_equal_a_computation_by_hand(model_dir: Path, tmp_path: Path) -> None:
    """An embedding is the normalized mean of the projected image tokens."""
    model, processor = load_model(model_dir, torch.float32), load_processor(model_dir)
    encoder = VisionPathEncoder(model, processor)
    paths = scenes(tmp_path, 5)
    embeddings = embed_shard(encoder, paths, 2)
    pixels = processor.image_processor([Image.open(path) for path in paths], return_tensors="pt")
    with torch.inference_mode():
        features = model.get_image_features(**pixels).pooler_output
    expected = F.normalize(torch.stack([tokens.mean(0) for tokens in features]))
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-6)
    assert embeddings.dtype == torch.float32


# transformers gives one result for every tile before 5.21, which is refused
TILED_APART = (
    {"idefics3", "smolvlm"} if Version(transformers.__version__) < Version("5.21") else set()
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - TILED_APART))
def test_every_family_gives_one_vector_per_image(
    family: str, dtype: torch.dtype, images: list[Image.Image]
) -> None:
    config, arguments, processor, sizes = FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(
        getattr(transformers, config)(**arguments)
    )
    model.eval().to(dtype)
    for parameter in model.parameters():  # Gemma's projection is zero until it is loaded
        if not parameter.any():
            torch.nn.init.normal_(parameter)
    image_processor = getattr(transformers, processor)(**sizes)
    encoder = VisionPathEncoder(model, SimpleNamespace(image_processor=image_processor))
    vectors = encoder(images)
    assert vectors.shape == (3, 16)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    # the vector of an image does not depend on the other images of its batch
    error = 1e-5 if dtype == torch.float32 else 2e-2
    for place, image in enumerate(images):
        torch.testing.assert_close(encoder([image])[0], vectors[place], rtol=0, atol=error)
    assert (vectors[0] - vectors[1]).abs().max() > 1e-3


def clip(folder: Path) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={k: v for k, v in TEXT.items() if k not in ("head_dim", "num_key_value_heads")},
        vision_config={"image_size": 28, **VISION},
        projection_dim=24,
    )
    model = transformers.CLIPModel(config).eval()
    transformers.CLIPImageProcessorPil(**CROPPED).save_pretrained(folder)
    model.save_pretrained(folder)
    return model


def siglip(folder: Path) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.SiglipConfig(
        text_config={k: v for k, v in TEXT.items() if k not in ("head_dim", "num_key_value_heads")},
        vision_config={"image_size": 56, **VISION},
    )
    model = transformers.SiglipModel(config).eval()
    transformers.SiglipImageProcessorPil(size=SQUARE).save_pretrained(folder)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("make", "size"), [(clip, 24), (siglip, 32)])
def test_a_clip_like_folder_gives_normalized_image_embeddings(
    make: Callable[[Path], nn.Module], size: int, tmp_path: Path, images: list[Image.Image]
) -> None:
    folder = tmp_path / "tiny-encoder"
    model: Any = make(folder)
    encoder = ClipEncoder.load(str(folder), torch.float32)
    vectors = encoder(images)
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")
    with torch.inference_mode():
        expected = F.normalize(model.get_image_features(**pixels).pooler_output)
    torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-6)
    assert vectors.shape == (3, size)
    assert encoder.name == "tiny-encoder"
    half = ClipEncoder.load(str(folder), torch.bfloat16)
    assert (half(images) * vectors).sum(1).min() > 0.99


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_damaged_encoder_is_refused(file: str, tmp_path: Path) -> None:
    clip(tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:100])
    with pytest.raises(RefusedError, match=r"encoder .* must hold whole files that its library"):
        ClipEncoder.load(str(tmp_path), torch.float32)


def test_a_model_that_is_not_an_image_encoder_is_refused(tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(RefusedError, match=r"encoder must be an existing folder or a hub id"):
        ClipEncoder.load(str(tmp_path / "none"), torch.float32)
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=8,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
        )
    )
    with pytest.raises(RefusedError, match=r"encoder must be a CLIP or SigLIP .* got BertModel"):
        ClipEncoder(bert, None, "bert")
    clip(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(RefusedError, match=r"must have an image processor .*preprocessor_config"):
        ClipEncoder.load(str(tmp_path), torch.float32)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(RefusedError, match=r"must hold safetensors weights, got none"):
        ClipEncoder.load(str(tmp_path), torch.float32)


def test_an_incomplete_encoder_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    clip(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RefusedError, match=r"lacks 1, first: visual_projection\.weight"):
        ClipEncoder.load(str(tmp_path), torch.float32)


def test_a_vlm_loaded_as_a_clip_model_is_refused(
    model_dir: Path, tmp_path: Path, images: list[Image.Image]
) -> None:
    folder = Path(shutil.copytree(model_dir, tmp_path / "vlm"))
    model = load_model(folder, torch.float32)
    encoder = ClipEncoder(model, load_processor(folder).image_processor, "vlm")
    with pytest.raises(RefusedError, match="vlm must give one vector per image"):
        encoder(images)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_vectors_of_zero_length_or_with_nan_are_refused(bad: float) -> None:
    with pytest.raises(RefusedError, match="encoder x must give finite vectors that are not zero"):
        unit_rows(torch.tensor([[1.0, 0.0], [0.0, bad]]), "x")
