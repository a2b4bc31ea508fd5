"""The epilogue alone, as the forward drives it, against dense float64 softmax arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import triton
import triton.language as tl

from realign_kernels.backends import triton as kernels
from realign_kernels.backends.kernel_set import RowState, Tile
from realign_kernels.backends.triton.transform import _tanh
from realign_kernels.fused.forward import start_rows
from realign_kernels.head import LogitTransform
from realign_kernels.testing import seeded

pytestmark = pytest.mark.usefixtures("small_blocks", "poison_empty")

BLOCK = 4
INF = float("inf")
PLAIN = LogitTransform(1.0, None, 1.0)
CAPPED = LogitTransform(0.7, 5.0, 1.3)
# Accumulation, operand, bound, and the error that rounding E may cause: the interpreter cuts
# bfloat16 off, where a GPU rounds to nearest.
DTYPES = {
    "fp32": (torch.float32, torch.float32, 60.0, 2e-6),
    "fp64": (torch.float64, torch.float64, 600.0, 1e-13),
    "fp16": (torch.float32, torch.float16, 8.0, 2**-10),
    "bf16": (torch.float32, torch.bfloat16, 60.0, 2**-7),
}
MODES = ("slopes", "stash", "numbers")


@dataclass
class Run:
    """The results of a pass."""

    state: RowState
    accumulator: torch.Tensor
    low_rank: torch.Tensor
    stash: torch.Tensor | None


@dataclass
class Case:
    """Raw logits in float64, and how they are handled."""

    logits: torch.Tensor
    bias: torch.Tensor | None
    labels: torch.Tensor
    weight: torch.Tensor  # (V, D)
    lora_b: torch.Tensor  # (V, r)
    transform: LogitTransform = PLAIN
    dtype: str = "fp32"
    mode: str = "slopes"
    statistics: bool = False
    tracks_top: bool = False
    width: int = 6

    @property
    def x(self):
        bias = 0.0 if self.bias is None else self.bias
        return self.transform.apply_((self.logits + bias).clone())

    def label_x(self):
        is_token = (self.labels >= 0) & (self.labels < self.logits.shape[1])
        index = torch.where(is_token, self.labels, 0)[:, None]
        return torch.where(is_token, self.x.gather(1, index)[:, 0], 0.0)


def make_case(N, V, seed=0, std=3.0, bias=True, hidden_size=5, rank=3, **options):
    generator = seeded(seed)

    def normal(*shape):
        # Multiples of 1/64: sums and differences up to 2 ** 18 are exact in float32.
        return (std * 64 * torch.randn(*shape, generator=generator)).double().round() / 64

    labels = torch.randint(0, V, (N,), generator=generator)
    return Case(
        normal(N, V), normal(V) if bias else None, labels,
        normal(V, hidden_size), normal(V, rank), **options,
    )  # fmt: skip


def run(case):
    """Walk the tiles of a case as the forward does."""
    accumulation, operand, bound, _ = DTYPES[case.dtype]
    num_rows, vocabulary = case.logits.shape
    start = case.label_x().to(accumulation)
    if operand == torch.float16:
        start = torch.full_like(start, -INF)
    keeps_slopes = case.mode == "slopes"
    state = start_rows(
        start, statistics=case.statistics, tracks_top=case.tracks_top,
        releases=case.tracks_top and keeps_slopes,
    )  # fmt: skip
    weight, lora_b = case.weight.to(accumulation), case.lora_b.to(accumulation)
    accumulator = torch.zeros(num_rows, weight.shape[1], dtype=accumulation)
    low_rank = torch.zeros(num_rows, lora_b.shape[1], dtype=accumulation)
    stash, tile_shifts = torch.empty(num_rows, vocabulary, dtype=operand), []
    for first in range(0, vocabulary, case.width):
        columns = slice(first, min(first + case.width, vocabulary))
        logits = case.logits[:, columns].to(accumulation, copy=True)
        exponentials = None
        if case.mode == "stash":
            exponentials = stash[:, columns]
        elif keeps_slopes:
            exponentials = torch.empty(logits.shape, dtype=operand)
        if exponentials is not None and operand == accumulation:
            exponentials.copy_(logits)
            logits = exponentials
        tile_shifts.append(torch.empty(num_rows, dtype=accumulation))
        kernels.epilogue(
            Tile(
                logits=logits,
                exponentials=exponentials,
                first_column=first,
                bias=None if case.bias is None else case.bias[columns].to(accumulation),
                labels=case.labels,
                transform=case.transform,
                bound=bound,
                state=state,
                tile_shift=tile_shifts[-1],
                accumulator=accumulator if keeps_slopes else None,
                low_rank_accumulator=low_rank if keeps_slopes else None,
            )
        )
        if keeps_slopes:
            entries = exponentials.to(accumulation)
            accumulator += entries @ weight[columns]
            low_rank += entries @ lora_b[columns]
            if state.released_ids is not None:
                is_one = state.released_ids >= 0
                released = torch.where(is_one, state.released_values, 0.0)[:, None]
                ids = torch.where(is_one, state.released_ids, 0)
                accumulator += released * weight[ids]
                low_rank += released * lora_b[ids]
    for number, first in enumerate(range(0, vocabulary, case.width)):
        moved = torch.where(
            tile_shifts[number] == state.shift, 0.0, tile_shifts[number] - state.shift
        )
        decay = torch.exp(moved)[:, None]
        stash[:, first : first + case.width] *= decay.to(operand)
    return Run(state, accumulator, low_rank, stash if case.mode == "stash" else None)


def check(case, result):
    """Compare with the dense computation relative to the shift that the pass has ended with."""
    _, operand, bound, rounding = DTYPES[case.dtype]
    state = result.state
    x, shift = case.x, state.shift.double()[:, None]
    finite_shift = torch.where(shift == -INF, 0.0, shift)  # where every exponential is 0
    is_label = torch.zeros_like(x, dtype=torch.bool)
    has_label = (case.labels >= 0) & (case.labels < x.shape[1])
    is_label[has_label, case.labels[has_label]] = True
    others = x.masked_fill(is_label, -INF)
    assert (others.amax(dim=1) <= shift[:, 0] + bound * (1 + 1e-6)).all()
    left_out = is_label.clone()
    if case.tracks_top:
        top, top_ids = others.max(dim=1)
        has_top = top > -INF
        assert torch.equal(state.top_ids, torch.where(has_top, top_ids, -1))
        close(state.top_logits, top, 1e-6)
        left_out[has_top, top_ids[has_top]] = True
    log_e = (x - finite_shift).masked_fill(left_out, -INF)
    e = log_e.exp()
    close(state.rest_sum, e.sum(dim=1), 5e-6)
    if case.statistics:
        close(state.logit_sum, x.sum(dim=1), 1e-5, atol=1e-4)
        label_x = torch.where(has_label, case.label_x(), -INF)
        close(state.label_logits, label_x, 1e-6)
        entropy = torch.where(e == 0, 0.0, -e * log_e)
        close(
            state.rest_entropy_sum, entropy.sum(dim=1), 1e-5, atol=1e-5 * entropy.abs().sum(1).max()
        )
        close(state.rest_square_sum, e.square().sum(dim=1), 1e-5)
    slope = case.transform.slope(x.clone())
    entries = e * slope
    # Exponentials are small beside t = exp(x[y] - shift) plus their sum, which is at least 1.
    tiny = 2.0**-24 if operand == torch.float16 else 1e-20
    if case.mode == "slopes":
        for actual, weight in ((result.accumulator, case.weight), (result.low_rank, case.lora_b)):
            size = entries.abs() @ weight.abs()
            bound = (rounding + 5e-6) * size + tiny * weight.abs().sum(dim=0)
            assert ((actual - entries @ weight).abs() <= bound).all()
    if case.mode == "stash":
        # The top token's entry is there; the driver takes it out.
        stashed = (x - finite_shift).exp().masked_fill(is_label, 0.0) * slope
        assert (
            (result.stash - stashed).abs() <= (2 * rounding + 5e-6) * stashed.abs() + tiny
        ).all()
        assert (result.stash[is_label] == 0).all()


def close(actual, expected, rtol, atol=1e-20):
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=float(atol))


def around(block):
    return (1, block - 1, block, block + 1, 2 * block + 3)


@pytest.mark.parametrize("V", around(BLOCK))
@pytest.mark.parametrize("width", [BLOCK - 1, BLOCK, 2 * BLOCK + 3])
@pytest.mark.parametrize("dtype", ["fp32"])
def test_every_vocabulary_size_crosses_every_block_edge_accurately(V, width, dtype):
    case = make_case(3, V, width=width, dtype=dtype, statistics=True, tracks_top=True)
    check(case, run(case))


@pytest.mark.parametrize("D", around(BLOCK))
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "fp64"])
def test_accumulators_of_any_width_are_rescaled_with_the_shift(D, dtype):
    case = make_case(3, 14, dtype=dtype, hidden_size=D, rank=D)
    case.logits[:, 8] += 300.0 if dtype != "fp64" else 1500.0
    case.logits[1, 13] += 500.0 if dtype != "fp64" else 3000.0
    check(case, run(case))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_plain_pass_equals_the_dense_sums(mode, dtype):
    case = make_case(BLOCK + 1, 11, mode=mode, dtype=dtype)
    check(case, run(case))


@pytest.mark.parametrize(
    ("tracks_top", "statistics"), [(False, False), (True, False), (True, True)]
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "fp64"])
@pytest.mark.parametrize("transform", [PLAIN, CAPPED], ids=["plain", "capped"])
def test_tracked_statistics_equal_dense_sums(tracks_top, statistics, mode, dtype, transform):
    case = make_case(
        3, 17, seed=1, dtype=dtype, mode=mode, transform=transform, statistics=statistics,
        tracks_top=tracks_top, bias=tracks_top,
    )  # fmt: skip
    case.labels[0] = -1  # an empty row
    case.labels[1] = 17  # another rank's
    check(case, run(case))


@pytest.mark.parametrize("gap", [59.0, 100.0, 3000.0])
@pytest.mark.parametrize("mode", ["slopes", "stash"])
@pytest.mark.parametrize("tracks_top", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_shift_moves_to_the_largest_logit(gap, mode, tracks_top, dtype):
    case = make_case(3, 20, dtype=dtype, mode=mode, statistics=tracks_top, tracks_top=tracks_top)
    case.logits[0, 7] += gap
    case.logits[1, 7] += gap
    case.logits[1, 19] += 2 * gap
    case.logits[2] -= gap
    case.labels[:] = torch.tensor([2, 2, 15])
    check(case, run(case))


def test_shift_stays_at_the_label_within_the_bound():
    case = make_case(4, 20)
    assert torch.equal(run(case).state.shift, case.label_x().float())


def test_ties_go_to_the_lowest_token_id():
    case = make_case(3, 19, bias=False, statistics=True, tracks_top=True)
    case.logits[:, [3, 5, 9, 16]] = 20.0
    case.labels[:] = torch.tensor([3, 0, 16])
    result = run(case)
    assert result.state.top_ids.tolist() == [5, 3, 3]
    check(case, result)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", [PLAIN, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("tracks_top", [False, True])
def test_a_replay_equals_the_dense_exponentials(dtype, transform, tracks_top):
    accumulation, operand, _, rounding = DTYPES[dtype]
    case = make_case(5, 13, transform=transform)
    x = case.x
    shift = x.amax(dim=1).to(accumulation) - 1.0
    expected = (x - shift.double()[:, None]).exp() * transform.slope(x.clone())
    expected[torch.arange(5), case.labels] = 0
    top_ids = None
    if tracks_top:
        top_ids = (case.labels + 5) % 13
        expected[torch.arange(5), top_ids] = 0
    frozen = shift.clone()
    state = RowState(frozen, torch.full_like(shift, 7.0), top_ids=top_ids)
    for columns in (slice(0, 6), slice(6, 13)):
        logits = case.logits[:, columns].to(accumulation, copy=True)
        exponentials = logits
        if operand != accumulation:
            exponentials = torch.empty(logits.shape, dtype=operand)
        kernels.epilogue(
            Tile(
                logits, exponentials, columns.start, case.bias[columns].to(accumulation),
                case.labels, transform, INF, state, replays=True,
            )
        )  # fmt: skip
        error = (exponentials.double() - expected[:, columns]).abs()
        tiny = 2.0**-24 if operand == torch.float16 else 0.0
        assert (error <= (rounding + 5e-6) * expected[:, columns].abs() + tiny).all()
    assert torch.equal(frozen, shift)
    assert (state.rest_sum == 7.0).all()


@pytest.mark.parametrize("mode", ["slopes", "stash"])
@pytest.mark.parametrize(("dtype", "transform"), [("fp32", PLAIN), ("fp16", CAPPED)])
def test_logits_that_are_not_finite_stay_in_their_row(mode, dtype, transform):
    case = make_case(
        8, 15, bias=False, dtype=dtype, mode=mode, statistics=True, tracks_top=True,
        transform=transform,
    )  # fmt: skip
    case.labels[1] = 3
    clean = run(case)
    broken = replace(case, logits=case.logits.clone())
    broken.logits[1, 9] = float("nan")
    broken.logits[3, case.labels[3]] = float("nan")
    broken.logits[5, 2] = INF
    broken.logits[6, case.labels[6]] = INF
    result = run(broken)
    is_clean = torch.tensor([True, False, True, False, True, False, False, True])
    for name, value in result.state._asdict().items():
        if value is not None:
            assert torch.equal(value[is_clean], getattr(clean.state, name)[is_clean]), name
    assert torch.equal(result.accumulator[is_clean], clean.accumulator[is_clean])
    assert result.state.rest_sum[1].isnan()


@pytest.mark.parametrize("mode", ["slopes", "stash"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("tracks_top", [False, True])
def test_logits_of_minus_infinity_add_nothing(mode, dtype, tracks_top):
    case = make_case(
        5, 15, bias=False, dtype=dtype, mode=mode, statistics=tracks_top, tracks_top=tracks_top
    )
    case.labels[:] = 9
    case.logits[0, 9] = -INF
    case.logits[1, :7] = -INF
    case.logits[2, 10:] = -INF
    case.logits[3] = -INF
    case.logits[3, 14] = 2.0
    check(case, run(case))


def test_a_row_of_minus_infinity_sums_to_zero():
    case = make_case(1, 9, bias=False, statistics=True, tracks_top=True)
    case.logits[:] = -INF
    state = run(case).state
    assert state.shift.tolist() == state.top_logits.tolist() == [-INF]
    assert state.rest_sum.tolist() == state.rest_square_sum.tolist() == [0.0]
    assert state.top_ids.tolist() == [-1]


def test_an_infinite_logit_of_another_token_gives_nan():
    case = make_case(1, 9, bias=False)
    case.labels[:] = 1
    case.logits[0, 4] = INF
    state = run(case).state
    assert state.shift.tolist() == [INF]
    assert state.rest_sum.isnan().all()


@triton.jit
def _tanh_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, _tanh(tl.load(x_ptr + offs)))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2.5e-7), (torch.float64, 5e-16)])
def test_tanh_is_accurate(dtype, rtol):
    magnitudes = 10 ** torch.linspace(-12, 2, 1024, dtype=torch.float64)
    magnitudes = torch.cat([magnitudes, torch.linspace(0.5, 0.8, 1020, dtype=torch.float64)])
    x = torch.cat([magnitudes, -magnitudes, torch.tensor([0.0, -0.0, INF, -INF] * 2).double()])
    x = x.to(dtype)
    y = torch.empty_like(x)
    _tanh_kernel[(1,)](x, y, BLOCK=4096)
    torch.testing.assert_close(y.double(), torch.tanh(x.double()), rtol=rtol, atol=0.0)


def test_an_epilogue_without_rows_gives_empty_results():
    case = make_case(2, 9)
    case = replace(case, logits=case.logits[:0], labels=case.labels[:0])
    assert run(case).state.rest_sum.shape == (0,)
