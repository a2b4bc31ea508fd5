"""The metrics of a step, under TRL's names, and those of the image pair."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from realign_kernels import RdpoStatsOutput

NUM_TOKENS = "num_tokens"  # in a batch; TRL logs the running total


def step_metrics(
    output: RdpoStatsOutput, num_tokens_read: Tensor, sum_over_ranks: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Return the means of the metrics over the batches of all ranks, with one synchronization of
    the device.

    Rewards and log-probabilities are means over pairs; entropy, logits and accuracy are means over
    the scored tokens of the answer pair, as TRL has them. Metrics of the image pair are left out if
    no pair has a retrieved image.

    Args:
        output: Output of a micro-batch.
        num_tokens_read: Number of tokens in the model's input, a scalar tensor.
        sum_over_ranks: Function that sums a tensor elementwise over the ranks.
    """
    tokens = output.num_tokens.to(output.logps)
    present = (tokens > 0).to(output.logps)
    rewards, logps = output.rewards, output.logps
    # values and weights, of one shape
    pairs: dict[str, tuple[Tensor, Tensor]] = {
        "entropy": (output.entropy[:2], tokens[:2]),
        "logits/chosen": (output.mean_logits[0], tokens[0]),
        "logits/rejected": (output.mean_logits[1], tokens[1]),
        "mean_token_accuracy": (output.top1_rate[0], tokens[0]),
        "rewards/chosen": (rewards[0], present[0]),
        "rewards/rejected": (rewards[1], present[1]),
        "rewards/accuracies": (rewards[0] > rewards[1], present[1]),
        "rewards/margins": (rewards[0] - rewards[1], present[1]),
        "logps/chosen": (logps[0], present[0]),
        "logps/rejected": (logps[1], present[1]),
    }
    if len(logps) > 2:
        pairs |= {
            "rewards/image_margins": (output.image_margins, present[2]),
            "rewards/image_accuracies": (output.image_margins > 0, present[2]),
            "logps/image_rejected": (logps[2], present[2]),
        }
    sums = [
        torch.stack(((values * weights).sum(), weights.sum())) for values, weights in pairs.values()
    ]
    read = torch.stack((num_tokens_read.to(sums[0]), torch.ones_like(sums[0][0])))
    totals = sum_over_ranks(torch.stack([*sums, read]).detach()).tolist()
    found = {
        name: total / weight
        for name, (total, weight) in zip(pairs, totals[:-1], strict=True)
        if weight
    }
    return {**found, NUM_TOKENS: totals[-1][0]}
