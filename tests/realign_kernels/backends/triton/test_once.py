"""The kernels that run once per call, against the formulas that they compute."""

from __future__ import annotations

import pytest
import torch

from realign_kernels import linear_logprob, rdpo_loss
from realign_kernels.backends import triton as kernels
from realign_kernels.backends.kernel_set import StartedRows
from realign_kernels.backends.triton import once
from realign_kernels.fused.gradients import RowNumbers, Upstream, logit_gradient, token_log_probs
from realign_kernels.head import Head, LogitTransform, Precision
from realign_kernels.ops.pair_loss import pair_loss_backward_op
from realign_kernels.ops.score_tokens import scale_slopes_op
from realign_kernels.testing import dense_logprob, make_head_inputs, seeded

pytestmark = pytest.mark.usefixtures("small_blocks", "few_rows", "poison_empty")

BLOCK = 4
IGNORED = -100
INF, NAN = float("inf"), float("nan")
PLAIN = LogitTransform(1.0, None, 1.0)
CAPPED = LogitTransform(0.7, 5.0, 1.3)
# The dtype summed in, that of the operands, and one rounding of the former.
DTYPES = [
    (torch.float32, torch.float32, 2**-23),
    (torch.float32, torch.float16, 2**-23),
    (torch.float32, torch.bfloat16, 2**-23),
    (torch.float64, torch.float64, 2**-52),
]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def head_of(weight, dtype, operand, bias=None, autocast=None):
    return Head(weight, bias, None, None, 1.0, Precision(autocast, dtype, operand, operand))


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("is_strided", [False, True])
def test_positions_of_scored_rows_are_found(size, ignored, is_known, is_strided):
    generator = seeded(size)
    labels = torch.randint(0, 9, (size,), generator=generator)
    labels[torch.rand(size, generator=generator) < ignored] = IGNORED
    if is_strided:
        labels = torch.stack([labels, labels + 100], dim=1)[:, 0]
    expected = torch.nonzero(labels != IGNORED).squeeze(1)
    num_rows = len(expected) if is_known else None
    found = once.find_rows(labels, IGNORED, 9, num_rows, torch.float64)
    assert torch.equal(found.positions, expected)
    assert torch.equal(found.scores, torch.zeros(size).double())
    assert found.labels_fit.item()
    assert found.number_fits.item() if is_known else found.number_fits is None


@pytest.mark.parametrize("bad", [-1, 9, -101, 2**40])
def test_labels_out_of_range_are_found(bad):
    labels = torch.tensor([0, IGNORED, 8, 3, 5, bad, 1])
    assert not once.find_rows(labels, IGNORED, 9, 6, torch.float32).labels_fit
    labels[5] = IGNORED
    assert once.find_rows(labels, IGNORED, 9, 5, torch.float32).labels_fit


@pytest.mark.parametrize("promised", [0, 1, 2, 4, 7, 19])
def test_a_wrong_num_scored_is_detected_without_reading_out_of_bounds(promised):
    labels = torch.tensor([IGNORED, 1, IGNORED, 2, 3, IGNORED])
    found = once.find_rows(labels, IGNORED, 9, promised, torch.float32)
    assert not found.number_fits
    assert found.positions.tolist() == ([1, 3, 4] + [4] * promised)[:promised]


