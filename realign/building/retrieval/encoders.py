"""Image encoders: a VLM's own vision path, or a CLIP or SigLIP model; vectors have length 1."""

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
from realign.modeling.folder import resolve_model


class Encoder(Protocol):
    """Images in, one vector of length 1 each out, float32 on the CPU, in their order."""

    name: str  # for the provenance of a row
    pooling: str  # how the features of an image become one vector

    def __call__(self, images: Sequence[Image.Image]) -> Tensor: ...


class VisionPathEncoder:
    """A VLM's vision tower and projector, mean over the tokens of an image.

    Args:
        model: The VLM; it stays where it is.
        processor: Its processor.
    Raises:
        RefusedError: The model gives no image features.
    """

    name = "vision path of the model"
    pooling = "mean over image tokens"

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.model: Any = _check_features(model, "model", "one with a vision path")
        self.images = processor.image_processor

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Return shape ``(images, D)``.

        Raises:
            RefusedError: The model does not tell the images apart, or a vector is not finite.
        """
        # a list for each image: what is flat would be the many images of one prompt to some
        features = _image_features(self.model, self.images, [[image] for image in images])
        if len(features) != len(images):
            raise RefusedError(
                f"{type(self.model).__name__} must give the features of each image, got "
                f"{len(features)} of {len(images)}. Choose a CLIP or SigLIP model as encoder."
            )
        # one (tokens, D) an image; families that cut images in tiles give (tiles, tokens, D)
        return unit_rows(
            torch.stack([f.reshape(-1, f.shape[-1]).float().mean(0) for f in features]),
            type(self.model).__name__,
        )


class ClipEncoder:
    """A CLIP or SigLIP model: its pooled and projected image features.

    Args:
        model: From ``AutoModel``; it stays where it is.
        image_processor: Its image processor.
        name: What a row's provenance calls it.
    Raises:
        RefusedError: The model gives no image features.
    """

    pooling = "the model's own"

    def __init__(self, model: nn.Module, image_processor: Any, name: str) -> None:
        self.model: Any = _check_features(model, "encoder", "a CLIP or SigLIP model")
        self.images = image_processor
        self.name = name

    @classmethod
    def load(cls, model: str, dtype: torch.dtype, device: str = "cpu") -> ClipEncoder:
        """Load a model, from safetensors weights alone. No remote code is run.

        Args:
            model: A folder or a hub id; the paper used ``openai/clip-vit-large-patch14``.
            dtype: Of the weights.
            device: Where it computes.
        Raises:
            RefusedError: There is no such model, it is incomplete, or it gives no image features.
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
        """Return shape ``(images, D)``.

        Raises:
            RefusedError: The model does not pool, or a vector is not finite.
        """
        features = _image_features(self.model, self.images, list(images))
        if not isinstance(features, Tensor) or features.shape[:-1] != (len(images),):
            raise RefusedError(
                f"encoder {self.name} must give one vector an image, a "
                f"{type(self.model).__name__} gives more. Choose a CLIP or SigLIP model."
            )
        return unit_rows(features.float(), self.name)


def load_image_processor(folder: Path, name: str) -> Any:
    """Load the image processor of an encoder's folder.

    Raises:
        RefusedError: There is none.
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
        RefusedError: A number is not finite, or a row is zero; nothing is near such a row.
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
    """Return what the model makes of images; transformers wraps it since 5.0."""
    inputs = image_processor(images=images, return_tensors="pt").to(model.device, model.dtype)
    accepted = inspect.signature(model.get_image_features).parameters
    # what only the text part needs, as the number of crops, must not reach the vision tower
    known = {name: value for name, value in inputs.items() if name in accepted}
    features = model.get_image_features(**known)
    return getattr(features, "pooler_output", features)


def _of_encoder(message: str) -> str:
    """Let the refusal of a model name the setting that gave it."""
    return message.replace("model must", "encoder must").replace("--model", "--encoder")


def embed_shard(encoder: Encoder, paths: Sequence[Path], batch_size: int) -> Tensor:
    """Return the vectors of one shard's images, in order.

    Args:
        encoder: What makes them.
        paths: Checked image files.
        batch_size: Images encoded together.
    Returns:
        Shape ``(len(paths), D)``, float32.
    Raises:
        RefusedError: A file is no image, or the encoder refuses.
    """
    parts = []
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        parts.append(encoder([decode_image(path.read_bytes(), path.name) for path in batch]))
    return torch.cat(parts)
