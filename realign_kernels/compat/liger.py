"""Liger's fused linear DPO loss and scaled cross-entropy, computed by this package's head.

Letters: **P** pairs, **T** positions, **D** hidden size, **V** vocabulary, **N** tokens.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from realign_kernels.compat.messages import call_with_names
from realign_kernels.linear_logprob import linear_logprob, linear_logprob_stats
from realign_kernels.objective import Objective, Term
from realign_kernels.rdpo_loss import rdpo_loss
from realign_kernels.validation import (
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_tensor,
    describe,
)

# Terms of each loss; the call sets beta.
_TERMS = {
    "sigmoid": (Term((1, -1)),),
    "hinge": (Term((1, -1), link="hinge"),),
    "bco_pair": (Term((1,)), Term((0, -1))),
    # -log s(c) - log s(-c) / 2 - log s(-r) / 2, of rewards c and r
    "nca_pair": (Term((1,), weight=1.5, label_smoothing=1 / 3), Term((0, -1), weight=0.5)),
}
# Liger's names for the arguments of the head, and for those of the reference's head.
_NAMES = {
    "hidden_states": "_input",
    "lm_head_weight": "weight",
    "labels": "target",
    "lm_head_bias": "bias",
    "num_tokens": "the number of scored tokens in target",
}
_NAMES_OF_REFERENCE = {
    "hidden_states": "ref_input",
    "lm_head_weight": "ref_weight",
    "labels": "target",
    "lm_head_bias": "ref_bias",
}
# Losses of Liger that no table of terms can express.
_REFUSED = ("exo_pair", "robust", "sppo_hard", "apo_zero", "apo_down", "discopop")

Extras = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class LigerFusedLinearDPOLoss(torch.nn.Module):
    """The DPO loss from hidden states, behind the signature of Liger's module.

    It takes the place of ``liger_kernel.chunked_loss.LigerFusedLinearDPOLoss``, and is
    :func:`realign_kernels.rdpo_loss` with an objective of two cells.

    Example::

        >>> import torch
        >>> from realign_kernels.compat.liger import LigerFusedLinearDPOLoss
        >>> hidden_states = torch.zeros(2, 4, 8)  # (2P, T, D): chosen answers first
        >>> labels = torch.tensor([[3, 1, -100, -100]] * 2)
        >>> loss_fn = LigerFusedLinearDPOLoss(beta=0.1)
        >>> loss, extras = loss_fn(
        ...     torch.zeros(5, 8), hidden_states, labels, ref_logps=torch.full((2, 1), -3.0)
        ... )
        >>> loss  # log(2): both answers are as probable as under the reference
        tensor(0.6931)
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        """Keep the options of :func:`liger_fused_linear_dpo`, and refuse unknown ones."""
        super().__init__()
        _check_loss_type(loss_type, label_smoothing)
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.discopop_tau = discopop_tau

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        *,
        ref_logps: Tensor | None = None,
    ) -> tuple[Tensor, Extras]:
        """Compute the loss; the weight comes first here, as in Liger.

        Args:
            lin_weight: Output projection, shape ``(V, D)``.
            _input: Hidden states, shape ``(2P, T, D)``.
            target: Labels, shape ``(2P, T)``.
            bias: Shape ``(V,)``.
            ref_input: The reference model's hidden states, shape ``(2P, T, D)``.
            ref_weight: The reference model's projection, shape ``(V, D)``.
            ref_bias: The reference model's bias, shape ``(V,)``.
            ref_logps: The reference's log-probabilities in place of the three, shape ``(2, P)``; no
                gradient.
        Returns:
            loss: As of :func:`liger_fused_linear_dpo`.
            extras: As there.
        """
        return liger_fused_linear_dpo(
            _input,
            lin_weight,
            target,
            bias,
            ref_input,
            ref_weight,
            ref_bias,
            self.ignore_index,
            self.beta,
            self.compute_nll_loss,
            self.compiled,
            self.use_ref_model,
            self.average_log_prob,
            self.chunk_size,
            self.loss_type,
            self.label_smoothing,
            self.discopop_tau,
            self.alpha,
            ref_logps=ref_logps,
        )


