"""The reduction of a preference batch, against ``preference_loss`` and autograd in float64."""

from __future__ import annotations

import pytest
import torch

from realign_kernels import Objective, Term, preference_loss
from realign_kernels.backends import triton as kernels
from realign_kernels.backends.kernel_set import PairBatch, PairResults
from realign_kernels.testing import seeded

pytestmark = pytest.mark.usefixtures("small_blocks", "poison_empty")

BLOCK = 4
IGNORED = -100
OBJECTIVES = {
    "dpo": Objective.dpo(),
    "rdpo": Objective.rdpo(0.2, 0.3, 0.7),
    "mdpo": Objective.mdpo(anchor_offset=0.4, anchor_weight=0.5),
    "symmetric": Objective.symmetric(0.3, 0.1, 2.0),
    "smoothed": Objective((Term((1, -1), label_smoothing=0.1), Term((1, 0, -1), offset=-0.3))),
    "hinge": Objective((Term((1, -1), beta=0.5, link="hinge"), Term((0.5, 0, 0, -2), weight=3.0))),
    "ipo": Objective((Term((1, -1), link="ipo"), Term((1, 0, -1), weight=0.2, link="ipo"))),
    "by length": Objective(
        (
            Term((1, -1), beta=2.0, offset=1.6, normalize="length"),
            Term((1, 0, -1), label_smoothing=0.2, normalize="length"),
            Term((1, -1), link="hinge", beta=2.0, normalize="length"),
        )
    ),
    "nll": Objective(Objective.rdpo().terms, nll_weight=0.6),
}


def new_results(num_cells, num_pairs):
    def empty(*shape):
        return torch.full(shape, float("nan"), dtype=torch.float64)

    cells = (num_cells, num_pairs)
    counts = torch.full(cells, -7)
    return PairResults(
        empty(1), empty(*cells), counts, empty(*cells), empty(num_pairs), empty(num_pairs),
        empty(*cells),
    )  # fmt: skip


def make_batch(
    objective, num_pairs, num_positions=7, num_cells=None, dtype=torch.float32, has_reference=True,
    absent=0.0, is_packed=False, seed=0,
):  # fmt: skip
    generator = seeded(seed)
    num_cells = num_cells or objective.num_cells
    shape = (num_cells * num_pairs, num_positions)
    token_logps = -3 * torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, 9, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.3] = IGNORED
    is_absent = torch.rand(shape[0], generator=generator) < absent
    is_absent[:num_pairs] = False
    labels[:num_pairs, 0] = 1
    labels[is_absent] = IGNORED
    token_logps[labels == IGNORED] = float("nan")  # never read
    sequence_ids = None
    if is_packed:
        order = torch.randperm(labels.numel(), generator=generator)
        sequence_ids = torch.arange(shape[0]).repeat_interleave(num_positions)[order]
        token_logps, labels = token_logps.flatten()[order], labels.flatten()[order]
        sequence_ids[labels == IGNORED] = 12345  # nor are these
    ref_logps = None
    if has_reference:
        ref_logps = -8 * torch.rand(num_cells, num_pairs, generator=generator, dtype=torch.float64)
    return PairBatch(
        token_logps, labels, IGNORED, sequence_ids, num_cells, num_pairs, ref_logps, objective
    )


