"""Image encoders: the vision path of a VLM, or a CLIP or SigLIP model. Vectors have length 1."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from realign.data.images import decode_image
from realign.errors import RefusedError
from realign.modeling.damaged_files import refuse_damaged_files
from realign.modeling.folder import resolve_model


class Encoder(Protocol):
    """Function from images to one vector of length 1 each, in float32 on the CPU, in order."""

    name: str  # for the provenance of rows
    pooling: str  # how an image's features become one vector

    def __call__(self, images: Sequence[Image.Image]) -> Tensor: ...


class VisionPathEncoder:
    """Vision tower and projector of a VLM, with the mean over the tokens of an image.

    Args:
        model: The VLM, which stays on its device.
        processor: The VLM's processor.
    Raises:
        RefusedError: The model has no image features.
    """

    name = "vision path of the model"
    pooling = "mean over image tokens"

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.model: Any = _check_features(model, "model", "one with a vision path")
        self.images = processor.image_processor

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Return vectors of shape ``(images, D)``.

        Raises:
            RefusedError: The model does not separate the images, or a vector is not finite.
        """
        # one list per image: some processors take a flat list for several images of one prompt
        features = _image_features(self.model, self.images, [[image] for image in images])
        if len(features) != len(images):
            raise RefusedError(
                f"{type(self.model).__name__} must give the features of each image, got "
                f"{len(features)} of {len(images)}. Choose a CLIP or SigLIP model as encoder."
            )
        # (tokens, D) per image; families that split images into tiles give (tiles, tokens, D)
        return unit_rows(
            torch.stack([f.reshape(-1, f.shape[-1]).float().mean(0) for f in features]),
            type(self.model).__name__,
        )


class ClipEncoder:
    """Pooled and projected image features of a CLIP or SigLIP model.

    Args:
        model: Model from ``AutoModel``, which stays on its device.
        image_processor: The model's image processor.
        name: Name for the provenance of rows.
    Raises:
        RefusedError: The model has no image features.
    """

    pooling = "the model's own"

    def __init__(self, model: nn.Module, image_processor: Any, name: str) -> None:
        self.model: Any = _check_features(model, "encoder", "a CLIP or SigLIP model")
        self.images = image_processor
        self.name = name

    @classmethod
    def load(cls, model: str, dtype: torch.dtype, device: str = "cpu") -> ClipEncoder:
        """Load a model from safetensors weights. No remote code is run.

        Args:
            model: Folder or hub id; the paper used ``openai/clip-vit-large-patch14``.
            dtype: Dtype of the weights.
            device: Device of the model.
        Raises:
            RefusedError: There is no such model, it is incomplete or damaged, or it has no image
                features.
        """
        from transformers import AutoModel

        try:
            folder = resolve_model(model, "encoder")
        except RefusedError as error:
            raise RefusedError(_of_encoder(str(error))) from None
        if not any(folder.glob("*.safetensors")):
            raise RefusedError(
                f"encoder {model} must hold safetensors weights, got none. Convert it."
            )
        with refuse_damaged_files(f"encoder {model}"):
            loaded, found = AutoModel.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
        if lacking := sorted([*found["missing_keys"], *found["mismatched_keys"]]):
            raise RefusedError(
                f"encoder {model} must hold every weight, lacks {len(lacking)}, first: "
                f"{lacking[0]}. Download it again."
            )
        name = folder.name if Path(model).is_dir() else model
        return cls(loaded.eval().to(device), load_image_processor(folder, model), name)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Return vectors of shape ``(images, D)``.

        Raises:
            RefusedError: The model does not pool, or a vector is not finite.
        """
        features = _image_features(self.model, self.images, list(images))
        if not isinstance(features, Tensor) or features.shape[:-1] != (len(images),):
            raise RefusedError(
                f"encoder {self.name} must give one vector per image, a "
                f"{type(self.model).__name__} gives more. Choose a CLIP or SigLIP model."
            )
        return unit_rows(features.float(), self.name)


def load_image_processor(folder: Path, name: str) -> Any:
    """Load the image processor of an encoder's folder.

    Raises:
        RefusedError: The folder has no image processor.
    """
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise RefusedError(
            f"encoder {name} must have an image processor ({str(error).splitlines()[0]}). "
            "Add preprocessor_config.json to the folder."
        ) from None


def unit_rows(vectors: Tensor, name: str) -> Tensor:
    """Scale rows to length 1, on the CPU.

    Raises:
        RefusedError: A number is not finite, or a row is zero, to which nothing is near.
    """
    rows = F.normalize(vectors, dim=1).cpu()
    if not rows.isfinite().all() or not rows.any(dim=1).all():
        raise RefusedError(
            f"encoder {name} must give finite vectors that are not zero, got others. Set its "
            "dtype to float32 and check its weights."
        )
    return rows


def _check_features(model: nn.Module, name: str, wanted: str) -> nn.Module:
    if not hasattr(model, "get_image_features"):
        raise RefusedError(
            f"{name} must be {wanted}, got {type(model).__name__}, which has no "
            "get_image_features. Choose another."
        )
    return model


def _image_features(model: Any, image_processor: Any, images: list[Any]) -> Any:
    """Return the model's features of images, which transformers wraps since 5.0."""
    inputs = image_processor(images=images, return_tensors="pt").to(model.device, model.dtype)
    accepted = inspect.signature(model.get_image_features).parameters
    # inputs of the text part, such as the number of crops, must not reach the vision tower
    known = {name: value for name, value in inputs.items() if name in accepted}
    features = model.get_image_features(**known)
    return getattr(features, "pooler_output", features)


def _of_encoder(message: str) -> str:
    """Return the message about a model with the name of the option that gave it."""
    return message.replace("model must", "encoder must").replace("--model", "--encoder")


def embed_shard(encoder: Encoder, paths: Sequence[Path], batch_size: int) -> Tensor:
    """Return the vectors of one shard's images, in order.

    Args:
        encoder: The encoder.
        paths: Image files that were inspected.
        batch_size: Number of images that are encoded together.
    Returns:
        Vectors of shape ``(len(paths), D)``, float32.
    Raises:
        RefusedError: A file is not an image, or the encoder refuses it.
    """
    parts = []
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        parts.append(encoder([decode_image(path.read_bytes(), path.name) for path in batch]))
    return torch.cat(parts)