def liger_fused_linear_dpo(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ignore_index: int = -100,
    beta: float = 0.1,
    compute_nll_loss: bool = False,
    compiled: bool = True,
    use_ref_model: bool = True,
    average_log_prob: bool = False,
    chunk_size: int = 1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    alpha: float = 1.0,
    *,
    ref_logps: Tensor | None = None,
) -> tuple[Tensor, Extras]:
    """Return the DPO loss and Liger's further results, without storing logits.

    It takes the place of ``liger_kernel.chunked_loss.liger_fused_linear_dpo``.

    Args:
        _input: Hidden states, shape ``(2P, T, D)``: the P chosen answers, then the rejected ones.
        weight: Output projection, shape ``(V, D)``.
        target: Token ids, already shifted, shape ``(2P, T)``, int64.
        bias: Shape ``(V,)``.
        ref_input: The reference model's hidden states, shape ``(2P, T, D)``; no gradient.
        ref_weight: The reference model's projection, shape ``(V, D)``; no gradient.
        ref_bias: The reference model's bias, shape ``(V,)``; no gradient.
        ignore_index: Label of positions that are not part of an answer.
        beta: KL strength; > 0.
        compute_nll_loss: Whether to add ``alpha`` times the mean negative log-probability of all
            chosen tokens of the batch.
        compiled: Ignored: nothing is compiled.
        use_ref_model: Whether there is a reference; without one its log-probabilities are 0.
        average_log_prob: Whether log-probabilities are means over the tokens of an answer and not
            sums, here and in the reference.
        chunk_size: Ignored: the head cuts its own tiles.
        loss_type: ``"sigmoid"``, ``"hinge"``, ``"bco_pair"`` or ``"nca_pair"``.
        label_smoothing: Not read by these four losses, as in Liger; any value but 0 raises a
            warning.
        discopop_tau: Ignored: it belongs to a loss that is refused.
        alpha: Factor of the negative log-probability.
        ref_logps: The reference's log-probabilities, shape ``(2, P)``, float32 or float64, in place
            of the three ``ref_`` arguments: sums, or means with ``average_log_prob``; no gradient.
    Returns:
        loss: Mean over pairs, (), with a gradient in ``_input``, ``weight`` and ``bias``.
        extras: chosen_logps (P,), rejected_logps (P,), the mean chosen and rejected logit of all
            positions and tokens (), the mean negative log-probability () (0 without
            ``compute_nll_loss``), chosen_rewards (P,) and rejected_rewards (P,); they carry no
            gradient, as in Liger. All are float32 (float64 for float64 inputs).
    Raises:
        ValueError: A shape, name or number does not fit, a reference is missing, or there are two.
        TypeError: A dtype does not fit.
        NotImplementedError: Liger has the loss, but this head does not.
    Note: an answer without tokens is absent, where Liger computes with a log-probability of 0 (or
        NaN): its pair adds nothing to the terms that read it, and a chosen one is refused where
        labels are on the host.

    Example::

        >>> import torch
        >>> from realign_kernels.compat.liger import liger_fused_linear_dpo
        >>> hidden_states = torch.zeros(2, 4, 8)  # (2P, T, D): chosen answers first
        >>> labels = torch.tensor([[3, 1, -100, -100]] * 2)
        >>> loss, (chosen_logps, rejected_logps, *others) = liger_fused_linear_dpo(
        ...     hidden_states, torch.zeros(5, 8), labels, ref_logps=torch.full((2, 1), -3.0)
        ... )
        >>> chosen_logps
        tensor([-3.2189])
    """
    _check_loss_type(loss_type, label_smoothing)
    check_flag("compute_nll_loss", compute_nll_loss)
    check_flag("use_ref_model", use_ref_model)
    check_flag("average_log_prob", average_log_prob)
    check_number("alpha", alpha)
    check_integer("ignore_index", ignore_index)
    if label_smoothing != 0:
        warnings.warn(
            f"label_smoothing={label_smoothing} has no effect with loss_type={loss_type!r}, as in "
            "Liger. Pass Term(..., label_smoothing=) to rdpo_loss for a smoothed loss.",
            UserWarning,
            stacklevel=2,
        )
    objective = Objective(tuple(replace(term, beta=beta) for term in _TERMS[loss_type]))
    _check_pairs(_input, target)
    num_pairs = len(target) // 2
    num_tokens = (target != ignore_index).sum(dim=1)
    floating = torch.float64 if _input.dtype == torch.float64 else torch.float32
    # A mean is a weighted sum: only the head sees the weights of tokens.
    shares = (1 / num_tokens.clamp(min=1).to(floating))[:, None].expand(target.shape)
    if ref_logps is not None or not use_ref_model:
        model = {"ref_input": ref_input, "ref_weight": ref_weight, "ref_bias": ref_bias}
        ref_logps = _given_reference(ref_logps, model, use_ref_model, num_tokens, floating)
    else:
        with torch.no_grad():
            ref_token_logps = call_with_names(
                linear_logprob,
                _NAMES_OF_REFERENCE,
                *_reference_head(ref_input, ref_weight),
                target,
                lm_head_bias=ref_bias,
                ignore_index=ignore_index,
            )
            if average_log_prob:
                ref_token_logps = ref_token_logps * shares
            ref_logps = ref_token_logps.sum(dim=1).view(2, num_pairs)
    output = call_with_names(
        rdpo_loss,
        _NAMES,
        _input,
        weight,
        target,
        ref_logps,
        objective=objective,
        token_weights=shares if average_log_prob else None,
        lm_head_bias=bias,
        ignore_index=ignore_index,
    )
    loss, nll = output.loss, torch.zeros_like(output.loss)
    if compute_nll_loss:
        num_chosen = num_tokens[:num_pairs]
        chosen_sums = output.logps[0] * (num_chosen if average_log_prob else 1)
        nll = -chosen_sums.sum() / num_chosen.sum()
        loss = loss + alpha * nll
    chosen_logps, rejected_logps = output.logps.detach()
    chosen_rewards, rejected_rewards = output.rewards
    chosen_mean_logit, rejected_mean_logit = _mean_logits(_input, weight, bias, floating)
    return loss, (
        chosen_logps,
        rejected_logps,
        chosen_mean_logit,
        rejected_mean_logit,
        nll.detach(),
        chosen_rewards,
        rejected_rewards,
    )


