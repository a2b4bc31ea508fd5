"""K33: two hundred steps of training end where the eager backend's do."""

from __future__ import annotations

import pytest
import torch

from realign_kernels import rdpo_loss
from realign_kernels.testing import seeded

STEPS, PAIRS, POSITIONS, HIDDEN, VOCABULARY = 200, 4, 8, 24, 60


def train(trains_head, **options):
    """Return the losses and gradient norms of a small model under plain gradient descent."""
    generator = seeded(0)
    tokens = torch.randint(VOCABULARY, (3 * PAIRS, POSITIONS + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
    labels[:, 0] = tokens[:, 1]
    ref_logps = -10 - torch.rand(3, PAIRS, generator=generator)
    embedding = torch.randn(VOCABULARY, HIDDEN, generator=generator).requires_grad_()
    body = (torch.randn(HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5).requires_grad_()
    head = torch.randn(VOCABULARY, HIDDEN, generator=generator) * 0.3
    head.requires_grad_(trains_head)
    parameters = [embedding, body, *([head] if trains_head else [])]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    losses, norms = [], []
    for _ in range(STEPS):
        hidden_states = torch.tanh(embedding[tokens[:, :-1]] @ body)
        loss = rdpo_loss(hidden_states, head, labels, ref_logps, beta=0.3, **options).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), torch.stack(norms)


@pytest.mark.parametrize("memory", ["auto", "stash", "recompute", "tile"])
@pytest.mark.parametrize("trains_head", [False, True], ids=["frozen", "trainable"])
def test_fused_training_follows_eager_training(trains_head, memory):
    expected_losses, expected_norms = train(trains_head, backend="eager")
    losses, norms = train(trains_head, backend="cpu", memory=memory)
    assert expected_losses[-1] < 0.5 * expected_losses[0]
    difference = losses - expected_losses
    assert difference.abs().max() <= 1e-5
    assert difference.mean().abs() <= 1e-6
    torch.testing.assert_close(norms, expected_norms, rtol=1e-4, atol=1e-6)