def layouts(hidden):
    """The same rows in the shapes and strides that callers have them in."""
    size, width = hidden.shape
    yield "flat", hidden
    yield "batch", hidden.view(2, size // 2, width)
    yield "more dimensions", hidden.view(2, 1, size // 2, width)
    yield "columns first", hidden.T.contiguous().T
    padded = hidden.new_full((2, size // 2 + 3, width), NAN)
    padded[:, 1:-2] = hidden.view(2, size // 2, width)
    yield "slice of a batch", padded[:, 1:-2]
    yield (
        "time first",
        hidden.view(2, size // 2, width).transpose(0, 1).contiguous().transpose(0, 1),
    )


@pytest.mark.parametrize(("dtype", "operand", "rounding"), DTYPES)
@pytest.mark.parametrize("transform", [PLAIN, CAPPED])
@pytest.mark.parametrize("width", [1, BLOCK, 2 * BLOCK + 3])
def test_start_rows_equals_its_formulas(dtype, operand, rounding, transform, width):
    hidden, weight = normal(8, width).to(operand), normal(9, width, seed=1).to(operand)
    bias = normal(9, seed=2).to(operand)
    labels = torch.tensor([3, IGNORED, 0, 8, 9, IGNORED, -5, 1])
    positions = torch.nonzero(labels != IGNORED).squeeze(1)
    ids = labels[positions]
    is_token = (ids >= 0) & (ids < 9)
    rows = weight[torch.where(is_token, ids, 0)].double()
    z = (hidden[positions].double() * rows).sum(dim=1)
    z += bias[torch.where(is_token, ids, 0)].double()
    size = (hidden[positions].double() * rows).abs().sum(dim=1) + 4
    x = torch.where(is_token, transform.apply_(z.clone()), NAN)
    for name, states in layouts(hidden):
        started = once.start_rows(
            head_of(weight, dtype, operand, bias), transform, states, labels, positions, 9,
            with_numbers=True,
        )  # fmt: skip
        assert torch.equal(started.hidden[:6], hidden[positions]), name
        assert (started.hidden[6:] == 0).all()
        assert started.ids.tolist() == [*ids.tolist(), -1, -1, -1]
        numbers = started.numbers.double()
        bound = (width + 8) * rounding * size
        assert ((numbers[0, :6] - x).abs() <= bound)[is_token].all(), name
        assert numbers[0, :6][~is_token].isnan().all()
        assert (numbers[2] == 0).all()
        if operand == torch.float16:
            assert (numbers[1] == -INF).all()
        else:
            assert torch.equal(numbers[0].nan_to_num(7), numbers[1].nan_to_num(7))


def test_start_rows_rounds_as_autocast():
    hidden, weight = normal(4, 5).float(), normal(9, 5, seed=1).float()
    labels = torch.tensor([3, 0, 8, 1])
    started = once.start_rows(
        head_of(weight, torch.float32, torch.float16, autocast=torch.float16), PLAIN, hidden,
        labels, torch.arange(4), 4, with_numbers=True,
    )  # fmt: skip
    assert torch.equal(started.hidden, hidden.half())
    exact = (hidden.half().double() * weight.half().double()[labels]).sum(dim=1)
    torch.testing.assert_close(started.numbers[0].double(), exact, rtol=1e-6, atol=1e-6)


def test_start_rows_does_not_copy_when_every_row_is_scored():
    hidden, weight = normal(4, 5), normal(9, 5, seed=1)
    head, labels = head_of(weight, torch.float64, torch.float64), torch.arange(4)
    arguments = labels, torch.arange(4), 4
    flat = once.start_rows(head, PLAIN, hidden, *arguments, with_numbers=True)
    assert flat.hidden.data_ptr() == hidden.data_ptr()
    batch = once.start_rows(head, PLAIN, hidden.view(2, 2, 5), *arguments, with_numbers=True)
    assert batch.hidden.data_ptr() == hidden.data_ptr()
    assert torch.equal(flat.numbers, batch.numbers)


# Logit of the label, shift and sum of the rest: ordinary, certain, nothing but the label, a label
# of probability 0, no finite logit, infinite, broken; a shift far below and above the label.
NUMBERS = [
    (1.0, 1.0, 3.0), (1.0, 1.0, 1e-9), (1.0, 1.0, 0.0), (-INF, 2.0, 4.0), (-INF, -INF, 0.0),
    (INF, INF, 1.0), (NAN, 1.0, 1.0), (1.0, NAN, 1.0), (1.0, 1.0, NAN), (30.0, -INF, 0.0),
    (40.0, -20.0, 1e8), (-50.0, 30.0, 2.0), (3.0, 2.0, 1e-12),
    (40.0, -50.0, 1e38),
]  # fmt: skip


@pytest.mark.parametrize("layout", ["strided", "expanded"])
def test_a_bias_of_any_layout_is_read(layout):
    bias = normal(22)[::2] if layout == "strided" else torch.tensor(2.0).double().expand(11)
    inputs = make_head_inputs(6, 11, 5, lm_head_bias=bias)
    actual = inputs.call(linear_logprob, backend="triton")
    torch.testing.assert_close(actual, dense_logprob(inputs), rtol=1e-12, atol=1e-12)


def test_saved_positions_of_another_layout_are_read():
    """Hooks on saved tensors may return them in another layout."""
    plain, other = (make_head_inputs(6, 11, 5, ignored=0.4).as_leaves() for _ in range(2))
    plain.call(linear_logprob, backend="triton", memory="recompute").sum().backward()

    def unpack(tensor):
        return torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)[..., 0]

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        scores = other.call(linear_logprob, backend="triton", memory="recompute")
    scores.sum().backward()
    for one, two in zip(plain.tensors, other.tensors, strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "operand", "rounding"), DTYPES)
@pytest.mark.parametrize("transform", [PLAIN, CAPPED])
def test_finish_rows_equals_its_formulas(dtype, operand, rounding, transform):
    numbers = torch.tensor(NUMBERS, dtype=dtype).T.contiguous()
    count, width = len(NUMBERS), 2 * BLOCK + 1
    weight = normal(9, width).to(operand)
    ids = torch.arange(count) % 9
    ids[3] = -5
    accumulator = normal(count, width, seed=1).abs().to(dtype)
    exact = RowNumbers(*numbers.double(), None, None)
    expected = token_log_probs(exact)
    gradient = logit_gradient(exact, transform, Upstream(torch.ones(count).double()))
    rows = torch.where((ids >= 0)[:, None], weight[ids.clamp(min=0)].double(), 0.0)
    slopes = gradient.scale[:, None] * accumulator.double()
    slopes += torch.where((ids >= 0)[:, None], gradient.at_label[:, None] * rows, 0.0)
    size = (
        gradient.scale[:, None].abs() * accumulator + gradient.at_label[:, None].abs() * rows.abs()
    )
    padded = torch.cat([numbers, torch.full((3, 2), NAN, dtype=dtype)], dim=1)
    padded_ids = torch.cat([ids, torch.full((2,), -1)])
    positions = torch.arange(count) * 2 + 1
    scores = torch.zeros(2 * count + 1, dtype=dtype)
    started = StartedRows(torch.empty(0), padded_ids, padded)
    once.finish_rows(
        head_of(weight, dtype, operand), transform, started, positions, accumulator, scores
    )
    assert (scores[::2] == 0).all()
    torch.testing.assert_close(
        scores[1::2].double(), expected, rtol=8 * rounding, atol=60 * rounding, equal_nan=True
    )
    finite = size.isfinite()
    assert ((accumulator - slopes).abs() <= 100 * rounding * size)[finite].all()
    assert torch.equal(accumulator.isnan(), slopes.isnan())
    again = torch.zeros_like(scores)
    once.finish_rows(head_of(weight, dtype, operand), transform, started, positions, None, again)
    assert torch.equal(again.nan_to_num(7), scores.nan_to_num(7))


@pytest.mark.parametrize(("dtype", "operand", "rounding"), DTYPES)
@pytest.mark.parametrize("transform", [PLAIN, CAPPED])
@pytest.mark.parametrize("has_positions", [False, True])
def test_grade_rows_equals_its_formulas(dtype, operand, rounding, transform, has_positions):
    numbers = torch.tensor(NUMBERS, dtype=dtype).T.contiguous()
    count = len(NUMBERS)
    upstream = normal(2 * count, 2).to(torch.float32)[:, 0]
    positions = torch.arange(count) * 2 + 1 if has_positions else None
    grad = upstream[positions] if has_positions else upstream[:count]
    exact = RowNumbers(*numbers.double(), None, None)
    expected = logit_gradient(exact, transform, Upstream(grad.double()))
    actual = once.grade_rows(transform, numbers, upstream, positions)
    for one, other in zip(actual, expected[:2], strict=True):
        torch.testing.assert_close(
            one.double(), other, rtol=60 * rounding, atol=rounding, equal_nan=True
        )
    empty = torch.zeros(3, 0, dtype=dtype)
    assert [len(part) for part in once.grade_rows(transform, empty, upstream, None)] == [0, 0]


@pytest.mark.parametrize("width", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 3])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8),
                                                 (torch.float32, 2**-23)])  # fmt: skip
