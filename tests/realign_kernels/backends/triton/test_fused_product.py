"""The product with the epilogue inside, against float64 and as the forward drives it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from realign_kernels import linear_logprob, rdpo_loss
from realign_kernels.backends import triton as kernels
from realign_kernels.backends.kernel_set import RowState, Tile
from realign_kernels.backends.triton import launches
from realign_kernels.backends.triton.fused_product import exact_product, fused_product
from realign_kernels.head import LogitTransform
from realign_kernels.testing import make_head_inputs, seeded
from tests.realign_kernels.backends.triton.test_epilogue import (
    CAPPED,
    INF,
    MODES,
    PLAIN,
    check,
    make_case,
    run,
)

pytestmark = pytest.mark.usefixtures("small_blocks", "poison_empty", "fused_product")

OPERANDS = {"fp32": torch.float32, "fp16": torch.float16}


@pytest.fixture
def through_the_product(monkeypatch):
    """Let the epilogue's driver take logits through a product with the identity, which is exact."""

    def epilogue(tile):
        exponentials = tile.exponentials
        dtype = torch.float32 if exponentials is None else exponentials.dtype
        hidden = tile.logits.to(dtype, copy=True)
        if exponentials is not None:
            exponentials.fill_(float("nan"))  # a product reads nothing of it
        fused_product(tile, hidden, torch.eye(hidden.shape[1], dtype=dtype))

    monkeypatch.setattr(kernels, "epilogue", epilogue)


def rounded_case(*args, dtype, **options):
    case = make_case(*args, dtype=dtype, **options)
    case.logits = case.logits.to(OPERANDS[dtype]).double()
    return case


def operands(N, V, D, dtype, seed=0):
    generator = seeded(seed)
    return (torch.randn(n, D, generator=generator).to(dtype) for n in (N, V))


@pytest.mark.parametrize("dtype", OPERANDS.values(), ids=OPERANDS)
@pytest.mark.parametrize(
    ("N", "V", "D"),
    [(1, 1, 1), (16, 16, 32), (17, 33, 31), (5, 40, 70), (33, 15, 65), (40, 50, 16)],
)
def test_products_of_any_shape_equal_float64(N, V, D, dtype):
    hidden, weight = operands(N, V, D, dtype)
    out = torch.empty(N, V)
    exact_product(out, hidden, weight)
    size = hidden.double().abs() @ weight.double().abs().T
    error = (out - hidden.double() @ weight.double().T).abs()
    assert (error <= 2.0**-22 * size).all()


def test_products_of_strided_weights_fill_a_slice_of_a_matrix():
    hidden, weight = operands(9, 20, 24, torch.float32)
    whole = torch.full((9, 50), 7.0)
    exact_product(whole[:, 3:23], hidden, weight.T.contiguous().T)
    torch.testing.assert_close(whole[:, 3:23], hidden @ weight.T, rtol=1e-5, atol=1e-5)
    assert (whole[:, :3] == 7).all()
    assert (whole[:, 23:] == 7).all()


@pytest.mark.parametrize("rank", [1, 16, 33])
@pytest.mark.parametrize("dtype", OPERANDS.values(), ids=OPERANDS)
def test_a_second_product_is_added(rank, dtype):
    hidden, weight = operands(20, 35, 40, dtype)
    low_rank, factor = operands(20, 35, rank, dtype, seed=1)
    out = torch.empty(20, 35)
    exact_product(out, hidden, weight, (low_rank, factor))
    expected = hidden.double() @ weight.double().T + low_rank.double() @ factor.double().T
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_sums_are_the_same_every_time_and_in_any_batch():
    hidden, weight = operands(40, 50, 70, torch.float32)
    whole, again, one = torch.empty(40, 50), torch.empty(40, 50), torch.empty(1, 50)
    for out, rows in ((whole, hidden), (again, hidden), (one, hidden[30:31])):
        exact_product(out, rows, weight)
    assert torch.equal(whole, again)
    assert torch.equal(whole[30:31], one)


