"""Identity of reference log-probabilities: everything outside a row that they depend on. Semantics
define the values, numerics determine their rounding.

Learning rate, beta, batch size, seed, workers and folders are not part of it, since they have no
effect.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from realign.modeling.acceleration import Numerics, use_liger_layers
from realign.modeling.float32 import float32_precision
from realign.modeling.folder import model_identity
from realign.modeling.model_config import load_model_config
from realign.modeling.packing import Layout, choose_layout
from realign.modeling.processors import load_processor
from realign.runtime.files import canonical_json, content_sha256
from realign_kernels import describe_backends

NUMERIC_PACKAGES = ("torch", "torchvision", "transformers", "tokenizers", "peft", "pillow")
SCHEMA = 4
Identity = dict[str, Any]
PACKAGES = ("realign", "numpy", "safetensors", "triton", "flash-attn", "liger-kernel")


def machine_numerics() -> dict[str, Any]:
    """Return the device and the versions of the libraries, for the identity of a result."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "float32": float32_precision(),
        "packages": {name: version_of(name) for name in NUMERIC_PACKAGES},
    }


def version_of(package: str) -> str:
    """Return a package's version, or a note that it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


class ModelFacts:
    """Facts of a model that are known without its weights; each is determined once.

    Args:
        folder: The model's folder, from :func:`realign.resolve_model`.
        numerics: Numerics of the model.
    """

    def __init__(self, folder: Path, numerics: Numerics) -> None:
        self.folder, self.numerics = folder, numerics

    @cached_property
    def processor(self) -> Any:
        """The model's processor."""
        return load_processor(self.folder)

    @cached_property
    def config(self) -> Any:
        """The configuration of the model, or of an adapter's base."""
        return load_model_config(self.folder)

    @cached_property
    def outline(self) -> Any:
        """The model, or an adapter's base, without weights, on torch's meta device."""
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(self.config, dtype=self.numerics.dtype)
            if self.numerics.liger:
                use_liger_layers(model)  # refuses unsupported models before weights are read
            return model

    @cached_property
    def layout(self) -> Layout:
        """The layout of the model's rows, see :func:`realign.modeling.packing.choose_layout`."""
        return choose_layout(self.outline, self.numerics.shared_prefix)


def reference_identity(model: ModelFacts, *, cells: int, rejected_scoring: str) -> Identity:
    """Return the identity of a model's reference log-probabilities.

    Args:
        model: The reference model.
        cells: Number of scored cells, in the order chosen, text_rejected, image_rejected,
            both_rejected.
        rejected_scoring: ``label`` or ``top_non_label``.
    """
    processor = model.processor
    machine = machine_numerics()
    packages = machine.pop("packages")
    return {
        "schema": SCHEMA,
        "semantics": {
            "cells": cells,
            "rejected_scoring": rejected_scoring,
            "scored": "last assistant turn and its end-of-turn token, summed",
            "images": "before the text of the first user turn",
            "max_length": "longer rows are refused, nothing is cut",
            "dropout": "off",
            "files": model_identity(model.folder),
        },
        "numerics": {
            **model.numerics.identity(),
            "rows": model.layout,
            "padding": "none" if model.layout == "shared prefix" else "right, to the longest row",
            # with torchvision, the same configuration gives another class, with other pixels
            "processor": type(processor).__name__,
            "image_processor": type(getattr(processor, "image_processor", None)).__name__,
            "tokenizer": type(processor.tokenizer).__name__,
            "kernel_backend": describe_backends()["auto"],
            "accelerator": _accelerator(),
            **machine,
            "packages": packages | {name: version_of(name) for name in PACKAGES},
        },
    }


def _accelerator() -> dict[str, Any]:
    """Return the architecture, libraries and settings that determine which kernels are used."""
    if not torch.cuda.is_available():
        return {
            "machine": platform.machine(),
            "vectors": torch.backends.cpu.get_cpu_capability(),
            "kernels": describe_backends()["cpu"],  # names the instructions for bfloat16 products
        }
    cuda, backends = torch.backends.cuda, torch.backends
    return {
        "machine": platform.machine(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "runtime": torch.version.cuda or torch.version.hip,
        "cudnn": backends.cudnn.version(),
        "cudnn_benchmark": backends.cudnn.benchmark,
        "bf16_reduced_precision": cuda.matmul.allow_bf16_reduced_precision_reduction,
        "fp16_reduced_precision": cuda.matmul.allow_fp16_reduced_precision_reduction,
        "sdp_flash": cuda.flash_sdp_enabled(),
        "sdp_mem_efficient": cuda.mem_efficient_sdp_enabled(),
        "sdp_cudnn": cuda.cudnn_sdp_enabled(),
        "sdp_math": cuda.math_sdp_enabled(),
    }


def identity_sha256(identity: Identity) -> str:
    """Return the SHA-256 of an identity's canonical JSON."""
    return content_sha256(canonical_json(identity))


def identity_folder(root: Path, identity: Identity) -> Path:
    """Return the folder of the values of one identity."""
    return root / identity_sha256(identity)[:16]


def identity_differences(stored: Identity, needed: Identity) -> list[str]:
    """Return the fields that differ, each as ``name: cached ..., needed ...``."""
    return [
        f"{name}: cached {_short(old)}, needed {_short(new)}"
        for name, old, new in differing_fields(stored, needed)
    ]


def differing_fields(
    stored: Identity, needed: Identity, prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted name, stored and needed value of every field that differs."""
    for name in sorted(stored.keys() | needed.keys()):
        old, new = stored.get(name, "nothing"), needed.get(name, "nothing")
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differing_fields(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name}", old, new


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
