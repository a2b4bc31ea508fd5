"""Exact log-probabilities in TRL's own trainers.

At every call, TRL's fused head (``trl.trainer.utils.add_fused_lm_head``) looks up the function that
scores its labels. The patch replaces that function by one with the same arguments and results.
Letters: **N** labels, **D** hidden size, **V** vocabulary.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Collection
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, Self

import torch
from torch import Tensor

from realign.errors import RefusedError
from realign_kernels import linear_logprob, linear_logprob_stats

_UTILS = "trl.trainer.utils"
_FUNCTION, _CHOICE = "_ChunkedLogProbFunction", "_use_triton"  # their names in that module
_ARGUMENTS = [
    "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
    "logit_scale", "outputs",
]  # fmt: skip
# TRL's names of the outputs after the log-probabilities, in the order of the results.
_STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

_HALF_OR_FLOAT32 = {torch.float16, torch.bfloat16, torch.float32}
# On other devices TRL's function is written for their compilers, and the exact head is untested.
_DEVICE_TYPES = ("cpu", "cuda", "xpu")

Results = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class TrlPatch:
    """The patch of TRL that :func:`patch_trl` has made.

    Attributes:
        calls: Number of calls of TRL's function that the exact head has answered.
        passed_on: Number of calls that went to TRL's own function, which takes more inputs than the
            head.
    """

    def __init__(self, compact: bool) -> None:
        self.compact = compact
        self.calls = 0
        self.passed_on = 0

    def undo(self) -> None:
        """End this patch. TRL's own functions are restored after the last patch ends."""
        if self in _patches:
            _patches.remove(self)
            _bind()

    def __enter__(self) -> Self:
        if self not in _patches:
            _check_signature()
            _patches.append(self)
            _bind()
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


def patch_trl(*, compact: bool = True) -> TrlPatch:
    """Let TRL's trainers compute log-probabilities by the exact head, in this process.

    DPO, KTO, SFT, GRPO, RLOO and the experimental asynchronous GRPO change; trainers that were made
    before do too. The patch holds until the program ends, or until the end of a ``with`` block.
    Calling it twice is the same as calling it once.

    Args:
        compact: Whether to score only answers on CPUs too, as TRL does on GPUs. On CPUs TRL scores
            every position, and drops those outside of answers.
    Returns:
        patch: The patch, which counts its calls; ``patch.undo()`` ends it.
    Raises:
        RefusedError: TRL is not installed, or its function has other arguments.

    Example::

        >>> from realign.integrations.trl import patch_trl
        >>> with patch_trl() as patch:
        ...     pass  # DPOTrainer(...).train()
        >>> patch.calls, patch.passed_on
        (0, 0)
    """
    if not isinstance(compact, bool):
        raise RefusedError(
            f"compact must be True or False, got {compact!r}. Leave it out for the default."
        )
    return TrlPatch(compact).__enter__()


_patches: list[TrlPatch] = []  # those in force; the last one's ``compact`` decides
_originals: dict[str, Any] = {}


def _check_signature() -> None:
    """Refuse a TRL whose function cannot be replaced."""
    try:
        utils = import_module(_UTILS)
    except ImportError as error:
        raise RefusedError(
            f"patch_trl requires trl >= 1.15, got none: {error}. Run pip install 'trl>=1.15'."
        ) from error
    function: Any = getattr(utils, _FUNCTION, None)
    if function is ExactLogProbFunction:
        return
    found = "no such function"
    if hasattr(function, "forward"):
        names = [*inspect.signature(function.forward).parameters][1:]  # without ctx
        if names == _ARGUMENTS:
            return
        found = f"({', '.join(names)})"
    version = getattr(sys.modules["trl"], "__version__", "of an unknown version")
    raise RefusedError(
        "patch_trl requires the log-prob function of trl >= 1.15 with the arguments "
        f"({', '.join(_ARGUMENTS)}), got {found} in trl {version}. Install a trl that has it, "
        "or train without the patch."
    )


def _bind() -> None:
    """Put our functions in place of TRL's, or TRL's own back if no patch is in force."""
    utils: Any = import_module(_UTILS)
    if _patches and getattr(utils, _FUNCTION) is not ExactLogProbFunction:
        _originals[_FUNCTION] = getattr(utils, _FUNCTION)
        _rebind(_originals[_FUNCTION], ExactLogProbFunction)
    elif not _patches:
        _rebind(ExactLogProbFunction, _originals[_FUNCTION])
    # Only in this module: others import it to choose between kernels of their own.
    choice = getattr(utils, _CHOICE, None)
    if choice is None:  # TRL 1.15 scores answers alone, anywhere
        return
    if choice is not _scores_answers_alone:
        _originals[_CHOICE] = choice
    is_compact = bool(_patches) and _patches[-1].compact
    setattr(utils, _CHOICE, _scores_answers_alone if is_compact else _originals[_CHOICE])


def _rebind(old: Any, new: Any) -> None:
    """Replace an object in every module of TRL that has been imported."""
    for name, module in [*sys.modules.items()]:
        if name.partition(".")[0] == "trl" and isinstance(module, ModuleType):
            for attribute in [key for key, value in vars(module).items() if value is old]:
                setattr(module, attribute, new)


