"""Loading of processors. Those that also process videos are loaded without torchvision too, which
only their video part requires.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import transformers
from transformers import (
    PROCESSOR_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.utils import is_torchvision_available

from realign.errors import RefusedError
from realign.modeling.families import CHAT_TEMPLATES
from realign.modeling.folder import first_line, is_adapter, resolve_base
from realign.modeling.model_config import load_model_config

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
VIDEO_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")


def image_only(processor_class: type) -> Any:
    """Return a processor class without its video part; images and text are processed as before."""

    class ImageOnly(processor_class):
        video_config: dict[str, Any] | None = None
        # SmolVLM reads these whenever it applies a chat template
        video_processor = SimpleNamespace(num_frames=None, fps=None)

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

        def to_dict(self) -> dict[str, Any]:
            # a saved processor has its video part again if torchvision is installed
            video = {"video_processor": self.video_config} if self.video_config else {}
            return super().to_dict() | video

    ImageOnly.__name__ = ImageOnly.__qualname__ = processor_class.__name__  # it is saved by name
    return ImageOnly


def load_without_videos(folder: Path) -> Any | None:
    """Load a processor without its video part. Return None if it has no video part, or if
    torchvision is installed.

    Raises:
        RefusedError: The processor requires another package that is missing.
    """
    processor_class = _processor_class(folder)
    if (
        is_torchvision_available()
        or processor_class is None
        or "video_processor" not in processor_class.get_attributes()
    ):
        return None
    processor_class = image_only(processor_class)
    parts = [AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)]
    options, _ = processor_class.get_processor_dict(folder)
    options.pop("video_processor", None)
    try:
        processor = processor_class.from_args_and_dict([*parts, None], options)
    except ImportError as error:  # SmolVLM's requires num2words
        raise RefusedError(
            f"the processor of {folder} requires a package that is not installed: "
            f"{' '.join(str(error).split())}. Install it."
        ) from None
    processor.video_config = _video_config(folder)
    return processor


def _processor_class(folder: Path) -> Any | None:
    for name in PROCESSOR_FILES:
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("processor_class")
            if found:
                return getattr(transformers, found, None)
    if not (folder / "config.json").is_file():
        return None
    return PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(folder)), None)


def _video_config(folder: Path) -> dict[str, Any] | None:
    path = folder / "processor_config.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8")).get("video_processor")
        if found:
            return dict(found)
    for name in VIDEO_FILES:
        if (folder / name).is_file():
            return dict(json.loads((folder / name).read_text(encoding="utf-8")))
    return None


def load_processor(folder: Path) -> Any:
    """Load the processor of a model folder, or of an adapter's base if the adapter has none.

    Raises:
        RefusedError: The folder holds no processor of images and text, or the processor has no chat
            template or no fast tokenizer.

    Example::

        >>> from realign import load_processor, resolve_model
        >>> type(load_processor(resolve_model("model"))).__name__
        'LlavaProcessor'
    """
    if not (folder / "processor_config.json").is_file() and is_adapter(folder):
        folder = resolve_base(folder)
    if (folder / "config.json").is_file():
        load_model_config(folder)  # refuses other models and damaged configurations
    try:
        processor = load_without_videos(folder) or AutoProcessor.from_pretrained(folder)
    except (RefusedError, ImportError):
        raise
    except Exception as error:  # of many kinds, by what is wrong with which file
        raise RefusedError(
            f"{folder} must hold the processor of a vision-language model, got "
            f"{type(error).__name__}: {first_line(error)}. Download the model with all of its "
            "files."
        ) from None
    if not hasattr(processor, "tokenizer"):
        raise RefusedError(
            f"{folder} must hold a processor of images and text, got "
            f"{type(processor).__name__} alone. Download the model with all of its files."
        )
    if not getattr(processor, "chat_template", None):
        processor.chat_template = CHAT_TEMPLATES.get(type(processor).__name__)
    if not processor.chat_template:
        raise RefusedError(
            f"{folder} requires a chat template, got none. Add chat_template.jinja to the folder."
        )
    if not processor.tokenizer.is_fast:
        raise RefusedError(
            f"{folder} must have a fast tokenizer, got {type(processor.tokenizer).__name__}. "
            "Add tokenizer.json to the folder."
        )
    return processor
