"""Transform of a model's logits after the output projection.

A configuration alone does not define it: the same ``logits_scaling`` divides in Granite and
multiplies in HyperCLOVA X, and Cohere2 Vision does not apply its text model's ``logit_scale`` at
all. Every possible meaning is therefore compared with the model's own logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from realign.errors import RefusedError

SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# large enough to reveal the usual softcaps of 20 to 50, also in bfloat16
LARGEST_LOGIT = 40.0
NUM_TOKENS = 64  # tokens of the substitute for a head without values


@dataclass(frozen=True)
class LogitTransform:
    """The transform ``softcap * tanh(scale * z / softcap)`` of the output projection ``z``."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """Apply the transform to raw logits."""
        z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


class _BodyOutput:
    """Output of a model's body that holds nothing but hidden states."""

    def __init__(self, hidden_states: Tensor) -> None:
        self.last_hidden_state = hidden_states

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


@torch.inference_mode()
def find_logit_transform(model: PreTrainedModel) -> LogitTransform:
    """Return the transform that reproduces the model's own logits on random hidden states.

    Raises:
        RefusedError: No transform that the configuration names does.
    """
    head: Any = model.get_output_embeddings()
    generator = torch.Generator().manual_seed(0)
    with _some_values(head, generator):
        weight: Tensor = head.weight
        hidden_states = torch.randn(1, 2, weight.shape[1], generator=generator).to(weight)
        hidden_states *= LARGEST_LOGIT / head(hidden_states).abs().max()
        projected, own = head(hidden_states).float(), _own_logits(model, hidden_states)
    candidates = _candidates(model.config.get_text_config())
    if own.shape == projected.shape:
        errors = [float((own - transform(projected)).abs().max()) for transform in candidates]
        eps = max(torch.finfo(dtype).eps for dtype in (weight.dtype, own.dtype))
        tolerance = 4 * eps * LARGEST_LOGIT
        if min(errors) <= tolerance:
            return candidates[errors.index(min(errors))]
        found = f"differ by {min(errors):.3g} from the nearest (tolerance {tolerance:.2g})"
    else:
        found = f"have shape {tuple(own.shape)} instead of {tuple(projected.shape)}"
    raise RefusedError(
        f"model {type(model).__name__} must compute its logits as one of {candidates} of its "
        f"output projection, its own {found}. It cannot be scored: use another model, or report "
        "its name."
    )


@contextmanager
def _some_values(head: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Within the block, give a head without values random weights for a few tokens. If one rank
    loads a model for all (FSDP), the others hold zeros or nothing; the transform does not depend on
    the weights.
    """
    own = dict(head._parameters)
    weight = own["weight"]
    assert weight is not None
    if not weight.is_meta and weight[0].any():
        yield
        return
    values = torch.randn(NUM_TOKENS, weight.shape[1], generator=generator).to(weight.dtype)
    head._parameters |= {
        name: None if given is None else nn.Parameter(values if name == "weight" else values[:, 0])
        for name, given in own.items()
    }
    try:
        yield
    finally:
        head._parameters |= own


def _candidates(config: Any) -> list[LogitTransform]:
    named = [getattr(config, name, None) for name in SCALES]
    scales = [1.0, *(float(s) for value in named if value for s in (value, 1 / value))]
    softcaps = [None, *(float(c) for name in SOFTCAPS if (c := getattr(config, name, None)))]
    return [*dict.fromkeys(LogitTransform(*pair) for pair in product(scales, softcaps))]


def _own_logits(model: PreTrainedModel, hidden_states: Tensor) -> Tensor:
    """Return the model's logits for given hidden states."""
    ids = torch.zeros(hidden_states.shape[:2], dtype=torch.int64, device=hidden_states.device)
    body: Any = model.model
    own = vars(body).get("forward")  # if the instance's forward was replaced already
    body.forward = lambda *args, **kwargs: _BodyOutput(hidden_states)
    try:
        return model(input_ids=ids).logits.float()
    finally:
        del body.forward
        if own is not None:
            body.forward = own
