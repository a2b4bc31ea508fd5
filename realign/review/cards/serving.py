"""The parts of an adapter that vLLM serves, by its configuration and the names of its weights.

The rules are those of vLLM's sources (docs/guides/serving.md says where): a name is
``base_model.model.``, a module, and ``lora_A.weight`` or ``lora_B.weight``; modules that trained in
full (peft's ``modules_to_save``), DoRA and biases are refused; adapters outside the language model
are left out unless the server is told otherwise and the model's class supports them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from realign.review.cards.weights import ADAPTER, open_weights

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank
# parts outside the language model to their names in messages
_PARTS = {"vision": "vision tower", "projector": "projector", "unused": "image generator"}
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_[AB]\.weight")


def weight_names(adapter: Path) -> list[str]:
    """Return the names of an adapter's weights, from the head of its file.

    Raises:
        RefusedError: The file is missing, or cut.
    """
    with open_weights(adapter / ADAPTER, "numpy") as file:
        return [*file.keys()]


def adapted_module(name: str) -> str | None:
    """Return the module that a weight adapts; None where vLLM does not read the name."""
    found = _NAME.fullmatch(name)
    return found["module"] if found else None


def obstacles(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return why vLLM does not serve an adapter as it was trained; empty where it does.

    Args:
        config: Content of ``adapter_config.json``.
        names: Names of the adapter's weights.
    """
    return [*_obstacles(config, names)]


def _obstacles(config: Mapping[str, Any], names: Iterable[str]) -> Iterator[str]:
    from realign.modeling.parts import part_of  # imports torch

    if config.get("peft_type") != "LORA":
        yield f"it is of the kind {config.get('peft_type')}, and vLLM takes LoRA alone"
        return
    if saved := config.get("modules_to_save"):
        yield f"{', '.join(saved)} trained in full, which vLLM refuses"
    if config.get("use_dora"):
        yield "it uses DoRA, which vLLM refuses"
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        yield "it has biases, which vLLM refuses"
    if (rank := largest_rank(config)) > RANKS[-1]:
        yield f"its rank is {rank}, and vLLM takes at most {RANKS[-1]}"
    modules = [adapted_module(name) for name in names]
    if None in modules and not saved:
        yield "it has weights beside lora_A and lora_B, which vLLM refuses"
    found = [module for module in modules if module]
    outside = {_PARTS.get(part_of(module), "") for module in found} - {""}
    if outside:
        yield (
            f"it adapts layers of the {' and the '.join(sorted(outside))}, which vLLM leaves out "
            "without an error"
        )
    if any(module.rpartition(".")[2] in ("lm_head", "embed_tokens") for module in found):
        yield "it adapts the embedding or the head, which vLLM takes for some models alone"


def largest_rank(config: Mapping[str, Any]) -> int:
    """Return the largest rank of an adapter's layers."""
    pattern: Mapping[str, int] = config.get("rank_pattern") or {}
    return max([config.get("r") or 0, *pattern.values()])


def max_lora_rank(config: Mapping[str, Any]) -> int:
    """Return the value of vLLM's ``--max-lora-rank`` that an adapter needs."""
    return next(rank for rank in RANKS if rank >= largest_rank(config))