class LigerFusedLinearScaledCrossEntropyFunction:
    """Negative log-probabilities and entropies of tokens, behind the name of Liger's function.

    It takes the place of ``liger_kernel.ops.LigerFusedLinearScaledCrossEntropyFunction``.

    Example::

        >>> import torch
        >>> from realign_kernels.compat.liger import LigerFusedLinearScaledCrossEntropyFunction
        >>> labels = torch.tensor([3, 1])  # (N,)
        >>> nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
        ...     torch.zeros(2, 8), torch.zeros(5, 8), labels, 0.7, return_entropy=True
        ... )
        >>> nll, entropy
        (tensor([1.6094, 1.6094]), tensor([1.6094, 1.6094]))
    """

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: float = 1.0,
        ignore_index: int = -100,
        m_tiles_per_cluster: int = 1,
        return_entropy: bool = False,
        selected_token_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the negative log-probability of every label and, on request, the entropy.

        Args:
            _input: Hidden states, shape ``(..., D)``.
            weight: Output projection, shape ``(V, D)``.
            target: Token ids, already shifted, shape ``(...)``, int64.
            temperature: Divisor of the logits; > 0.
            ignore_index: Label of positions that get 0 and no gradient.
            m_tiles_per_cluster: Ignored: the head cuts its own tiles.
            return_entropy: Whether to return the entropy too.
            selected_token_ids: Must be None.
        Returns:
            nll: Shape ``(...)``, float32 (float64 for float64 inputs), with a gradient.
            entropy: Only with ``return_entropy``: in nats, same shape and dtype, with a gradient.
        Raises:
            NotImplementedError: ``selected_token_ids`` are given.
            ValueError: As :func:`realign_kernels.linear_logprob`.  TypeError: As there.
        """
        check_flag("return_entropy", return_entropy)
        if selected_token_ids is not None:
            raise NotImplementedError(
                f"selected_token_ids must be None, got {describe(selected_token_ids)}. "
                "linear_logprob scores any token: pass each id as the label of every row."
            )
        function = linear_logprob_stats if return_entropy else linear_logprob
        result = call_with_names(
            function,
            _NAMES,
            _input,
            weight,
            target,
            temperature=temperature,
            ignore_index=ignore_index,
        )
        nll = 0 - (result.token_logps if return_entropy else result)  # not -0.0 where ignored
        return (nll, result.entropy) if return_entropy else nll


def _check_loss_type(loss_type: str, label_smoothing: float) -> None:
    """Refuse unknown losses in Liger's words, which users' tests match, and those left out here."""
    check_choice("loss_type", loss_type, None)
    if loss_type not in (*_TERMS, *_REFUSED):
        raise ValueError(
            f"Unsupported loss_type: loss_type must be one of {list(_TERMS)}, got {loss_type!r}. "
            "Leave it out for 'sigmoid'."
        )
    check_number("label_smoothing", label_smoothing)
    if loss_type == "exo_pair" and label_smoothing <= 0:
        raise ValueError(
            "label_smoothing must be > 0 for loss_type='exo_pair', "
            f"got {label_smoothing}. Its paper recommends 1e-3."
        )
    if loss_type == "robust" and not 0 <= label_smoothing < 0.5:
        raise ValueError(
            "label_smoothing must lie in [0.0, 0.5) for loss_type='robust', "
            f"got {label_smoothing}. At 0.5 the preferences carry no information."
        )
    if loss_type in _REFUSED:
        raise NotImplementedError(
            f"loss_type must be one of {list(_TERMS)} here, got {loss_type!r}. "
            "Compute it from sums of linear_logprob, or keep Liger's own loss for it."
        )


def _check_pairs(_input: Tensor, target: Tensor) -> None:
    """Refuse anything but a padded batch of chosen and rejected answers."""
    check_tensor("_input", _input)
    check_tensor("target", target)
    if _input.ndim != 3 or len(_input) % 2 != 0:
        swapped = _input.ndim == 2 and target.ndim == 2
        remedy = "The module takes lin_weight first, the function _input." if swapped else ""
        raise ValueError(
            "_input must have shape (2 * P, T, D), the chosen answers before the rejected ones, "
            f"got {tuple(_input.shape)}. {remedy or 'Stack both answers of every pair.'}"
        )
    if target.shape != _input.shape[:2]:
        raise ValueError(
            f"target must have shape {tuple(_input.shape[:2])} to match _input, "
            f"got {tuple(target.shape)}. Give one label for every hidden state."
        )


def _reference_head(ref_input: Tensor | None, ref_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the reference's hidden states and weight, and refuse a missing one."""
    if ref_input is None or ref_weight is None:
        name = "ref_input" if ref_input is None else "ref_weight"
        raise ValueError(
            f"{name} must be given with use_ref_model=True, got None. Pass the reference's hidden "
            "states and weight, or ref_logps=, or use_ref_model=False."
        )
    return ref_input, ref_weight


