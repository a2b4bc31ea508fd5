"""Cells are stacked in the order that the losses read, or refused."""

from __future__ import annotations

import itertools

import pytest
import torch

from realign_kernels import CELL_NAMES, linear_logprob, rdpo_loss, shift_labels, stack_cells

P, T, D, V = 3, 5, 8, 11


def cells(*shape: int, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(P, *shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_stacked_sums_and_sequences_have_the_same_cell_order(count):
    sums = cells(count=count)
    assert torch.equal(stack_cells(*sums), torch.stack(sums))
    for shape in [(T,), (T, D), (3, 4, 4)]:
        batch = cells(*shape, count=count)
        stacked = stack_cells(*batch)
        assert stacked.shape == (count * P, *shape)
        for cell, pair in itertools.product(range(count), range(P)):
            assert torch.equal(stacked[cell * P + pair], batch[cell][pair])


def test_cells_by_name_match_the_order_of_the_objectives():
    named = dict(zip(CELL_NAMES, cells(count=4), strict=True))
    assert torch.equal(stack_cells(**dict(reversed(named.items()))), torch.stack([*named.values()]))


def test_the_loss_assigns_each_cell_to_its_name():
    """A policy that moves one cell alone moves that cell's reward, of every pair."""
    weight = torch.randn(V, D, generator=torch.Generator().manual_seed(1))
    labels = shift_labels(torch.randint(V, (3 * P, T), generator=torch.Generator().manual_seed(2)))
    states = cells(T, D)

    def sums(cell: int) -> torch.Tensor:
        rows = labels[cell * P : (cell + 1) * P]
        return linear_logprob(states[cell], weight, rows).sum(dim=1)

    ref_logps = stack_cells(sums(0), sums(1), sums(2))
    output = rdpo_loss(stack_cells(*states), weight, labels, ref_logps)
    torch.testing.assert_close(output.rewards, torch.zeros(3, P), rtol=0, atol=1e-6)
    for cell, moved in itertools.product(range(3), range(P)):
        changed = [part.clone() for part in states]
        changed[cell][moved] *= 2
        rewards = rdpo_loss(stack_cells(*changed), weight, labels, ref_logps).rewards
        assert (rewards.abs() > 1e-4).nonzero().tolist() == [[cell, moved]]


def test_shorter_cells_are_padded_on_the_right():
    long, short = torch.arange(6).view(2, 3), torch.arange(4).view(2, 2)
    stacked = stack_cells(long, short, short, padding_value=-100)
    assert stacked.tolist() == [
        [0, 1, 2], [3, 4, 5], [0, 1, -100], [2, 3, -100], [0, 1, -100], [2, 3, -100]
    ]  # fmt: skip
    assert torch.equal(
        stack_cells(short, long, padding_value=0)[:2], torch.tensor([[0, 1, 0], [2, 3, 0]])
    )
    states = stack_cells(torch.ones(2, 2, D), torch.ones(2, 4, D), padding_value=0)
    assert states.sum(dim=(1, 2)).tolist() == [2 * D, 2 * D, 4 * D, 4 * D]
    sums = cells()
    assert torch.equal(stack_cells(*sums, padding_value=0), torch.stack(sums))


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.bool, False), (torch.bool, 1), (torch.uint8, 255), (torch.int64, 2**53 + 1),
     (torch.int32, 5.0), (torch.float16, -65504), (torch.bfloat16, 0.5)],
)  # fmt: skip
def test_the_padding_is_the_given_value(dtype, value):
    long, short = torch.ones(2, 3).to(dtype), torch.zeros(2, 2).to(dtype)
    assert stack_cells(long, short, padding_value=value)[2:, 2].tolist() == [value, value]


def test_gradients_flow_through_stack_cells():
    leaves = [cell.requires_grad_() for cell in cells(T, D)]
    (stack_cells(*leaves) * torch.arange(3 * P)[:, None, None]).sum().backward()
    assert [leaf.grad[:, 0, 0].tolist() for leaf in leaves] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: stack_cells(c[0], c[1], None, c[2]), ValueError, "image_rejected must be given"),
        (lambda c: stack_cells(c[0], None), TypeError, "text_rejected must be a torch.Tensor"),
        (lambda c: stack_cells([1.0], c[1]), TypeError, "chosen must be a torch.Tensor"),
        (
            lambda c: stack_cells(c[0].sum(), c[1]),
            ValueError,
            "chosen must hold one entry per pair, got a single number",
        ),
        (
            lambda c: stack_cells(c[0], c[1][:2], c[2]),
            ValueError,
            r"text_rejected must hold one entry for each of the 3 pairs in 1 dim.* got \(2,\)",
        ),
        (
            lambda c: stack_cells(c[0], c[1][:, None]),
            ValueError,
            r"text_rejected must hold one entry .* got \(3, 1\)",
        ),
        (
            lambda c: stack_cells(c[0], c[1], c[2].double()),
            TypeError,
            "image_rejected must be torch.float32 to match chosen, got torch.float64",
        ),
        (
            lambda c: stack_cells(c[0], c[1].to("meta")),
            ValueError,
            "text_rejected must be on cpu to match chosen, got meta",
        ),
        (
            lambda c: stack_cells(c[0][:, None], c[1][:, None].expand(P, 2)),
            ValueError,
            r"text_rejected must have shape \(3, 1\) to match chosen, got \(3, 2\). Pass padding_",
        ),
        (
            lambda c: stack_cells(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 9)),
            ValueError,
            r"text_rejected must have shape .* got \(2, 3, 8, 9\). Resize it",
        ),
        (
            lambda c: stack_cells(torch.zeros(2, 3, 8), torch.zeros(2, 4, 9), padding_value=0),
            ValueError,
            r"text_rejected must have shape \(2, 4, 8\) .* got \(2, 4, 9\). Resize it",
        ),
        (
            lambda c: stack_cells(*c, padding_value="pad"),
            TypeError,
            "padding_value must be a number",
        ),
        (
            lambda c: stack_cells(*(part.long() for part in c), padding_value=0.5),
            ValueError,
            "padding_value must be a value of torch.int64 to match chosen, got 0.5",
        ),
        (
            lambda c: stack_cells(*(part.byte() for part in c), padding_value=-100),
            ValueError,
            "padding_value must be a value of torch.uint8 to match chosen, got -100",
        ),
        (
            lambda c: stack_cells(*(part.half() for part in c), padding_value=1e5),
            ValueError,
            "padding_value must be a value of torch.float16 to match chosen, got 100000.0",
        ),
        (
            lambda c: stack_cells(*(part > 0 for part in c), padding_value=2),
            ValueError,
            "padding_value must be a value of torch.bool to match chosen, got 2",
        ),
    ],
)
def test_incompatible_cells_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(cells())
