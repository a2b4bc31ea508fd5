"""Implementations of a head's log-probabilities, ours and those of others, behind one signature.

A provider takes ``(hidden_states, lm_head_weight, labels, grad_token_logps or None, frozen)`` and
returns ``token_logps``, leaving gradients in ``.grad``.  The shapes of its inputs and its result
depend on its job:

- ``token``: hidden states (N, D), labels (N,), result (N,);
- ``mean``: the same inputs, result (), the mean over tokens (for libraries that offer no more);
- ``dpo``: hidden states (S, T, D) with the chosen half first, labels (S, T), result (), the
  reference-free DPO loss at beta 0.1.

Other libraries are called as their own documentation or trainer calls them.  A library that is not
installed, or does not run on a device, is reported with the reason.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from realign_kernels import Objective, linear_logprob, rdpo_loss

BETA = 0.1
MODES = ("forward", "frozen", "trainable")

Score = Callable[[Tensor, Tensor, Tensor, "float | None"], Tensor]


class Flops(NamedTuple):
    """Operations of an algorithm in units of N * V * D; one GEMM has 2."""

    forward: int
    frozen: int  # forward and backward, head frozen
    trainable: int


_STORED_LOGITS = Flops(2, 4, 6)
_RECOMPUTED_LOGITS = Flops(2, 6, 8)
_BOTH_GRADIENTS_ALWAYS = Flops(2, 8, 8)


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One way to do a job."""

    name: str
    score: Score
    flops: Flops
    flops_on_cpu: Flops | None = None  # where another algorithm runs there
    job: str = "token"
    module: str = "torch"  # must be importable
    distribution: str = "torch"  # the package that has the version
    needs_gpu: bool = False
    has_softcap: bool = False
    note: str = ""

    def __call__(
        self,
        hidden_states: Tensor,
        lm_head_weight: Tensor,
        labels: Tensor,
        grad_token_logps: Tensor | None,
        frozen: bool,
        *,
        logit_softcap: float | None = None,
    ) -> Tensor:
        """Score the labels; with an upstream gradient, leave gradients in ``.grad``."""
        differentiates = grad_token_logps is not None
        hidden_states.grad = lm_head_weight.grad = None
        hidden_states.requires_grad_(differentiates)
        lm_head_weight.requires_grad_(differentiates and not frozen)
        with torch.set_grad_enabled(differentiates):
            result = self.score(hidden_states, lm_head_weight, labels, logit_softcap)
        if grad_token_logps is not None:
            result.backward(grad_token_logps.to(result.dtype))
        return result.detach()

    def run(self, mode: str, inputs: Inputs) -> Tensor:
        """Call the provider in a mode of ``MODES``."""
        grad = None if mode == "forward" else inputs.grad_token_logps
        return self(
            inputs.hidden_states,
            inputs.lm_head_weight,
            inputs.labels,
            grad,
            mode == "frozen",
            logit_softcap=inputs.logit_softcap,
        )

    def flops_in(self, mode: str, device_type: str) -> int:
        """Return the operations of a mode, in units of N * V * D."""
        flops = self.flops_on_cpu if device_type == "cpu" and self.flops_on_cpu else self.flops
        return getattr(flops, mode)

    def version(self) -> str:
        """Return the installed version, or "not installed"."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"


class Inputs(NamedTuple):
    """Inputs of a job."""

    hidden_states: Tensor
    lm_head_weight: Tensor
    labels: Tensor
    grad_token_logps: Tensor  # float64, shape of the result
    logit_softcap: float | None = None


def why_not(provider: Provider, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why a provider cannot do its job on a device, or None, from a try on tiny inputs."""
    module = provider.module.split(".")[0]
    if importlib.util.find_spec(module) is None:
        return f"{provider.distribution} is not installed"
    if provider.needs_gpu and device.type == "cpu":
        return f"{provider.distribution} {provider.version()} needs a GPU for this"
    # 128 rows and 256 columns: no library needs more
    hidden_states = torch.randn(128, 128, device=device).to(dtype)
    weight = torch.randn(256, 128, device=device).to(dtype)
    labels = torch.randint(256, (128,), device=device)
    if provider.job == "dpo":
        hidden_states, labels = hidden_states.view(2, 64, 128), labels.view(2, 64)
    shape = labels.shape if provider.job == "token" else ()
    grad = torch.ones(shape, device=device, dtype=torch.float64)
    try:
        provider.run("trainable", Inputs(hidden_states, weight, labels, grad))
    except Exception as error:  # anything that another library's code raises is the reason
        first_line = str(error).strip().splitlines()[:1]
        return f"{type(error).__name__}: {' '.join(first_line)[:160]}"
    return None


def providers_of(job: str) -> dict[str, Provider]:
    """Return the providers of a job by name."""
    return {name: provider for name, provider in PROVIDERS.items() if provider.job == job}


