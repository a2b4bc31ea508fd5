"""LLaVA-1.6 becomes a model of one padded view with the weights that it had."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from realign.data.images import decode_image
from realign.errors import RefusedError
from realign.modeling.loading import load_model
from realign.modeling.processors import load_processor
from tests.realign.modeling.families.pairs import SQUARE, WIDE
from tests.realign.modeling.families.registry import FAMILIES

SCRIPT = Path(__file__).parents[2] / "examples" / "llava_next_single_view.py"
save_single_view = runpy.run_path(str(SCRIPT))["save_single_view"]


@pytest.mark.parametrize("name", ["llava-1.6-mistral", "llava-1.6-vicuna"])
def test_the_single_view_equals_the_overview_of_the_tiled_model(name: str, tmp_path: Path) -> None:
    tiled = FAMILIES[name]()
    save_single_view(str(tiled.save(tmp_path / "tiled")), tmp_path / "single")
    single: Any = load_model(tmp_path / "single", torch.float32)
    processor = load_processor(tmp_path / "single")
    image = decode_image(SQUARE, "")  # nothing to pad
    inputs = processor(text=["<image>"], images=[[image]], return_tensors="pt")
    of_tiles = tiled.processor(text=["<image>"], images=[[image]], return_tensors="pt")
    model: Any = tiled.model
    with torch.no_grad():
        view = single.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        tiles = model.model.get_image_features(
            of_tiles["pixel_values"], of_tiles["image_sizes"]
        ).pooler_output[0]
    torch.testing.assert_close(view, tiles[: len(view)], atol=1e-5, rtol=1e-5)
    assert len(view) == 4 < len(tiles)
    ids = torch.tensor([[1, 5, 9, 7]])
    with torch.no_grad():
        assert torch.equal(single(input_ids=ids).logits, model(input_ids=ids).logits)


def test_the_image_is_padded_and_not_cropped(tmp_path: Path) -> None:
    save_single_view(
        str(FAMILIES["llava-1.6-mistral"]().save(tmp_path / "tiled")), tmp_path / "single"
    )
    processor = load_processor(tmp_path / "single")
    pixels = processor.image_processor([decode_image(WIDE, "")], return_tensors="pt")
    view = pixels["pixel_values"][0]
    # 90 x 50 pixels: the mean colour, which is 0, above and below
    assert view.shape == (3, 28, 28)
    assert view[:, :5].abs().max() < 0.05
    assert view[:, -5:].abs().max() < 0.05
    assert view[:, 8:-8, 0].abs().mean() > 0.2


def test_other_model_types_and_non_empty_folders_are_refused(tmp_path: Path) -> None:
    folder = FAMILIES["llava-1.5"]().save(tmp_path / "model")
    with pytest.raises(RefusedError, match=r"must be a LLaVA-1\.6 .* a LlavaForConditional"):
        save_single_view(str(folder), tmp_path / "out")
    with pytest.raises(RefusedError, match="out must be a new folder"):
        save_single_view(str(folder), folder)