def test_rescale_rows_equals_its_formula(width, dtype, rounding):
    whole = normal(4, width + 6).to(dtype)
    before, part = whole.clone(), whole[:, 2 : width + 2]
    old_shift = torch.tensor([1.0, 2.0, -INF, -3.0])
    new_shift = torch.tensor([1.0, 3.5, 4.0, -3.0])
    once.rescale_rows(part, old_shift, new_shift)
    factor = torch.tensor([1.0, -1.5, -INF, 0.0]).double().exp()
    factor[0] = 1.0
    expected = before[:, 2 : width + 2].double() * factor[:, None]
    # The interpreter cuts bfloat16 off, where a GPU rounds to nearest.
    assert ((part - expected).abs() <= 2 * rounding * expected.abs() + 2**-24).all()
    assert torch.equal(part[[0, 3]], before[[0, 3], 2 : width + 2])
    assert torch.equal(whole[:, :2], before[:, :2])
    assert torch.equal(whole[:, width + 2 :], before[:, width + 2 :])
    once.rescale_rows(part[:0], old_shift[:0], new_shift[:0])


@pytest.mark.parametrize("positions", [[], [0], [1, 2, 4]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_spread_rows_equals_its_formula(positions, dtype):
    rows, where = normal(len(positions), 5).float(), torch.tensor(positions, dtype=torch.int64)
    out = torch.full((6, 5), NAN, dtype=dtype)
    once.spread_rows(None, rows.T.contiguous().T, where, out)
    expected = torch.zeros(6, 5, dtype=dtype)
    expected[where] = rows.to(dtype)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("width", [1, BLOCK, 2 * BLOCK + 3])
@pytest.mark.parametrize("positions", [[], [0], [4], [0, 1, 2, 3, 4], [1, 2, 4]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("is_expanded", [False, True])
def test_scale_slopes_equals_its_formula(width, positions, dtype, is_expanded):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    slopes = normal(len(positions), width).to(wide)
    upstream = torch.tensor(-0.3, dtype=wide).expand(5)
    if not is_expanded:
        upstream = normal(5, 2, seed=1).to(wide)[:, 1]
    where = torch.tensor(positions, dtype=torch.int64)
    arguments = upstream, None, slopes, slopes.new_zeros(0), where, [5, width], dtype, None
    actual = scale_slopes_op(*arguments, "triton")
    assert torch.equal(actual, scale_slopes_op(*arguments, "eager"))


@pytest.mark.parametrize("form", ["padded", "transposed", "packed"])
@pytest.mark.parametrize("parts", ["loss", "logps", "both", "expanded"])
@pytest.mark.parametrize("num_pairs", [0, 1, 3])
def test_the_gradient_of_pairs_is_spread_to_their_tokens(form, parts, num_pairs):
    shape = 3 * num_pairs, 7
    labels = torch.randint(0, 9, shape, generator=seeded(0))
    labels[:, ::3] = IGNORED
    ids = None
    if form == "transposed":
        labels = labels.T.contiguous().T
    elif form == "packed":
        ids = torch.arange(max(1, shape[0])).repeat(7)[: labels.numel()]
        labels = labels.reshape(-1)
        ids = torch.where(labels == IGNORED, 2**40, ids)
    grad_loss = None if parts == "logps" else torch.tensor(0.7)
    grad_logps = None if parts == "loss" else normal(num_pairs, 3, seed=1).T.float()
    if parts == "expanded":
        grad_logps = torch.tensor(0.2).expand(3, num_pairs)
    coefficients = normal(3, num_pairs, seed=2)
    arguments = grad_loss, grad_logps, coefficients, labels, ids, IGNORED, torch.float32
    actual = pair_loss_backward_op(*arguments, "triton")
    assert actual.is_contiguous()
    torch.testing.assert_close(
        actual, pair_loss_backward_op(*arguments, "eager"), rtol=1e-6, atol=1e-7
    )


def score_pairs(**changes):
    options = {
        "labels": torch.arange(18).view(6, 3) % 11,
        "lengths": torch.full((3, 2), 3, device="cpu"),
        "ids": None,
    } | changes
    hidden, labels = normal(6, 3, 5).float(), options["labels"]
    if options["ids"] is not None:
        hidden, labels = hidden.view(-1, 5), labels.view(-1)
    return rdpo_loss(
        hidden, normal(11, 5, seed=1).float(), labels, torch.zeros(3, 2),
        sequence_ids=options["ids"], sequence_lengths=options["lengths"], backend="triton",
    )  # fmt: skip


def test_sorted_and_scanned_tokens_give_the_same_sums(monkeypatch):
    from realign_kernels.backends.triton import pairs

    ids = torch.randperm(18, generator=seeded(0)) % 6
    scanned = score_pairs(ids=ids)
    monkeypatch.setattr(pairs, "SCANNED_TOKENS", 0)
    for one, other in zip(scanned, score_pairs(ids=ids), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_lengths_may_be_a_transposed_view():
    lengths = torch.tensor([[3, 1], [2, 3], [1, 2]], device="cpu")
    is_answer = torch.arange(3) < lengths.view(6, 1).to(torch.get_default_device())
    labels = torch.where(is_answer, torch.arange(18).view(6, 3) % 11, -100)
    expected = score_pairs(labels=labels, lengths=lengths)
    transposed = score_pairs(labels=labels, lengths=lengths.T.contiguous().T)
    assert transposed.num_tokens.tolist() == lengths.tolist()
    assert torch.equal(transposed.loss, expected.loss)


def test_many_labels_are_found_by_the_operators_of_pytorch(monkeypatch):
    inputs = make_head_inputs(7, 11, 5, torch.float32, ignored=0.4)
    expected = inputs.call(linear_logprob, backend="triton")
    monkeypatch.setattr(kernels.ROW_KERNELS, "MOST_POSITIONS", 6)
    assert torch.equal(inputs.call(linear_logprob, backend="triton"), expected)


def test_a_batch_of_ignored_labels_gives_zeros():
    inputs = make_head_inputs(5, 11, 4, torch.float32, ignored=1.1).as_leaves()
    inputs.lm_head_weight.requires_grad_(False)
    logps = inputs.call(linear_logprob, backend="triton")
    assert logps.tolist() == [0.0] * 5
    (grad,) = torch.autograd.grad(logps.sum(), inputs.hidden_states)
    assert (grad == 0).all()