def check(batch, *, rtol=1e-12):
    results = new_results(batch.num_cells, batch.num_pairs)
    kernels.pair_loss(batch, results)
    shape = batch.num_cells, batch.num_pairs
    is_scored = batch.labels != batch.ignore_index
    sums, counts = torch.zeros(shape).double().flatten(), torch.zeros(shape).long().flatten()
    ids = batch.sequence_ids
    if ids is None:
        ids = torch.arange(len(batch.labels))[:, None].expand(batch.labels.shape)
    for s in range(len(sums)):
        chosen = is_scored & (ids == s)
        counts[s] = chosen.sum()
        sums[s] = batch.token_logps[chosen].double().sum()
    assert torch.equal(results.counts, counts.reshape(shape))
    torch.testing.assert_close(
        results.logps, sums.reshape(shape).to(batch.token_logps.dtype).double(), rtol=1e-7, atol=0.0
    )
    logps = results.logps.clone().requires_grad_()
    # That loss is in the dtype of its logps: float64 here, from the sums as they were rounded.
    expected = preference_loss(logps, batch.ref_logps, batch.objective, num_tokens=results.counts)
    (gradient,) = torch.autograd.grad(expected.loss, logps, allow_unused=True)

    def close(actual, wanted):
        torch.testing.assert_close(actual, wanted.detach(), rtol=rtol, atol=1e-14)

    close(results.loss[0], expected.loss)
    close(results.coefficients, gradient)
    for name in ("rewards", "text_margins", "image_margins"):
        close(getattr(results, name), getattr(expected, name))
    return results


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("absent", [0.0, 0.5])
def test_every_objective_equals_preference_loss(name, is_packed, absent):
    check(make_batch(OBJECTIVES[name], 5, is_packed=is_packed, absent=absent))


@pytest.mark.parametrize("num_positions", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_answers_of_every_length_equal_preference_loss(num_positions, is_packed, dtype):
    check(make_batch(OBJECTIVES["nll"], 3, num_positions, is_packed=is_packed, dtype=dtype))


@pytest.mark.parametrize("num_pairs", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
@pytest.mark.parametrize("num_cells", [2, 3, 4])
def test_every_number_of_pairs_and_cells_equals_preference_loss(num_pairs, num_cells):
    check(make_batch(OBJECTIVES["dpo"], num_pairs, num_cells=num_cells, absent=0.3))


@pytest.mark.parametrize("name", ["rdpo", "ipo"])
def test_a_missing_reference_equals_preference_loss(name):
    check(make_batch(OBJECTIVES[name], 4, has_reference=False))


def test_sums_are_rounded_to_the_dtype_of_the_tokens():
    results = check(make_batch(OBJECTIVES["rdpo"], 4, 11))
    assert torch.equal(results.logps, results.logps.float().double())


def test_sums_of_padded_and_packed_batches_are_equal():
    padded = make_batch(OBJECTIVES["rdpo"], 4, dtype=torch.float32)
    packed = make_batch(OBJECTIVES["rdpo"], 4, dtype=torch.float32, is_packed=True)
    assert torch.equal(check(padded).logps, check(packed).logps)


@pytest.mark.parametrize("name", ["rdpo", "smoothed", "hinge"])
@pytest.mark.parametrize("size", [1e-3, 50.0, 1e3, 1e6])
def test_contrasts_of_every_size_equal_preference_loss(name, size):
    batch = make_batch(OBJECTIVES[name], 6)
    signs = torch.tensor([1.0, -1.0]).repeat(3)
    reference = batch.ref_logps.clone()
    reference[1] = reference[0] + size * signs
    check(batch._replace(ref_logps=reference))


@pytest.mark.parametrize("name", ["rdpo", "hinge", "ipo"])
def test_a_nan_pair_makes_the_loss_nan_and_no_other_pair(name):
    batch = make_batch(OBJECTIVES[name], 3)
    clean = check(batch)
    batch.token_logps[1, 0] = float("nan")
    results = new_results(batch.num_cells, batch.num_pairs)
    kernels.pair_loss(batch, results)
    assert results.loss.isnan().all()
    others = torch.tensor([0, 2])
    assert torch.equal(results.coefficients[:, others], clean.coefficients[:, others])


def test_minus_infinity_equals_preference_loss():
    batch = make_batch(OBJECTIVES["rdpo"], 2)
    batch.token_logps[2, :] = -float("inf")  # text_rejected: as far below as can be
    batch.labels[2, :] = 1
    check(batch)


def test_repeated_calls_are_bitwise_equal():
    batch = make_batch(OBJECTIVES["symmetric"], 9, 11, is_packed=True)
    first, second = (check(batch) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_batch_without_pairs_gives_zero_loss(is_packed):
    batch = make_batch(OBJECTIVES["rdpo"], 0, is_packed=is_packed)
    results = new_results(3, 0)
    kernels.pair_loss(batch, results)
    assert results.loss.tolist() == [0.0]