def _scores_answers_alone(device: torch.device) -> bool:
    """Return whether to score answers alone: on CPUs, and wherever TRL does so itself."""
    return device.type == "cpu" or _originals[_CHOICE](device)


class ExactLogProbFunction:
    """Replacement of TRL's ``ChunkedLogProbFunction``."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Collection[str] = _STATISTICS,
    ) -> Results:
        """Return log-probabilities, entropy, log sum of squared probabilities, mean logits and
        whether the targets are the most probable tokens, (N,) each. An output that ``outputs`` does
        not name is None.

        Hidden states are (N, D) and the weight is (V, D). ``chunk_size`` is not used.
        """
        is_ours = bool(_patches) and _is_for_the_head(
            hidden, weight, bias, targets, (temperature, logit_scale, final_logit_softcapping)
        )
        for patch in _patches:
            if is_ours:
                patch.calls += 1
            else:
                patch.passed_on += 1
        if not is_ours:
            return _originals[_FUNCTION].apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping,
                logit_scale, outputs,
            )  # fmt: skip
        is_trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        score = partial(
            _score,
            targets.long(),
            outputs,
            temperature=temperature,
            logit_scale=logit_scale,
            logit_softcap=final_logit_softcapping,
            # As in TRL's function, nothing of size N x V is kept for a trained head.
            memory="recompute" if is_trained else "auto",
        )
        if hasattr(weight, "ds_id"):
            return _GatheredHead.apply(score, hidden, weight, bias)
        return score(hidden, weight, bias)


def _is_for_the_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    numbers: tuple[float, float, float | None],
) -> bool:
    """Return whether the exact head accepts the inputs; TRL's function accepts more kinds."""
    if not all(number is None or _is_positive(number) for number in numbers):
        return False
    tensors = [hidden, weight] if bias is None else [hidden, weight, bias]
    dtypes = {tensor.dtype for tensor in tensors}
    return (
        hidden.device.type in _DEVICE_TYPES
        and (dtypes <= _HALF_OR_FLOAT32 or dtypes == {torch.float64})
        # A subclass of Tensor, such as a quantized weight, defines its own products.
        and all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
        and _are_tokens(targets, len(weight))
    )


def _is_positive(number: Any) -> bool:
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    return is_number and 0 < number < math.inf


def _are_tokens(targets: Tensor, vocabulary_size: int) -> bool:
    """Return whether every target has a row in the head.

    TRL's function also accepts targets without one, such as image tokens that a model cannot
    output.
    """
    return not ((targets < 0) | (targets >= vocabulary_size)).any()


def _score(
    targets: Tensor,
    outputs: Collection[str],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    **options: Any,
) -> Results:
    """Compute the requested outputs with the exact head; like TRL's, they are always float32."""
    if bias is not None and bias.dtype not in (hidden.dtype, torch.float32):
        bias = bias.to(hidden.dtype)  # as TRL rounds it
    # The number of scored labels is known, so nothing waits for the GPU.
    options |= {"lm_head_bias": bias, "ignore_index": None, "num_scored": len(targets)}
    if not any(name in outputs for name in _STATISTICS):
        logps = linear_logprob(hidden, weight, targets, **options)
        return logps.float(), None, None, None, None
    stats = linear_logprob_stats(hidden, weight, targets, **options)
    return (
        stats.token_logps.float(),
        stats.entropy.float() if "entropy" in outputs else None,
        stats.log_sum_sq_probs.float() if "log_sum_sq_probs" in outputs else None,
        stats.mean_logits.float() if "mean_logits" in outputs else None,
        stats.is_top1 if "is_top1" in outputs else None,
    )


class _GatheredHead(torch.autograd.Function):
    """The head under ZeRO-3, whose weight is gathered only inside a context manager of TRL's.

    TRL enters the context around the forward. The backward enters it again, as in TRL's function,
    and repeats the forward, so that nothing reads a weight that was released.
    """

    @staticmethod
    def forward(
        ctx: Any,
        score: Callable[..., Results],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Results:
        results = score(hidden, weight, bias)
        device_type = hidden.device.type
        ctx.score = score
        ctx.autocast = {
            "device_type": device_type,
            "enabled": torch.is_autocast_enabled(device_type),
            "dtype": torch.get_autocast_dtype(device_type),
        }
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.mark_non_differentiable(*(part for part in results[2:] if part is not None))
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        gather = import_module(_UTILS).maybe_gather_lm_head_ctx
        with gather(weight, bias), torch.enable_grad(), torch.autocast(**ctx.autocast):
            leaves = [
                None if tensor is None else tensor.detach().requires_grad_(is_needed)
                for tensor, is_needed in zip(
                    (hidden, weight, bias), ctx.needs_input_grad[1:], strict=True
                )
            ]
            results = ctx.score(*leaves)
            pairs = [pair for pair in zip(results[:2], grads, strict=False) if pair[1] is not None]
            inputs = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
            outputs, grad_outputs = zip(*pairs, strict=True)
            grad_inputs = iter(torch.autograd.grad(outputs, inputs, grad_outputs))
        return (
            None,
            *(
                next(grad_inputs) if leaf is not None and leaf.requires_grad else None
                for leaf in leaves
            ),
        )
