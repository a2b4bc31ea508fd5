"""Processors of families that also take videos, where torchvision is missing: the video part needs
it, images do not.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import PROCESSOR_MAPPING, AutoConfig, AutoImageProcessor, AutoTokenizer

VIDEO_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")


def image_only(processor_class: type) -> Any:
    """A processor class without its video part. What it makes of images and text is the same."""

    class ImageOnly(processor_class):
        video_config: dict[str, Any] | None = None
        # SmolVLM asks for these whenever it fills a template
        video_processor = SimpleNamespace(num_frames=None, fps=None)

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

        def to_dict(self) -> dict[str, Any]:
            # a saved processor is whole again where torchvision is
            video = {"video_processor": self.video_config} if self.video_config else {}
            return super().to_dict() | video

    ImageOnly.__name__ = ImageOnly.__qualname__ = processor_class.__name__  # it is saved by name
    return ImageOnly


def load_image_only(folder: Path) -> Any:
    """Load a processor without its video part.

    Raises:
        KeyError: transformers knows no processor of this model.
    """
    config = AutoConfig.from_pretrained(folder)
    processor_class = image_only(PROCESSOR_MAPPING[type(config)])
    parts = [
        AutoImageProcessor.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        None,
    ]
    options, _ = processor_class.get_processor_dict(folder)
    options.pop("video_processor", None)
    processor = processor_class.from_args_and_dict(parts, options)
    processor.video_config = _video_config(folder)
    return processor


def _video_config(folder: Path) -> dict[str, Any] | None:
    path = folder / "processor_config.json"
    if path.is_file() and (found := json.loads(path.read_text()).get("video_processor")):
        return found
    for name in VIDEO_FILES:
        if (folder / name).is_file():
            return json.loads((folder / name).read_text())
    return None
