"""The head behind the signature of Cut Cross-Entropy's ``linear_cross_entropy``."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from realign_kernels.compat.messages import call_with_names
from realign_kernels.linear_logprob import linear_logprob, linear_logprob_stats
from realign_kernels.validation import (
    check_choice,
    check_flag,
    check_integer,
    check_tensor,
    describe,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

REDUCTIONS = ("none", "mean", "sum")
_NAMES = {
    "hidden_states": "e",
    "lm_head_weight": "c",
    "labels": "targets",
    "lm_head_bias": "bias",
    "logit_softcap": "softcap",
}


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    *positional: Any,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    filter_eps: float | str | None = "auto",
    use_kahan: bool = False,
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: Any = None,
    vocab_parallel_options: Any = None,
    group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the cross entropy of next tokens, without storing logits or leaving any out.

    It takes the arguments of ``cut_cross_entropy.linear_cross_entropy`` by name, both those of the
    version on PyPI (25.1.1) and those of the repository (25.6.4).

    Args:
        e: Embeddings, shape ``(..., D)``, or ``(..., T, D)`` with ``shift``; dtypes as
            :func:`realign_kernels.linear_logprob` takes them.
        c: Classifier, shape ``(V, D)``.
        targets: Class indices, shape ``(...)``, int64, each in ``[0, V)`` or ``ignore_index``.
        positional: Must be empty: a fourth argument is ``ignore_index`` in one version and ``bias``
            in the other, so everything after ``targets`` is taken by name only.
        bias: Shape ``(V,)``; differentiable.
        ignore_index: Target of positions that count nowhere and get no gradient.
        softcap: Bound on the logits, or None; > 0.
        reduction: ``"none"``, ``"sum"``, or ``"mean"`` over the targets that are not ignored.
        shift: Number k of positions that targets are ahead of embeddings, in ``[0, T)``: scores
            ``targets[..., k:]`` by ``e[..., :-k, :]``.  True is 1.
        return_lse: Whether to return the log of the sum of exponentials as well.
        filter_eps: Not read, like the next six: these choose kernels, the precision of sums, and
            gradients to leave out; here sums are in float32 and nothing is left out.
        use_kahan: Not read.
        accum_e_fp32: Not read.
        accum_c_fp32: Not read.
        filter_e_grad: Not read.
        filter_c_grad: Not read.
        impl: Not read.
        vocab_parallel_options: Must be None; see ``group``.
        group: Tensor parallelism, as for :func:`realign_kernels.linear_logprob`: every rank passes
            its own contiguous shard of ``c`` and ``bias``, in rank order.
    Returns:
        loss: Shape of ``targets``, k shorter in the last dimension, for ``"none"``, with 0 where
            the target is ignored; else ``()``.  The mean of no target is NaN.  float32 (float64 for
            float64 inputs).
        lse: Only with ``return_lse``, as ``(loss, lse)``: shape of the loss for ``"none"``, 0 where
            the target is ignored; differentiable.
    Raises:
        TypeError: There is a fourth positional argument, or a dtype or type does not fit.
        ValueError: A shape, device, target, shift or name does not fit.
        NotImplementedError: ``vocab_parallel_options`` is given; also as
            :func:`realign_kernels.linear_logprob`.
    Note: Differentiable once, in reverse mode only; the backward keeps as much memory as that of
        :func:`realign_kernels.linear_logprob`.

    Example::

        >>> import torch
        >>> from realign_kernels.compat.cce import linear_cross_entropy
        >>> e, c = torch.zeros(1, 4, 8, requires_grad=True), torch.zeros(5, 8)  # (B, T, D), (V, D)
        >>> labels = torch.tensor([[0, 3, 1, -100]])
        >>> loss = linear_cross_entropy(e, c, labels, shift=1)  # each next token
        >>> loss
        tensor(1.6094, grad_fn=...)
        >>> loss.backward()
    """
    if positional:
        raise TypeError(
            "linear_cross_entropy must get arguments after targets by name, got "
            f"{3 + len(positional)} positional ones. The fourth is ignore_index in Cut "
            "Cross-Entropy 25.1.1 and bias in 25.6.4: pass bias=, ignore_index= and so on."
        )
    if vocab_parallel_options is not None:
        raise NotImplementedError(
            f"vocab_parallel_options must be None, got {describe(vocab_parallel_options)}. "
            "Pass group=, the process group over which c is cut into shards in rank order."
        )
    check_tensor("e", e)
    check_tensor("targets", targets)
    check_choice("reduction", reduction, REDUCTIONS)
    check_flag("return_lse", return_lse)
    check_integer("ignore_index", ignore_index)
    num_shifted = _checked_shift(shift, targets)
    if num_shifted:
        if e.shape[:-1] != targets.shape:
            raise ValueError(
                f"targets must have shape {tuple(e.shape[:-1])} to match e, "
                f"got {tuple(targets.shape)}. With shift= neither is shifted beforehand."
            )
        e, targets = e[..., :-num_shifted, :], targets[..., num_shifted:]
    results = call_with_names(
        linear_logprob_stats if return_lse else linear_logprob, _NAMES, e, c, targets,
        lm_head_bias=bias, ignore_index=ignore_index, logit_softcap=softcap, group=group,
    )  # fmt: skip
    losses = 0 - (results.token_logps if return_lse else results)  # not -0.0 where ignored
    if reduction == "mean":
        losses = losses.sum() / (targets != ignore_index).sum()
    elif reduction == "sum":
        losses = losses.sum()
    return (losses, results.lse) if return_lse else losses


