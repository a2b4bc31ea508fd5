"""verl's fused linear cross-entropy and its module for PPO, computed by this package's head.

Letters: **N** tokens, **D** hidden size, **V** vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from realign_kernels.compat.messages import call_with_names
from realign_kernels.linear_logprob import linear_logprob_stats
from realign_kernels.validation import check_choice, check_tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

REDUCTIONS = ("none", "sum", "mean")
_NAMES = {"hidden_states": "hidden", "lm_head_weight": "weight", "group": "dist_process_group"}
_NAMES_OF_MODULE = {"lm_head_weight": "vocab_weights", "labels": "input_ids"}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of labels and entropies, as verl's function of the same name does.

    It takes the place of ``verl.utils.kernel.linear_cross_entropy.linear_cross_entropy``, and is
    :func:`realign_kernels.linear_logprob_stats` behind its signature, on any device.

    Args:
        hidden: Backbone outputs, shape ``(..., D)``; every dtype that ``linear_logprob`` takes.
        weight: Output projection, shape ``(V, D)``.
        labels: Token ids, already shifted, one for every hidden state, of any integer dtype. Every
            label is scored; no value is ignored.
        temperature: Divisor of the logits; > 0.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``, of the log-probabilities alone.
        dist_process_group: Tensor parallelism: every rank passes the same rows and labels and its
            own shard of ``weight``, in the order of ranks.
    Returns:
        logprobs: Log-probabilities of the labels, shape ``(N,)``, or ``()`` where they are reduced;
            float32 (float64 for float64 inputs).
        entropy: Entropies in nats, shape ``(N,)`` for every reduction, in the same dtype.  Both
            carry gradients.
    Raises:
        ValueError: Labels and hidden states do not fit, or a number or name does not.
        TypeError: A dtype does not fit.
    Note: with a group, the gradients of ``hidden`` on all ranks add up to the whole gradient, as
        verl's do: the backward of Megatron's sequence gathering sums them.  Where nothing sums
        them, call ``linear_logprob_stats(..., group=)``, which gives every rank the whole gradient.

    Example::

        >>> import torch
        >>> from realign_kernels.compat.verl import linear_cross_entropy
        >>> hidden, weight, labels = torch.zeros(2, 8), torch.zeros(5, 8), torch.tensor([3, 1])
        >>> logprobs, entropy = linear_cross_entropy(hidden, weight, labels, 1.0, "none")
        >>> advantages = torch.tensor([1.0, -1.0])
        >>> -(advantages * logprobs).mean() - 0.01 * entropy.mean()
        tensor(-0.0161)
    """
    check_tensor("hidden", hidden)
    check_tensor("labels", labels)
    check_choice("reduction", reduction, None)
    check_choice("reduction", reduction.lower(), REDUCTIONS)
    _check_order(hidden, labels)
    rows = hidden.reshape(-1, hidden.shape[-1]) if hidden.ndim > 0 else hidden
    if dist_process_group is not None:
        rows = _with_shared_gradient(rows, dist_process_group)
    stats = call_with_names(
        linear_logprob_stats,
        _NAMES,
        rows,
        weight,
        _as_ids(labels).reshape(-1),
        temperature=temperature,
        ignore_index=None,
        group=dist_process_group,
    )
    logprobs = stats.token_logps
    if reduction.lower() == "sum":
        logprobs = logprobs.sum()
    elif reduction.lower() == "mean":
        logprobs = logprobs.mean()
    return logprobs, stats.entropy


class FusedLinearForPPO(torch.nn.Module):
    """Log-probabilities and entropies in the shape of the labels, as verl's module has them.

    It takes the place of ``verl.utils.experimental.torch_functional.FusedLinearForPPO``.

    Example::

        >>> import torch
        >>> from realign_kernels.compat.verl import FusedLinearForPPO
        >>> hidden_states = torch.zeros(1, 2, 8)  # (B, S, D)
        >>> ids = torch.tensor([[3, 1]])
        >>> log_probs, entropy = FusedLinearForPPO()(hidden_states, torch.zeros(5, 8), ids, 1.0)
        >>> log_probs
        tensor([[-1.6094, -1.6094]])
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        """Create the module.

        Args:
            chunk_size: Ignored: the head cuts its own tiles.
            impl_backend: Ignored: the head has its own kernels.
        """
        super().__init__()
        self.chunk_size = chunk_size
        self.impl_backend = impl_backend

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Score every id.

        Args:
            hidden_states: Backbone outputs, shape ``(..., D)``.
            vocab_weights: Output projection, shape ``(V, D)``.
            input_ids: Token ids, already shifted, shape ``(...)``, of any integer dtype; none is
                ignored.
            temperature: Divisor of the logits; > 0.
        Returns:
            log_probs: Log-probabilities, shape ``(...)``, float32 (float64 for float64 inputs).
            entropy: Entropies in nats, same shape and dtype.  Both carry gradients.
        """
        check_tensor("input_ids", input_ids)
        stats = call_with_names(
            linear_logprob_stats,
            _NAMES_OF_MODULE,
            hidden_states,
            vocab_weights,
            _as_ids(input_ids),
            temperature=temperature,
            ignore_index=None,
        )
        return stats.token_logps, stats.entropy


def _as_ids(labels: Tensor) -> Tensor:
    """Widen integers to int64; any other value is left for the head to refuse."""
    is_integer = not (labels.is_floating_point() or labels.is_complex())
    return labels.long() if is_integer and labels.dtype != torch.bool else labels


def _check_order(hidden: Tensor, labels: Tensor) -> None:
    """Refuse shapes whose flat orders differ, such as (S, B) beside (B, S)."""
    of_hidden = [size for size in hidden.shape[:-1] if size != 1]
    of_labels = [size for size in labels.shape if size != 1]
    if min(len(of_hidden), len(of_labels)) > 1 and of_hidden != of_labels:
        raise ValueError(
            f"labels must have shape {tuple(hidden.shape[:-1])} to match hidden, "
            f"got {tuple(labels.shape)}. Each is flattened in its own order: transpose one of them."
        )


def _with_shared_gradient(hidden: Tensor, group: ProcessGroup) -> Tensor:
    """Return hidden states whose gradients on all ranks add up to the whole.

    The head gives every rank the whole gradient, but verl's callers sum the gradients of all ranks.
    """
    hidden = hidden.view_as(hidden)
    if hidden.requires_grad:
        hidden.register_hook(lambda grad: grad / dist.get_world_size(group))
    return hidden
