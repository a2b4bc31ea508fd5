"""Guards: all numbers are finite, and before the first step the policy equals its reference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from realign_kernels import CELL_NAMES, Objective, RdpoOutput, RdpoStatsOutput, preference_loss

# Nats by which two computations of one pair's margin may differ.
FLOAT32_TOLERANCE = 1e-4  # for answers of up to 100 nats; rounding grows with the sum
VARIANCES = 6  # in 16 bits, as a multiple of the change by batching that the cache's probe found
DEFAULT_BATCH_VARIANCE = 0.5  # rms in nats, if a cache recorded none
LEAST_TOLERANCE_16_BITS = 0.05  # a probe of very short answers may have found no change
LOSS_TOLERANCE = 1e-5

_REMEDIES = {
    "ref_logps": "The reference was computed wrongly or damaged: build the cache again.",
    "pixel_values": "Look at the images of these rows, and at the image processor.",
}
_DIVERGED = "Lower the learning rate, or look at these rows; earlier checkpoints are as they were."


def not_finite(output: RdpoOutput, batch: Mapping[str, Any], ids: Sequence[str]) -> str | None:
    """Return a message on the first tensor of a micro-batch that is not finite, or None.

    Inputs come before outputs. The device is synchronized once.

    Args:
        output: The model's output.
        batch: The model's inputs, of which floating-point tensors are checked.
        ids: Ids of the rows, one per pair.
    """
    tensors = {
        name: value
        for name, value in batch.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel()
    }
    tensors |= {"logps": output.logps, "loss": output.loss}
    device = output.loss.device
    flags = torch.stack([t.detach().isfinite().all().to(device) for t in tensors.values()])
    if flags.all():
        return None
    name = next(name for name, fine in zip(tensors, flags.tolist(), strict=True) if not fine)
    values = tensors[name].detach()
    bad = ~values.isfinite()
    value, rows, cell = values[bad][0].item(), list(ids), ""
    if name in ("ref_logps", "logps") and values.ndim == 2 and values.shape[1] == len(ids):
        rows = [row for row, is_bad in zip(ids, bad.any(0).tolist(), strict=True) if is_bad]
        cell = f" ({CELL_NAMES[int(bad.any(1).nonzero()[0])]})"
    of = "row" if len(rows) == 1 else "one of the rows"
    remedy = _REMEDIES.get(name, _DIVERGED)
    return f"{name}{cell} must be finite, got {value} for {of} {', '.join(rows)}. {remedy}"


def gradients_are_finite(parameters: Iterable[nn.Parameter]) -> bool:
    """Return whether no gradient of this process has a NaN or an infinity."""
    largest = _largest([_local(p.grad) for p in parameters if p.grad is not None])
    return math.isfinite(largest)


def first_bad_gradient(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """Return the first parameter whose gradient is not finite, with the value; or None."""
    for name, parameter in named_parameters:
        if parameter.grad is not None:
            values = _local(parameter.grad)
            if not math.isfinite(_largest([values])):
                return f"{name}, {values[~values.isfinite()][0].item()}"
    return None


def _largest(gradients: list[Tensor]) -> float:
    # the largest value, because a sum of squares may overflow although every value is finite
    nonempty = [gradient for gradient in gradients if gradient.numel()]  # a shard may be empty
    return nn.utils.get_total_norm(nonempty, math.inf).item() if nonempty else 0.0


def _local(gradient: Tensor) -> Tensor:
    """Return this process's shard of a DTensor."""
    to_local = getattr(gradient, "to_local", None)
    return gradient if to_local is None else to_local()


def off_reference(
    output: RdpoOutput | RdpoStatsOutput,
    objective: Objective,
    ids: Sequence[str],
    *,
    is_exact: bool,
    batch_variance: float | None = None,
) -> str | None:
    """Return a message if an untrained policy differs from its reference, or None.

    Before the first step they are one model, so every margin is 0 and the loss is that of zero
    margins: 2 ln 2 for rDPO.

    Args:
        output: Output of a micro-batch before the first optimizer step.
        objective: The objective of the run.
        ids: Ids of the rows, one per pair.
        is_exact: Whether everything is computed in float32 or better. Margins are then within 1e-4
            nats, in proportion for answers below -100 nats, and the loss within 1e-5 for rDPO's
            defaults.
        batch_variance: Root mean square, in nats, of the change of a row by batching alone, which
            the cache's probe measured; in 16 bits, margins must be within 6 times that.
    """
    logps = output.logps.detach().double().cpu()
    if not logps.numel():
        return None  # a rank without a pair
    ratios = output.rewards.double().cpu() / objective.beta  # rho, (C, P)
    is_present = output.num_tokens.cpu() > 0
    tolerance = _tolerance(logps, is_exact=is_exact, batch_variance=batch_variance)
    margins = torch.where(is_present[0] & is_present[1:], ratios[0] - ratios[1:], 0.0)  # (C-1, P)
    cell, pair = divmod(int(margins.abs().argmax()), logps.shape[1])
    worst = margins[cell, pair].item()
    expected = preference_loss(logps, logps, objective, num_tokens=output.num_tokens.cpu())
    loss_error = abs(output.loss.item() - expected.loss.item())
    if abs(worst) <= tolerance and not (
        is_exact and loss_error > _loss_tolerance(objective, tolerance)
    ):
        return None
    return (
        f"the first loss must be {expected.loss.item():.6f}, that of a policy which equals its "
        f"reference, got {output.loss.item():.6f}; the margin of {CELL_NAMES[cell + 1]} of row "
        f"{ids[pair]} is {worst:.3g} nats, where rounding explains at most {tolerance:.2g}.\n"
        "Likely causes: the reference was computed with other weights, another chat template or "
        "image processor, or another precision or attention; dropout is on; a new adapter does not "
        "begin at zero; images are augmented.\n"
        "Build the reference from the model that is trained. Only if the policy is meant to begin "
        "elsewhere, set check_first_step to false."
    )


def _tolerance(logps: Tensor, *, is_exact: bool, batch_variance: float | None) -> float:
    if is_exact:
        return FLOAT32_TOLERANCE * max(1.0, logps.abs().max().item() / 100)
    variance = DEFAULT_BATCH_VARIANCE if batch_variance is None else batch_variance
    return max(LEAST_TOLERANCE_16_BITS, VARIANCES * variance)


def _loss_tolerance(objective: Objective, tolerance: float) -> float:
    """Return how far margins within ``tolerance`` move the loss: 1e-5 for rDPO at beta 0.1."""
    if any(term.link != "logsigmoid" for term in objective.terms):
        return math.inf  # other links have other slopes; the check of the margins suffices
    slope = sum(term.weight * term.beta / 2 for term in objective.terms)  # of logsigmoid at 0
    return max(LOSS_TOLERANCE, slope * tolerance)
