"""Log-probabilities of tokens from hidden states and the head."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from realign_kernels.data_parallel import gather_head
from realign_kernels.ops.score_tokens import check_call, score_tokens
from realign_kernels.options import NO_INDEX, HeadOptions, LoraFactors
from realign_kernels.validation import check_integer, check_options

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup


class LogprobStats(NamedTuple):
    """Results of :func:`linear_logprob_stats`; each entry has the shape of ``labels``.

    Probabilities are those after scale, softcap and temperature, over the whole vocabulary.
    ``token_logps``, ``top_non_label_logps``, ``entropy`` and ``lse`` carry gradients.  At ignored
    positions everything is 0, ``is_top1`` False and ``top_non_label_ids`` -1.
    """

    token_logps: Tensor
    """Log-probability of the label."""
    entropy: Tensor
    """Entropy of the distribution, in nats."""
    log_sum_sq_probs: Tensor
    """Log of the sum of squared probabilities (minus the order-2 Renyi entropy)."""
    mean_logits: Tensor
    """Mean of the transformed logits."""
    is_top1: Tensor
    """True where the label is the most probable token (the lowest id among equals); bool."""
    top_non_label_logps: Tensor
    """Log-probability of the most probable token that is not the label; -inf if there is none."""
    top_non_label_ids: Tensor
    """Id of that token (the lowest among equals); int64, -1 if there is none."""
    lse: Tensor
    """Log of the sum of the exponentials of the transformed logits."""


def linear_logprob(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    lm_head_bias: Tensor | None = None,
    lm_head_lora: LoraFactors | None = None,
    ignore_index: int | None = -100,
    logit_scale: float | None = 1.0,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    memory: str = "auto",
    workspace_bytes: int = 256 << 20,
    stash_bytes: int = 2 << 30,
    accumulate: str = "auto",
    num_scored: int | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Return the log-probability of each label, without storing logits or rounding them to half.

    Equal to ``log_softmax(T(hidden_states @ lm_head_weight.T + lm_head_bias), -1)`` at ``labels``,
    where T multiplies by ``logit_scale``, applies ``c * tanh(z / c)`` with ``c = logit_softcap``,
    and divides by ``temperature``.

    Args:
        hidden_states: Backbone outputs, shape ``(..., D)``; float16, bfloat16, float32 or float64.
        lm_head_weight: Output projection, shape ``(V, D)``, on the device of ``hidden_states``.  A
            weight of another half dtype or float32 is rounded to the dtype of ``hidden_states``
            tile by tile, without a full copy; each gradient has the dtype of its own tensor.  Under
            ``torch.autocast`` both are rounded to autocast's dtype.  float64 mixes with no other.
        labels: Token ids, already shifted, shape ``(...)``, int64, each in ``[0, V)`` or
            ``ignore_index``.
        lm_head_bias: Shape ``(V,)``; added before T and never rounded.  It has the dtype of
            ``hidden_states`` or of the accumulation; beside a weight of another dtype, any half
            dtype or float32.
        lm_head_lora: ``(A, B, scaling)`` with A ``(r, D)`` and B ``(V, r)``, dtypes as for the
            bias; adds ``scaling * hidden_states @ A.T @ B.T`` to the logits.
        ignore_index: Label of positions to skip: their result and their gradient are exactly 0, and
            they cost nothing.  None scores every position.
        logit_scale: Factor on the logits; > 0.  None means 1.
        logit_softcap: Bound c on the logits, or None; > 0.
        temperature: Divisor of the logits, after the softcap; > 0.
        backend: ``"eager"``, ``"triton"`` or ``"cpu"``, none of which falls back to another, or
            ``"auto"``: the kernels for the device if they are installed, else eager.
        memory: How the backward of a trained head gets its exponentials: ``"stash"`` keeps them,
            ``"recompute"`` computes them again, ``"auto"`` keeps them if they fit ``stash_bytes``.
            ``"tile"`` needs the loss and belongs to :func:`rdpo_loss`.
        workspace_bytes: Limit in bytes on the scratch memory of the forward and of the backward.
            Inputs, outputs, gradients and up to three ``(N, D)`` tensors of rows and sums do not
            count; N is the number of labels that are not ignored.
        stash_bytes: Limit in bytes on the ``(N, V)`` exponentials that are kept for the backward.
        accumulate: ``"exact"`` bounds the error of tensor cores, which truncate their sums: the
            logits of half operands are summed in float32 after every 1,024 of D.  ``"auto"`` takes
            the faster product.  Both are the same where products round to nearest: on CPUs, and
            for float32 operands.
        num_scored: Number of labels that are not ignored.  If it is given, the host does not wait
            for a GPU to count them.  It is checked like label values.
        group: Tensor parallelism: every rank passes the same rows and global labels, and its own
            contiguous shard of the vocabulary (weight, bias, B), in rank order.  Each rank gets the
            whole result and the whole gradient of hidden states and A; the gradients of its shard
            stay local.  None if the weight holds the whole vocabulary.
    Returns:
        token_logps: Natural-log probabilities <= 0, shape ``(...)``, float32 (float64 for float64
            inputs).  A label logit of -inf gives -inf; a row with a NaN or +inf logit, or with no
            finite one, gives NaN.
    Raises:
        ValueError: A shape, device, label, option name or number does not fit, or
            ``workspace_bytes`` cannot hold a single logit (rows and vocabulary are both tiled, so
            slightly more than 32 * D bytes are enough).
        TypeError: A dtype does not fit.
        RuntimeError: ``backend`` names one that is not installed, or ``group`` is used without
            torch.distributed.
        NotImplementedError: An argument carries a forward-mode tangent, or is transformed by
            ``torch.func``.
    Note:
        Differentiable once, in reverse mode only. Computes in float32 (float64 for float64 inputs),
        also under autocast; products of half operands are summed and kept in float32; those of
        float32 follow ``torch.set_float32_matmul_precision``. Deterministic. docs/guides/head.md
        lists the time and memory of a call. Label values are checked, on GPUs by a device-side
        assertion; ``REALIGN_CHECK=0`` in the environment turns that off.

    Example::

        >>> import torch
        >>> from realign_kernels import linear_logprob
        >>> hidden_states = torch.zeros(1, 4, 8)  # (B, T, D), as last_hidden_state of a model
        >>> lm_head_weight = torch.zeros(5, 8)  # (V, D): all 5 tokens are equally probable
        >>> labels = torch.tensor([[0, 3, 1, -100]])  # of a tokenizer, one position later
        >>> linear_logprob(hidden_states[:, :-1], lm_head_weight, labels[:, 1:])
        tensor([[-1.6094, -1.6094,  0.0000]])
    """
    if dist.is_available() and dist.is_initialized():
        lm_head_weight, lm_head_bias, lm_head_lora = gather_head(
            lm_head_weight, lm_head_bias, lm_head_lora
        )
    options = HeadOptions(
        lm_head_bias=lm_head_bias,
        lm_head_lora=lm_head_lora,
        ignore_index=NO_INDEX if ignore_index is None else ignore_index,
        logit_scale=1.0 if logit_scale is None else logit_scale,
        logit_softcap=logit_softcap,
        temperature=temperature,
        backend=backend,
        memory=memory,
        workspace_bytes=workspace_bytes,
        stash_bytes=stash_bytes,
        accumulate=accumulate,
        group=group,
    )
    _check_options(options, "linear_logprob")
    head = check_call(hidden_states, lm_head_weight, labels, options)
    lengths = _as_lengths(num_scored)
    return score_tokens(head, labels, options, sequence_lengths=lengths).token_logps