class LinearCrossEntropy(nn.Module):
    """Module that holds the options of :func:`linear_cross_entropy`, as Cut Cross-Entropy has it.

    Args:
        ignore_index: As for :func:`linear_cross_entropy`, like all that follow.
        softcap: Bound on the logits.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``.
        positional: Must be empty: a fourth argument is ``filter_eps`` in one version and ``shift``
            in the other.
        options: The other options, by name.
    Raises:
        TypeError: There is a fourth positional argument, or an unknown name.

    Example::

        >>> import torch
        >>> from realign_kernels.compat.cce import LinearCrossEntropy
        >>> e, c, labels = torch.zeros(1, 4, 8), torch.zeros(5, 8), torch.tensor([[0, 3, 1, -100]])
        >>> LinearCrossEntropy(shift=1)(e, c, labels)
        tensor(1.6094)
    """

    def __init__(
        self,
        ignore_index: int = -100,
        softcap: float | None = None,
        reduction: str = "mean",
        *positional: Any,
        **options: Any,
    ) -> None:
        """Keep the options as attributes, which can be changed later."""
        super().__init__()
        if positional:
            raise TypeError(
                "LinearCrossEntropy must get arguments after reduction by name, got "
                f"{3 + len(positional)} positional ones. The fourth is filter_eps in Cut "
                "Cross-Entropy 25.1.1 and shift in 25.6.4: pass shift= and so on."
            )
        if unknown := options.keys() - _OPTIONS.keys():
            raise TypeError(
                "LinearCrossEntropy must get options of linear_cross_entropy, "
                f"got {min(unknown)!r}. It takes {sorted(_OPTIONS)}."
            )
        self.ignore_index = ignore_index
        self.softcap = softcap
        self.reduction = reduction
        for name, default in _OPTIONS.items():
            setattr(self, name, options.get(name, default))

    def forward(
        self, e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return what :func:`linear_cross_entropy` returns."""
        options = {name: getattr(self, name) for name in _OPTIONS}
        return linear_cross_entropy(
            e,
            c,
            targets,
            bias=bias,
            ignore_index=self.ignore_index,
            softcap=self.softcap,
            reduction=self.reduction,
            **options,
        )


# Options that the class takes by name alone, and their defaults.
_OPTIONS = {
    name: parameter.default
    for name, parameter in inspect.signature(linear_cross_entropy).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
    and name not in {"bias", "ignore_index", "softcap", "reduction"}
}


def _checked_shift(shift: bool | int, targets: Tensor) -> int:
    """Return the number of positions to shift by."""
    if not isinstance(shift, bool):
        check_integer("shift", shift)
    num_positions = targets.shape[-1] if targets.ndim else 1
    if not 0 <= shift < max(num_positions, 1):
        raise ValueError(
            f"shift must be in [0, {num_positions}) to match the last dimension of targets, "
            f"got {shift}. Pass 1 for the next token, with at least two positions."
        )
    return int(shift)
