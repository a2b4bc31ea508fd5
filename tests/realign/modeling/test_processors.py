"""Processors without their video part: the same files, the same images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from transformers.models.smolvlm import processing_smolvlm
from transformers.utils import is_torchvision_available

from realign.errors import RefusedError
from realign.modeling.processors import load_processor, load_without_videos
from tests.realign.modeling.families.registry import FAMILIES

pytestmark = pytest.mark.skipif(
    is_torchvision_available(), reason="processors are loaded whole where torchvision is"
)


def test_the_video_settings_of_the_folder_are_kept(tmp_path: Path) -> None:
    folder = FAMILIES["qwen2.5-vl"]().save(tmp_path / "model")
    video = {"video_processor_type": "Qwen2VLVideoProcessor", "min_pixels": 7}
    path = folder / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"video_processor": video}))
    load_processor(folder).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "processor_config.json").read_text())
    assert saved["video_processor"] == video
    assert saved["processor_class"] == "Qwen2_5_VLProcessor"


def test_a_processor_without_video_keeps_its_class_and_settings_when_saved(tmp_path: Path) -> None:
    folder = FAMILIES["internvl"]().save(tmp_path / "model")
    processor = load_processor(folder)
    assert isinstance(processor, transformers.InternVLProcessor)
    processor.save_pretrained(tmp_path / "saved")
    again = load_processor(tmp_path / "saved")
    assert again.image_seq_length == 4
    assert again.chat_template == processor.chat_template
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()


def test_processors_without_a_video_part_are_loaded_by_transformers(tmp_path: Path) -> None:
    assert load_without_videos(FAMILIES["llava-1.5"]().save(tmp_path / "model")) is None


def test_another_missing_package_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = FAMILIES["smolvlm"]().save(tmp_path / "model")
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(RefusedError, match="pip install num2words"):
        load_processor(folder)