@pytest.mark.usefixtures("through_the_product")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", OPERANDS)
@pytest.mark.parametrize("transform", [PLAIN, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("width", [15, 16, 40])
def test_a_pass_equals_the_sums_of_the_dense_formula(mode, dtype, transform, width):
    case = rounded_case(18, 67, dtype=dtype, mode=mode, transform=transform, width=width)
    case.labels[0] = -1  # an empty row
    case.labels[1] = 67  # another rank's
    check(case, run(case))


@pytest.mark.usefixtures("through_the_product")
@pytest.mark.parametrize("gap", [59.0, 100.0, 3000.0])
@pytest.mark.parametrize("mode", ["slopes", "stash"])
@pytest.mark.parametrize("dtype", OPERANDS)
def test_the_shift_moves_to_the_largest_logit(gap, mode, dtype):
    case = rounded_case(3, 80, dtype=dtype, mode=mode, width=40)
    case.logits[0, 7] += gap
    case.logits[1, 7] += gap
    case.logits[1, 30] += 2 * gap  # another block of the same tile
    case.logits[1, 70] += 3 * gap
    case.logits[2] -= gap
    case.labels[:] = torch.tensor([2, 2, 15])
    case.logits = case.logits.to(OPERANDS[dtype]).double()
    check(case, run(case))


@pytest.mark.usefixtures("through_the_product")
def test_shift_stays_at_the_label_within_the_bound():
    case = rounded_case(4, 20, dtype="fp32")
    assert torch.equal(run(case).state.shift, case.label_x().float())


@pytest.mark.usefixtures("through_the_product")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", OPERANDS)
def test_columns_of_minus_infinity_add_nothing(mode, dtype):
    case = rounded_case(3, 40, dtype=dtype, mode=mode, width=20, bias=True)
    case.bias[:18] = -INF
    case.bias[25:] = -INF
    check(case, run(case))


def test_blocks_of_bfloat16_have_one_size(monkeypatch):
    """The interpreter computes in float32, which would have more blocks."""
    monkeypatch.setattr(
        launches, "product_launch",
        lambda dtype, _, **__: launches.ProductLaunch(16, 16 * (4 // dtype.itemsize), 16, 1, 1),
    )  # fmt: skip
    hidden, weight = operands(5, 70, 8, torch.bfloat16)
    logits = hidden.double() @ weight.double().T
    labels = torch.arange(5)
    shift = logits[labels, labels].float()
    state = RowState(shift=shift.clone(), rest_sum=torch.zeros(5))
    tile = Tile(
        logits=torch.empty(5, 70), exponentials=None, first_column=0, bias=None, labels=labels,
        transform=PLAIN, bound=60.0, state=state,
    )  # fmt: skip
    fused_product(tile, hidden, weight)
    exponentials = (logits - shift.double()[:, None]).exp()
    exponentials[labels, labels] = 0
    torch.testing.assert_close(state.rest_sum.double(), exponentials.sum(1), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("through_the_product")
def test_a_label_out_of_range_affects_only_its_row():
    case = rounded_case(20, 40, dtype="fp32", width=20)
    clean = run(case).state
    hidden, weight = operands(20, 40, 8, torch.float32)
    shift = clean.shift.clone()
    shift[4] = float("nan")
    state = RowState(shift, torch.zeros(20))
    tile = Tile(
        torch.empty(20, 40), torch.empty(20, 40), 0, None, case.labels, PLAIN, 60.0, state
    )  # fmt: skip
    fused_product(tile, hidden, weight)
    is_undefined = torch.arange(20) == 4
    assert torch.equal(state.rest_sum.isnan(), is_undefined)
    assert torch.equal(state.shift.isnan(), is_undefined)
    assert torch.equal(tile.exponentials.isnan().any(dim=1), is_undefined)


def test_logits_that_are_not_finite_stay_in_their_row():
    hidden, weight = operands(20, 40, 8, torch.float32)
    labels = torch.arange(20)
    clean, broken = (RowState(torch.zeros(20), torch.zeros(20)) for _ in range(2))
    entries = torch.empty(20, 40)
    fused_product(Tile(entries, entries, 0, None, labels, PLAIN, 60.0, clean), hidden, weight)
    hidden[4], hidden[7] = float("nan"), INF
    again = torch.empty(20, 40)
    fused_product(Tile(again, again, 0, None, labels, PLAIN, 60.0, broken), hidden, weight)
    is_clean = torch.ones(20, dtype=torch.bool)
    is_clean[[4, 7]] = False
    assert torch.equal(broken.rest_sum.isfinite(), is_clean)
    assert torch.equal(broken.rest_sum[is_clean], clean.rest_sum[is_clean])
    assert torch.equal(again[is_clean], entries[is_clean])
    assert broken.shift[4] == 0.0  # NaN is no reason to move it


def test_skipped_entries_are_0_where_slopes_are_infinite():
    """A transform may be so steep that 0 times its slope is NaN."""
    hidden, weight = operands(3, 20, 8, torch.float32)
    labels, steep = torch.arange(3), LogitTransform(3e38, None, 1e-3)
    state = RowState(torch.full((3,), INF), torch.zeros(3))
    entries = torch.empty(3, 20)
    fused_product(Tile(entries, entries, 0, None, labels, steep, 60.0, state), hidden, weight)
    assert (entries[torch.arange(3), labels] == 0).all()


@pytest.mark.parametrize("tracks_top", [False, True])
@pytest.mark.parametrize("dtype", OPERANDS)
@pytest.mark.parametrize("transform", [PLAIN, CAPPED], ids=["plain", "capped"])
def test_a_replay_equals_the_dense_exponentials(dtype, tracks_top, transform: LogitTransform):
    operand = OPERANDS[dtype]
    hidden, weight = operands(18, 40, 24, operand)
    labels = torch.randint(40, (18,), generator=seeded(1))
    x = transform.apply_(hidden.double() @ weight.double().T)
    shift = (x.amax(dim=1) - 1.0).float()
    expected = (x - shift.double()[:, None]).exp() * transform.slope(x.clone())
    expected[torch.arange(18), labels] = 0
    top_ids = (labels + 5) % 40 if tracks_top else None
    if tracks_top:
        expected[torch.arange(18), top_ids] = 0
    state = RowState(shift.clone(), torch.full_like(shift, 7.0), top_ids=top_ids)
    for columns in (slice(0, 23), slice(23, 40)):
        entries = torch.empty(18, columns.stop - columns.start, dtype=operand)
        tile = Tile(
            torch.empty(entries.shape), entries, columns.start, None, labels, transform, INF, state,
            replays=True,
        )  # fmt: skip
        fused_product(tile, hidden, weight[columns])
        error = (entries.double() - expected[:, columns]).abs()
        rounding, tiny = (2.0**-10, 2.0**-24) if operand == torch.float16 else (0.0, 0.0)
        assert (error <= (rounding + 2e-5) * expected[:, columns].abs() + tiny).all()
    assert torch.equal(state.shift, shift)
    assert (state.rest_sum == 7.0).all()


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("rejected_scoring", ["label", "top_non_label"])
def test_exact_sums_are_used_where_tensor_cores_multiply(monkeypatch, dtype, rejected_scoring):
    """Logits that are summed relative to the label alone have the epilogue inside."""
    monkeypatch.setattr(launches, "fuses_product", lambda *_: False)
    calls = []
    for name in ("fused_product", "exact_product"):
        kernel = getattr(kernels.PRODUCT_KERNELS, name)

        def noted(*args, name=name, kernel=kernel):
            calls.append(name)
            kernel(*args)

        monkeypatch.setattr(kernels.PRODUCT_KERNELS, name, noted)
    inputs = make_head_inputs(6, 18, 20, dtype)
    results = [
        rdpo_loss(
            inputs.hidden_states, inputs.lm_head_weight, inputs.labels, torch.zeros(3, 2),
            sequence_ids=torch.arange(6), rejected_scoring=rejected_scoring, backend="triton",
            accumulate=accumulate,
        ).logps
        for accumulate in ("auto", "exact")
    ]  # fmt: skip
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    if dtype == torch.float32:
        assert not calls  # float32 is not cut off
    else:
        tracks_top = rejected_scoring == "top_non_label"
        assert set(calls) == {"exact_product" if tracks_top else "fused_product"}


def test_exact_sums_equal_the_default_sums_on_a_cpu():
    inputs = make_head_inputs(6, 40, 70, torch.float32)
    for backend in ("cpu", "eager"):
        exact = inputs.call(linear_logprob, backend=backend, accumulate="exact")
        assert torch.equal(exact, inputs.call(linear_logprob, backend=backend))


def test_unknown_accumulate_options_are_refused():
    inputs = make_head_inputs(6, 40, 70, torch.float32)
    with pytest.raises(ValueError, match=r"accumulate must be one of \['auto', 'exact'\], got"):
        inputs.call(linear_logprob, accumulate="fast")


@pytest.mark.full
def test_other_triton_tests_pass_with_the_fused_product():
    folder = Path(__file__).parent
    files = [folder / f"test_{name}.py" for name in ("end_to_end", "drawn_calls", "memory_modes")]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-m", "not full and not slow"]
    environment = {**os.environ, "REALIGN_TEST_PRODUCT": "fused", "REALIGN_EXAMPLES": "20"}
    subprocess.run([*command, *map(str, files)], env=environment, check=True, timeout=1200)


def test_a_fused_product_without_rows_is_accepted():
    state = RowState(torch.empty(0), torch.empty(0))
    labels = torch.empty(0, dtype=torch.int64)
    tile = Tile(torch.empty(0, 9), torch.empty(0, 9), 0, None, labels, PLAIN, 60.0, state)
    fused_product(tile, torch.empty(0, 4), torch.empty(9, 4))