def _given_reference(
    ref_logps: Tensor | None,
    model: dict[str, Tensor | None],
    use_ref_model: bool,
    num_tokens: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Return the log-probabilities that were passed as the reference, (2, P)."""
    if ref_logps is None:
        return num_tokens.new_zeros(2, len(num_tokens) // 2, dtype=dtype)
    others = [name for name, part in model.items() if part is not None]
    if not use_ref_model:
        others = ["use_ref_model=False"]
    if others:
        raise ValueError(
            f"ref_logps must be the only reference, got {others[0]} as well. Leave one of them out."
        )
    check_tensor("ref_logps", ref_logps)
    expected = (2, len(num_tokens) // 2)
    if ref_logps.shape != expected:
        raise ValueError(
            f"ref_logps must have shape {expected} to match _input, got {tuple(ref_logps.shape)}. "
            "Call torch.stack([ref_chosen_logps, ref_rejected_logps])."
        )
    return ref_logps


def _mean_logits(
    _input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the mean logit of the chosen rows, and of the rejected: means are linear."""
    with torch.no_grad():
        hidden = _input.unflatten(0, (2, len(_input) // 2)).mean(dim=(1, 2), dtype=dtype)
        means = (hidden * _whole(weight.mean(dim=0, dtype=dtype))).sum(dim=1)
        if bias is not None:
            means = means + _whole(bias.mean(dtype=dtype))
        chosen, rejected = means
        return chosen, rejected


def _whole(mean: Tensor) -> Tensor:
    """Return a mean over the shards of a DTensor as a plain tensor."""
    return mean.full_tensor() if hasattr(mean, "full_tensor") else mean