def _ours(backend: str) -> Score:
    def score(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
        return linear_logprob(hidden, weight, labels, logit_softcap=softcap, backend=backend)

    return score


def _torch_logits(dtype: torch.dtype | None) -> Score:
    def score(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
        logits = F.linear(hidden, weight)
        if dtype is not None:
            logits = logits.to(dtype)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)

    return score


def _torch_lce(*, reduction: str, chunked: bool) -> Score:
    def score(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None
        return -F.linear_cross_entropy(hidden, weight, labels, reduction=reduction, options=options)

    return score


def _trl(outputs: tuple[str, ...]) -> Score:
    def score(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as columns

        flat = hidden.reshape(-1, hidden.shape[-1])
        arguments = (flat, weight, None, labels.reshape(-1), 1.0, columns, softcap, 1.0, outputs)
        return ChunkedLogProbFunction.apply(*arguments)[0].view(labels.shape)

    return score


def _liger_flce(reduction: str) -> Score:
    def score(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction,
        )

        return -LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, labels, None, None, -100, 0.0, 0.0, reduction, softcap
        )[0]

    return score


def _liger_flsce(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, labels)


def _cce(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    implementation = "cce" if hidden.is_cuda else "torch_compile"
    return -linear_cross_entropy(
        hidden, weight, labels, softcap=softcap, reduction="none", impl=implementation
    )


def _quack(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return -chunked_linear_cross_entropy(hidden, weight, labels, reduction="mean")


def _ours_mean(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    return linear_logprob(hidden, weight, labels).mean()


def _ours_dpo(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    num_pairs = len(labels) // 2
    lengths = (labels != -100).sum(-1).view(2, num_pairs).cpu()
    return rdpo_loss(
        hidden, weight, labels, None, sequence_lengths=lengths, objective=Objective.dpo(BETA)
    ).loss


def _dpo_of(score: Score) -> Score:
    """Return the DPO loss as a trainer composes it from the log-probabilities of tokens."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
        chosen, rejected = score(hidden, weight, labels, softcap).float().sum(-1).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    return loss


def _liger_dpo(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, compute_nll_loss=False)
    return loss(weight, hidden, labels)[0]


_TRL = {"module": "trl", "distribution": "trl"}
_LIGER = {"module": "liger_kernel", "distribution": "liger-kernel"}
_QUACK = {"module": "quack", "distribution": "quack-kernels"}
# the outputs that DPOTrainer asks for: the last three are for its logs
_TRL_DPO_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")

_ALL = (
    Provider(name="ours", score=_ours("auto"), flops=Flops(2, 4, 6), has_softcap=True),
    Provider(
        name="eager_ours", score=_ours("eager"), flops=Flops(2, 4, 6), has_softcap=True,
        note="the same with kernels in plain PyTorch",
    ),
    Provider(
        name="torch_logits", score=_torch_logits(None), flops=_STORED_LOGITS, has_softcap=True,
        note="F.linear, log_softmax, gather in the dtype of the inputs",
    ),
    Provider(
        name="torch_logits_fp32", score=_torch_logits(torch.float32), flops=_STORED_LOGITS,
        has_softcap=True, note="the same with logits upcast after the product",
    ),
    Provider(
        name="torch_lce", score=_torch_lce(reduction="none", chunked=False), flops=_STORED_LOGITS,
        note="F.linear_cross_entropy, default options",
    ),
    Provider(
        name="torch_lce_chunked", score=_torch_lce(reduction="none", chunked=True),
        flops=_RECOMPUTED_LOGITS, note="F.linear_cross_entropy, LinearCrossEntropyOptions()",
    ),
    Provider(
        name="trl", score=_trl(_TRL_DPO_OUTPUTS), flops=_RECOMPUTED_LOGITS, has_softcap=True,
        note="ChunkedLogProbFunction with the outputs that DPOTrainer asks for", **_TRL,
    ),
    Provider(
        name="trl_plain", score=_trl(("log_probs",)), flops=_RECOMPUTED_LOGITS, has_softcap=True,
        note="the same without entropy, mean logit and top-1", **_TRL,
    ),
    Provider(
        name="liger_flce", score=_liger_flce("none"), flops=_RECOMPUTED_LOGITS, has_softcap=True,
        needs_gpu=True, note="LigerFusedLinearCrossEntropyFunction, reduction='none'", **_LIGER,
    ),
    Provider(
        name="liger_flsce", score=_liger_flsce, flops=_BOTH_GRADIENTS_ALWAYS,
        note="LigerFusedLinearScaledCrossEntropyFunction; off Hopper its torch fallback", **_LIGER,
    ),
    Provider(
        name="cce", score=_cce, flops=_BOTH_GRADIENTS_ALWAYS, flops_on_cpu=_STORED_LOGITS,
        has_softcap=True, module="cut_cross_entropy", distribution="cut-cross-entropy",
        note="linear_cross_entropy, reduction='none'; impl cce on GPUs (operations are a bound: it "
        "skips blocks), torch_compile on CPUs",
    ),
    Provider(name="ours_mean", job="mean", score=_ours_mean, flops=Flops(2, 4, 6)),
    Provider(
        name="torch_lce_mean", job="mean", score=_torch_lce(reduction="mean", chunked=True),
        flops=Flops(2, 4, 6), note="F.linear_cross_entropy, LinearCrossEntropyOptions()",
    ),
    Provider(
        name="liger_flce_mean", job="mean", score=_liger_flce("mean"), flops=Flops(2, 4, 6),
        needs_gpu=True, **_LIGER,
    ),
    Provider(
        name="quack", job="mean", score=_quack, flops=Flops(2, 4, 6), needs_gpu=True,
        note="chunked_linear_cross_entropy; mean only", **_QUACK,
    ),
    Provider(
        name="ours_dpo", job="dpo", score=_ours_dpo, flops=Flops(2, 4, 6), note="rdpo_loss"
    ),
    Provider(
        name="torch_dpo", job="dpo", score=_dpo_of(_torch_logits(torch.float32)),
        flops=_STORED_LOGITS, note="logits upcast to float32, log_softmax, gather, logsigmoid",
    ),
    Provider(
        name="trl_dpo", job="dpo", score=_dpo_of(_trl(_TRL_DPO_OUTPUTS)), flops=_RECOMPUTED_LOGITS,
        note="ChunkedLogProbFunction, then logsigmoid", **_TRL,
    ),
    Provider(
        name="liger_dpo", job="dpo", score=_liger_dpo, flops=Flops(6, 4, 6),
        note="LigerFusedLinearDPOLoss without a reference model", **_LIGER,
    ),
)  # fmt: skip
PROVIDERS = {provider.name: provider for provider in _ALL}
