"""The rDPO loss from hidden states: token scores, sums per sequence, then the objective."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from realign_kernels.data_parallel import gather_head
from realign_kernels.objective import MAX_CELLS, Objective, check_objective, check_reference
from realign_kernels.ops.pair_loss import PairArguments, PairOutputs, pair_loss_kept
from realign_kernels.ops.pair_tiles import TileArguments
from realign_kernels.ops.rdpo_tiles import TileOutputs, rdpo_tiles_op
from realign_kernels.ops.score_tokens import (
    HeadArguments,
    check_call,
    score_tokens,
    second_order_witness,
)
from realign_kernels.options import NO_INDEX, HeadOptions, LoraFactors
from realign_kernels.sequences import (
    PairShape,
    check_batch,
    check_sequence_ids,
    resolve_pair_shape,
)
from realign_kernels.validation import (
    check_choice,
    check_flag,
    check_floating,
    check_options,
    check_tensor,
    check_transforms,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

REJECTED_SCORINGS = ("label", "top_non_label")
_DEFAULT_BETA = 0.1
_DEFAULT_IMAGE_WEIGHT = 1.0


class RdpoOutput(NamedTuple):
    """Results of :func:`rdpo_loss`; only the first two carry gradients."""

    loss: Tensor
    """Mean over pairs, ()."""
    logps: Tensor
    """Summed log-probabilities of answers, (C, P); 0 for absent cells."""
    num_tokens: Tensor
    """Answer tokens, (C, P), int64; 0 for absent cells."""
    rewards: Tensor
    """``beta * (logps - ref_logps)``, (C, P)."""
    text_margins: Tensor
    """Reward of ``chosen`` minus that of ``text_rejected``, (P,)."""
    image_margins: Tensor
    """The same against ``image_rejected``, at ``image_beta``, (P,); zeros for two cells."""


class RdpoStatsOutput(NamedTuple):
    """Results of :func:`rdpo_loss` with ``statistics=True``: those of :class:`RdpoOutput`, and the
    means over the answer tokens of every cell, which carry no gradient and are 0 for absent cells.
    """

    loss: Tensor
    logps: Tensor
    num_tokens: Tensor
    rewards: Tensor
    text_margins: Tensor
    image_margins: Tensor
    entropy: Tensor
    """Mean entropy of the distribution, in nats, (C, P)."""
    mean_logits: Tensor
    """Mean over tokens and vocabulary of the transformed logits, (C, P)."""
    top1_rate: Tensor
    """Share of labels that are the most probable token, (C, P)."""


def rdpo_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    ref_logps: Tensor | None,
    *,
    sequence_ids: Tensor | None = None,
    sequence_lengths: Tensor | None = None,
    beta: float = _DEFAULT_BETA,
    image_beta: float | None = None,
    image_weight: float = _DEFAULT_IMAGE_WEIGHT,
    objective: Objective | None = None,
    rejected_scoring: str = "label",
    token_weights: Tensor | None = None,
    statistics: bool = False,
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
    group: ProcessGroup | None = None,
) -> RdpoOutput | RdpoStatsOutput:
    """Return the rDPO loss of a batch of pairs, without storing logits or rounding them to half.

    With ``rho = logps - ref_logps``, it is the mean over pairs of ``-logsigmoid(beta * (rho[0] -
    rho[1])) - image_weight * logsigmoid(image_beta * (rho[0] - rho[2]))``, and 2 ln 2 where the
    policy equals the reference.

    Args:
        hidden_states: Backbone outputs in one of two forms: padded ``(C * P, T, D)``, where
            sequence ``c * P + p`` is cell c of pair p, or packed ``(N, D)`` with ``sequence_ids``.
            Cells: 0 chosen, 1 text_rejected, 2 image_rejected, 3 both_rejected.
        lm_head_weight: As for :func:`linear_logprob`, shape ``(V, D)``.
        labels: Token ids, already shifted, shape of ``hidden_states`` without D, int64;
            ``ignore_index`` at positions that are not part of an answer.
        ref_logps: The reference model's sums, shape ``(C, P)``, float32 or float64; None is a
            reference of 0.
        sequence_ids: Sequence ``c * P + p`` of each packed token, shape ``(N,)``, int64, in any
            order; not read where the label is ignored.  None for the padded form.
        sequence_lengths: Number of answer tokens, shape ``(C, P)``, int64, on the CPU.  If it is
            given, the host does not wait for a GPU to count them.  Required for packed tokens
            without ``ref_logps``.
        beta: KL strength of the text term; > 0.
        image_beta: KL strength of the image term; None for ``beta``.
        image_weight: Factor of the image term; >= 0.
        objective: Another table of terms in place of the three numbers above.
        rejected_scoring: ``"label"`` sums the log-probabilities of the labels in every cell, as in
            the paper. ``"top_non_label"`` sums, in cells 1 to 3, those of the most probable token
            that is not the label (the lowest id among equals), as the authors' code does;
            ``ref_logps`` must have been scored the same way.
        token_weights: Factor of each token's log-probability in ``logps``, shape of ``labels``,
            float32 or float64; not read where the label is ignored, and not differentiable.
            Lengths still count tokens.  ``ref_logps`` must have been summed with the same factors.
        statistics: Whether to return also the mean entropy, mean logit and top-1 rate of every
            cell, from the same pass.
        lm_head_bias: As for :func:`linear_logprob`, like all that follow.
        lm_head_lora: ``(A, B, scaling)``.
        ignore_index: Label of positions that are not part of an answer, which cost nothing; None
            scores every position.
        logit_scale: Factor on the logits; None means 1.
        logit_softcap: Bound on the logits.
        temperature: Divisor of the logits.
        backend: Implementation.
        memory: ``"tile"`` is allowed too: a trained head's gradients are taken a few pairs at a
            time.  ``"auto"`` takes it where the exponentials exceed ``stash_bytes``.
        workspace_bytes: Limit on scratch memory in bytes.
        stash_bytes: Limit on the exponentials that are kept for the backward, in bytes.
        accumulate: ``"auto"`` or ``"exact"``.
        group: Tensor parallelism; every rank gets the whole loss.
    Returns:
        output: :class:`RdpoOutput`, or :class:`RdpoStatsOutput` with ``statistics``; float32
            (float64 for float64 inputs).  A cell without answer tokens is absent: every term that
            reads it adds 0 for that pair.  Without pairs the loss is 0.
    Raises:
        ValueError: A shape, device, id, length, option name or number does not fit; a chosen answer
            is absent (found where lengths are on the host); ``objective`` comes with beta,
            image_beta or image_weight.
        TypeError: A dtype does not fit.
        RuntimeError: As :func:`linear_logprob`.
        NotImplementedError: As there.
    Note: differentiable once, in reverse mode only; deterministic.  ``loss`` and ``logps`` are
        differentiable with respect to the inputs, but autograd does not see ``loss`` as a function
        of ``logps``.  No gradient reaches ``ref_logps``.
    Source: paper, eq. (1); docs/paper.md has both scorings.

    Example::

        >>> import torch
        >>> from realign_kernels import rdpo_loss
        >>> hidden_states = torch.zeros(3 * 2, 4, 8, requires_grad=True)  # (C * P, T, D)
        >>> lm_head_weight = torch.zeros(5, 8)  # (V, D)
        >>> labels = torch.tensor([[3, 1, -100, -100]] * 6)  # (C * P, T): chosen answers first
        >>> ref_logps = torch.full((3, 2), -3.0)  # (C, P)
        >>> output = rdpo_loss(hidden_states, lm_head_weight, labels, ref_logps, beta=0.1)
        >>> output.loss  # 2 log(2): all answers are as probable as under the reference
        tensor(1.3863, grad_fn=...)
        >>> output.loss.backward()
    """
    objective = _resolve_objective(objective, beta, image_beta, image_weight)
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
    check_options(options)
    check_choice("rejected_scoring", rejected_scoring, REJECTED_SCORINGS)
    check_flag("statistics", statistics)
    check_batch(hidden_states, lm_head_weight, labels, ref_logps, sequence_ids, sequence_lengths)
    pairs = resolve_pair_shape(
        len(hidden_states) if sequence_ids is None else None,
        ref_logps,
        sequence_lengths,
        (objective.num_cells, MAX_CELLS),
    )
    check_transforms(ref_logps=ref_logps, sequence_ids=sequence_ids)
    head = check_call(hidden_states, lm_head_weight, labels, options)
    check_reference(ref_logps, hidden_states, "hidden_states")
    if sequence_ids is not None:
        check_sequence_ids(sequence_ids, labels)
    top_rows = _top_rows(rejected_scoring, labels, sequence_ids, pairs)
    if top_rows is not None and options.group is None and len(lm_head_weight) < 2:
        raise ValueError(
            "lm_head_weight must have V >= 2 for rejected_scoring='top_non_label', "
            f"got V = {len(lm_head_weight)}. Pass rejected_scoring='label'."
        )
    batch = PairArguments(
        labels=labels,
        sequence_ids=sequence_ids,
        sequence_lengths=sequence_lengths,
        ref_logps=None if ref_logps is None else ref_logps.detach(),
        ignore_index=options.ignore_index,
        pair_shape=list(pairs),
        terms=[number for row in objective.table() for number in row],
        nll_weight=objective.nll_weight,
    )
    weights = _checked_weights(token_weights, labels, options.ignore_index)
    outputs: tuple[Tensor, ...]
    if _takes_tiles(head, batch, memory):
        outputs, token_statistics = _reduce_in_tiles(
            head, batch, pairs, top_rows, weights, with_statistics=statistics
        )
    else:
        scores = score_tokens(
            head, labels, options, with_statistics=statistics, top_rows=top_rows,
            sequence_lengths=sequence_lengths,
        )  # fmt: skip
        token_logps = scores.token_logps
        if weights is not None:
            token_logps = token_logps * weights.to(token_logps.dtype)
        outputs = PairOutputs(*pair_loss_kept(token_logps, head.backend, *batch))[:6]
        token_statistics = (scores.entropy, scores.mean_logits, scores.is_top1)
    if not statistics:
        return RdpoOutput(*outputs)
    counts = outputs[2].clamp(min=1)
    means = []
    for values in token_statistics:
        # The loss's operator sums them too: in a fixed order, without atomics.
        values = values.detach().to(outputs[0].dtype).view(labels.shape)
        means.append(PairOutputs(*pair_loss_kept(values, head.backend, *batch)).logps / counts)
    return RdpoStatsOutput(*outputs, *means)


def _checked_weights(
    token_weights: Tensor | None, labels: Tensor, ignore_index: int
) -> Tensor | None:
    """Check the weights of tokens, and return them with 0 where the label is ignored."""
    if token_weights is None:
        return None
    check_tensor("token_weights", token_weights)
    check_transforms(token_weights=token_weights)
    check_floating("token_weights", token_weights)
    if token_weights.shape != labels.shape:
        raise ValueError(
            f"token_weights must have shape {tuple(labels.shape)} to match labels, "
            f"got {tuple(token_weights.shape)}. Give one for every label."
        )
    if token_weights.device != labels.device:
        raise ValueError(
            f"token_weights must be on {labels.device} to match labels, "
            f"got {token_weights.device}. Call .to({str(labels.device)!r})."
        )
    if token_weights.requires_grad:
        raise ValueError(
            "token_weights must not require a gradient, got one that does. Call .detach(), or "
            "weight what linear_logprob returns."
        )
    return torch.where(labels != ignore_index, token_weights, 0.0)


def _takes_tiles(head: HeadArguments, batch: PairArguments, memory: str) -> bool:
    """Return whether gradients are taken pair by pair: on request, or if the stash is too large."""
    is_trained = any(part is not None and part.requires_grad for part in head.tensors()[1:])
    if not (is_trained and torch.is_grad_enabled()):
        return False
    if memory != "auto":
        return memory == "tile"
    # Without lengths the number of answer tokens is unknown here: there are at most as many as
    # positions.
    num_rows = batch.labels.numel()
    if batch.sequence_lengths is not None and not torch.compiler.is_compiling():
        num_rows = int(batch.sequence_lengths.sum())
    return num_rows * head.stash_row_bytes() > head.budget[1]


def _reduce_in_tiles(
    head: HeadArguments,
    batch: PairArguments,
    pairs: PairShape,
    top_rows: Tensor | None,
    token_weights: Tensor | None,
    *,
    with_statistics: bool,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the results of the loss, and the statistics of tokens."""
    labels, sequence_ids = batch.labels, batch.sequence_ids
    if sequence_ids is None:
        sequence_ids = torch.arange(pairs.num_sequences, device=labels.device)
        sequence_ids = sequence_ids[:, None].expand(labels.shape)
    arguments = TileArguments(
        top_rows=None if top_rows is None else top_rows.reshape(-1),
        needed=[part is not None and part.requires_grad for part in head.tensors()],
        label_shape=list(labels.shape),
        witness=second_order_witness(*head.tensors()),
        token_weights=None if token_weights is None else token_weights.reshape(-1),
        with_statistics=with_statistics,
    )
    packed = batch._replace(labels=labels.reshape(-1), sequence_ids=sequence_ids.reshape(-1))
    outputs = TileOutputs(*rdpo_tiles_op(*head, *packed, *arguments))
    return outputs[:6], outputs[-3:]


def _top_rows(
    rejected_scoring: str, labels: Tensor, sequence_ids: Tensor | None, pairs: PairShape
) -> Tensor | None:
    """Return which positions are scored by their most probable token that is not the label."""
    if rejected_scoring == "label":
        return None
    if sequence_ids is None:
        sequence_ids = torch.arange(pairs.num_sequences, device=labels.device)[:, None]
    return (sequence_ids >= pairs.num_pairs).expand(labels.shape)


def _resolve_objective(
    objective: Objective | None, beta: float, image_beta: float | None, image_weight: float
) -> Objective:
    if objective is not None:
        check_objective(objective, "Objective or None")
    else:
        return Objective.rdpo(beta, image_beta, image_weight)
    defaults = {"beta": _DEFAULT_BETA, "image_beta": None, "image_weight": _DEFAULT_IMAGE_WEIGHT}
    given = {"beta": beta, "image_beta": image_beta, "image_weight": image_weight}
    changed = {name: value for name, value in given.items() if value != defaults[name]}
    if changed:
        raise ValueError(
            f"objective must be given without beta, image_beta and image_weight, got {changed}. "
            "Put them into the objective's terms."
        )
    return objective
