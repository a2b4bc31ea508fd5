"""K33: two hundred steps of training end where those of the dense formula do."""

from __future__ import annotations

import functools

import pytest
import torch

from realign_kernels import Objective, rdpo_loss
from realign_kernels.testing import HeadInputs, dense_rdpo_loss, seeded

STEPS, PAIRS, POSITIONS, HIDDEN, VOCABULARY = 200, 4, 8, 24, 60


def train(trains_head, loss_of):
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
        loss = loss_of(hidden_states, head, labels, ref_logps)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), torch.stack(norms)


def dense_loss(hidden_states, head, labels, ref_logps):
    inputs = HeadInputs(hidden_states, head, labels, {})
    return dense_rdpo_loss(inputs, ref_logps, Objective.rdpo(beta=0.3)).loss


@functools.cache
def dense_training(trains_head):
    return train(trains_head, dense_loss)


@pytest.mark.parametrize("memory", ["auto", "stash", "recompute", "tile"])
@pytest.mark.parametrize("trains_head", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_training_follows_dense_training(backend, trains_head, memory):
    """The rounding of dense autograd in float32 is of the same size."""
    options = {"beta": 0.3, "backend": backend, "memory": memory}
    expected_losses, expected_norms = dense_training(trains_head)
    losses, norms = train(trains_head, lambda *batch: rdpo_loss(*batch, **options).loss)
    assert expected_losses[-1] < 0.5 * expected_losses[0]
    difference = losses - expected_losses
    assert difference.abs().max() <= 1e-5
    assert difference.mean().abs() <= 1e-6
    torch.testing.assert_close(norms, expected_norms, rtol=1e-4, atol=1e-6)