def linear_logprob_stats(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    lm_head_bias: Tensor | None = None,
    lm_head_lora: LoraFactors | None = None,
    ignore_index: int | None = -100,
    logit_scale: float | None = 1.0,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    memory: str = "auto",
    workspace_bytes: int = 256 << 20,
    stash_bytes: int = 2 << 30,
    accumulate: str = "auto",
    num_scored: int | None = None,
    group: ProcessGroup | None = None,
) -> LogprobStats:
    """Return the log-probability of each label and statistics of its distribution, in one pass.

    Args:
        hidden_states: As for :func:`linear_logprob`, like every other argument.
        lm_head_weight: Shape ``(V, D)``.
        labels: Shape ``(...)``, int64.
        lm_head_bias: Shape ``(V,)``.
        lm_head_lora: ``(A, B, scaling)``.
        ignore_index: Label of positions without a result.
        logit_scale: Factor on the logits.
        logit_softcap: Bound on the logits.
        temperature: Divisor of the logits.
        backend: Implementation.
        memory: ``"auto"``, ``"stash"`` or ``"recompute"``.
        workspace_bytes: Limit on scratch memory in bytes.
        stash_bytes: Limit on the exponentials that are kept for the backward, in bytes.
        accumulate: ``"auto"`` or ``"exact"``.
        num_scored: Number of labels that are not ignored.
        group: Tensor parallelism; every statistic is that of the whole vocabulary.
    Returns:
        stats: :class:`LogprobStats`; floating entries are float32 (float64 for float64 inputs).
    Raises:
        ValueError: As :func:`linear_logprob`.  TypeError: As there.  RuntimeError: As there.
        NotImplementedError: As there.
    Note: ``token_logps``, ``top_non_label_logps``, ``entropy`` and ``lse`` are differentiable once;
        the other entries are detached.  Hidden states are kept until the backward.  A gradient of
        the entropy (with a frozen head, of ``lse`` too) makes the backward compute the logits
        again: 8NVD operations in all.

    Example::

        >>> import torch
        >>> from realign_kernels import linear_logprob_stats
        >>> hidden_states = torch.zeros(2, 8, requires_grad=True)  # (N, D)
        >>> stats = linear_logprob_stats(hidden_states, torch.zeros(5, 8), torch.tensor([3, 1]))
        >>> stats.entropy  # log(5) nats
        tensor([1.6094, 1.6094], grad_fn=...)
        >>> loss = -stats.token_logps.mean() - 0.01 * stats.entropy.mean()
        >>> loss = loss + 1e-4 * stats.lse.square().mean()  # z-loss
        >>> loss.backward()
    """
    if dist.is_available() and dist.is_initialized():
        lm_head_weight, lm_head_bias, lm_head_lora = gather_head(
            lm_head_weight, lm_head_bias, lm_head_lora
        )
    options = HeadOptions(
        lm_head_bias=lm_head_bias,
        lm_head_lora=lm_head_lora,
        ignore_index=NO_INDEX if ignore_index is None else ignore_index,
        logit_scale=1.0 if logit_scale is None else logit_scale,
        logit_softcap=logit_softcap,
        temperature=temperature,
        backend=backend,
        memory=memory,
        workspace_bytes=workspace_bytes,
        stash_bytes=stash_bytes,
        accumulate=accumulate,
        group=group,
    )
    _check_options(options, "linear_logprob_stats")
    head = check_call(hidden_states, lm_head_weight, labels, options)
    scores = score_tokens(
        head, labels, options, with_statistics=True, sequence_lengths=_as_lengths(num_scored)
    )
    return LogprobStats(**{name: getattr(scores, name) for name in LogprobStats._fields})


def _as_lengths(num_scored: int | None) -> Tensor | None:
    """Return ``num_scored`` as a tensor on the CPU. As an int, ``torch.compile`` would make it a
    constant of the graph.
    """
    if num_scored is None:
        return None
    check_integer("num_scored", num_scored, least=0)
    return torch.full((), num_scored, dtype=torch.int64, device="cpu")


def _check_options(options: HeadOptions, function: str) -> None:
    check_options(options)
    if options.memory == "tile":
        raise ValueError(
            f"memory must be 'auto', 'stash' or 'recompute' in {function}, got 'tile'. "
            "Tiles need the loss: call rdpo_loss, or pass memory='auto'."
        )
