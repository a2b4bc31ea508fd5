"""Three more preference losses on the fused head: KTO, SimPO and ORPO.

    python examples/losses.py

Each takes hidden states, the weight of the head and labels that are already shifted, with -100
where a token is not scored. None of them stores the logits. The values equal those of TRL's
trainers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from realign_kernels import Objective, Term, linear_logprob, rdpo_loss


def kto_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    ref_logps: Tensor,
    is_desirable: Tensor,
    kl: Tensor,
    beta: float = 0.1,
    weights: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Return KTO's loss of B single answers, (B, T, D); :func:`estimate_kl` gives ``kl``.

    ``weights`` are the weights of desirable and of undesirable answers.
    """
    logps = linear_logprob(hidden_states, lm_head_weight, labels).sum(dim=1)
    sign = torch.where(is_desirable, 1.0, -1.0)
    values = torch.sigmoid(beta * sign * (logps - ref_logps - kl))
    return (torch.where(is_desirable, *weights) * (1 - values)).mean()


@torch.no_grad()
def estimate_kl(
    hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor, ref_logps: Tensor
) -> Tensor:
    """Return KTO's estimate of the KL divergence, (), from mismatched answers and prompts."""
    logps = linear_logprob(hidden_states, lm_head_weight, labels).sum(dim=1)
    return (logps - ref_logps).mean().clamp(min=0)


def simpo_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> Tensor:
    """Return SimPO's loss of P chosen, then P rejected answers, (2P, T, D), without a reference."""
    term = Term((1, -1), beta=beta, offset=gamma, normalize="length")
    return rdpo_loss(hidden_states, lm_head_weight, labels, None, objective=Objective((term,))).loss


def orpo_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    is_answer: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """Return ORPO's loss of P chosen, then P rejected answers, (2P, T, D).

    The labels of a chosen row are its whole text, whose likelihood is one part of the loss.
    ``is_answer`` marks the labels of the answers, whose odds are the other part.
    """
    token_logps = linear_logprob(hidden_states, lm_head_weight, labels)
    means = (token_logps * is_answer).sum(dim=1) / is_answer.sum(dim=1)
    log_odds = means - torch.log(-torch.expm1(means))
    chosen, rejected = log_odds.chunk(2)
    num_pairs = len(chosen)
    num_tokens = (labels[:num_pairs] != -100).sum()
    nll = -token_logps[:num_pairs].sum() / num_tokens
    return nll - beta * F.logsigmoid(chosen - rejected).mean()


def main() -> None:
    """Print each loss of eight random answers, and the norm of its gradient."""
    torch.manual_seed(0)
    hidden_states = torch.randn(8, 12, 32, requires_grad=True)
    lm_head_weight = torch.randn(100, 32) / 32**0.5
    labels = torch.randint(0, 100, (8, 12))
    labels[:, :4] = -100  # the prompts
    ref_logps = torch.full((8,), -8 * 5.0)
    # in training: the same answers, each after another row's prompt, from both models
    kl = estimate_kl(torch.randn(8, 12, 32), lm_head_weight, labels, ref_logps)
    is_desirable = torch.arange(8) % 2 == 0
    losses = {
        "KTO": kto_loss(hidden_states, lm_head_weight, labels, ref_logps, is_desirable, kl),
        "SimPO": simpo_loss(hidden_states, lm_head_weight, labels),
        "ORPO": orpo_loss(hidden_states, lm_head_weight, labels, labels != -100),
    }
    for name, loss in losses.items():
        (gradient,) = torch.autograd.grad(loss, hidden_states)
        print(f"{name}: loss {loss.item():.4f}, gradient {gradient.norm().item():.4f}")


if __name__ == "__main__":
    main()
