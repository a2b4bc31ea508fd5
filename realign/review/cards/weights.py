"""Check that the weights of a model's folder are complete and are those that training wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from realign.errors import RefusedError
from realign.modeling.folder import is_adapter
from realign.review.cards.run_facts import WEIGHTS
from realign.runtime.files import file_sha256
from realign.runtime.strict_json import read_json

ADAPTER = f"adapter_model{WEIGHTS}"
_HASHING_THREADS = 4  # hashing leaves the interpreter lock; a large model has several files


def check_weights(folder: Path, written: Mapping[str, str]) -> None:
    """Refuse a folder whose weights are missing, damaged or not finite.

    Args:
        folder: Folder of the model or adapter.
        written: File name to SHA-256 of the weights as training wrote them; empty if unknown.
    Raises:
        RefusedError: Weights are missing, damaged or not finite; the message names the file.
    """
    names = {path.name for path in folder.glob(f"*{WEIGHTS}")}
    wanted = {*written} | ({ADAPTER} if is_adapter(folder) else _indexed(folder))
    if not names:
        raise RefusedError(
            f"{folder} must hold weights as safetensors, holds none. Give a model that has them."
        )
    if missing := sorted(wanted - names):
        raise RefusedError(
            f"{folder} must hold all its weights, lacks {missing[0]}. Copy or train them again."
        )
    with ThreadPoolExecutor(_HASHING_THREADS) as threads:
        digests = dict(
            zip(written, threads.map(lambda name: file_sha256(folder / name), written), strict=True)
        )
    if changed := [name for name in written if digests[name] != written[name]]:
        raise RefusedError(
            f"{folder / changed[0]} must be as `realign train` wrote it, was changed or damaged "
            "since. Copy or train it again; weights of another model belong into a folder of "
            "their own."
        )
    for name in sorted(names):
        _check_finite(folder / name)


def _indexed(folder: Path) -> set[str]:
    """Return the files that indexes of the folder name; empty without an index."""
    indexes = [*folder.glob(f"*{WEIGHTS}.index.json")]
    return {name for path in indexes for name in read_json(path).get("weight_map", {}).values()}


def _check_finite(file: Path) -> None:
    """Refuse a file that is cut off or holds NaN or infinity."""
    import torch

    measurable = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    with open_weights(file, "pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - no mapping
            tensor = weights.get_tensor(name)
            if tensor.dtype not in measurable or not tensor.numel():
                continue
            if not all(bool(bound.isfinite()) for bound in tensor.aminmax()):
                raise RefusedError(
                    f"{file} must hold finite weights, got NaN or infinity in {name}. Give an "
                    "earlier checkpoint."
                )


@contextmanager
def open_weights(file: Path, framework: str) -> Iterator[Any]:
    """Open a safetensors file within the block.

    Raises:
        RefusedError: It is missing, or cut.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise RefusedError(
            f"{file.parent} must hold {file.name}, holds none. Give a folder that has it, such as "
            "peft's save_pretrained writes it."
        )
    try:
        with safe_open(file, framework=framework) as weights:
            yield weights
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise RefusedError(
            f"{file} must be a whole safetensors file, got {reason}. Copy or train it again."
        ) from None
