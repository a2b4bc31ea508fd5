"""``realign merge``: merge an adapter into its base, for servers without adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from realign.errors import RefusedError
from realign.modeling.folder import is_adapter, resolve_model
from realign.runtime.files import new_folder
from realign.runtime.run_folder import check_out
from realign.runtime.write_errors import explain_write_errors

_DTYPES = ("float32", "bfloat16")


def merge(model: str, out: Path, dtype: str = "bfloat16") -> Path:
    """Merge an adapter into its base in float32, and write the model and its processor.

    Args:
        model: Folder or hub id of an adapter, such as the checkpoint of ``realign train``.
        out: A new folder.
        dtype: Dtype of the written weights, ``bfloat16`` or ``float32``. Weights are rounded to it
            after merging.
    Returns:
        The folder.
    Raises:
        RefusedError: The model is not an adapter or cannot be merged, the dtype is unknown, or the
            folder exists or cannot be written.
    """
    if dtype not in _DTYPES:
        raise RefusedError(
            f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}. Name one of them."
        )
    check_out(out)
    if out.exists():
        raise RefusedError(f"out must be a new folder, got {out}, which exists. Name another.")
    folder = resolve_model(model)
    if not is_adapter(folder):
        raise RefusedError(
            f"model must be an adapter, got {model}, which is a whole model. Use it as it is."
        )
    import torch  # after all refusals

    from realign.modeling.loading import load_model
    from realign.modeling.processors import load_processor

    adapted: Any = load_model(folder, torch.float32, scoring=False)
    _check_tied(adapted, folder)
    try:
        merged = adapted.merge_and_unload().to(getattr(torch, dtype))
    except (RuntimeError, ValueError, NotImplementedError) as error:  # an adapter with biases, say
        reason = str(error).rstrip(".")
        raise RefusedError(
            f"adapter {folder} must be of a kind that can be merged, got {reason}. Use it as it is."
        ) from None
    processor = load_processor(folder)
    with explain_write_errors(out), new_folder(out) as unfinished:
        merged.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
    return out


def _check_tied(adapted: Any, folder: Path) -> None:
    """Refuse adapters of an embedding and a head that share a weight: merging one changes both."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = adapted.get_base_model()
    layers = {"embedding": base.get_input_embeddings(), "head": base.get_output_embeddings()}
    tuned = {name: layer for name, layer in layers.items() if isinstance(layer, BaseTunerLayer)}
    weights = [getattr(layer, "base_layer", layer).weight for layer in layers.values()]
    if tuned and weights[0] is weights[1]:
        raise RefusedError(
            f"adapter {folder} must leave the embedding and the head as they are to be merged, "
            f"because they share one weight in this model, got an adapted {min(tuned)}. Use it as "
            "it is, or train one without that layer."
        )
