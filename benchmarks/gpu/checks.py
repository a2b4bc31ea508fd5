"""Checks of the kernels on this machine: every feature against float64, before any timing.

The bounds are those of :mod:`benchmarks.promises`; for statistics, relative to the largest logit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.session import Check
from benchmarks.promises import (
    DTYPES,
    LOGP_BOUND,
    assert_close,
    assert_gradients,
    assert_logps,
    in_float64,
    outcome,
)
from realign_kernels import linear_logprob, linear_logprob_stats, preference_loss, rdpo_loss
from realign_kernels.objective import Objective
from realign_kernels.testing import (
    HeadInputs,
    dense_log_probs,
    dense_logits,
    dense_logprob,
    make_head_inputs,
)


@dataclass(frozen=True)
class Case:
    """Inputs that test one feature; their sizes cross every kind of block edge."""

    name: str
    sizes: tuple[int, int, int]  # N, V, D
    arguments: dict[str, Any] = field(default_factory=dict)


# the second vocabulary spans several tiles of any backend, the rows more than one
CASES = (
    Case("plain", (257, 1031, 192)),
    Case("several tiles", (1100, 17003, 64)),
    Case("ragged", (131, 1003, 67)),
    Case("one row", (1, 513, 128)),
    Case("ignored rows", (300, 1031, 96), {"ignored": 0.4}),
    Case("bias", (129, 1031, 96), {"bias": True}),
    Case("LoRA", (129, 1031, 96), {"rank": 8}),
    Case("LoRA and bias", (129, 1003, 67), {"rank": 5, "bias": True}),
    Case("softcap", (129, 1031, 96), {"logit_softcap": 5.0, "logit_std": 8.0}),
    Case(
        "scale, softcap, temperature", (129, 1031, 96),
        {"logit_scale": 0.5, "logit_softcap": 4.0, "temperature": 0.7, "bias": True},
    ),
    Case("far labels", (129, 1031, 96), {"logit_std": 40.0}),
)  # fmt: skip
TINY_CASES = (CASES[0], CASES[2], CASES[4], CASES[7], CASES[8], CASES[10])


def kernel_checks(device: torch.device, backend: str, *, tiny: bool = False) -> Iterator[Check]:
    """Yield the checks of all features in all dtypes, bfloat16 first."""
    for dtype in reversed(DTYPES):
        for case in TINY_CASES if tiny else CASES:
            yield from case_checks(device, case, dtype, backend)
        for scoring in ("label", "top_non_label"):
            name = f"{dtype} rdpo_loss, {scoring}"
            yield check_of(name, _pairs, device, scoring, dtype, backend)


def case_checks(device: torch.device, case: Case, dtype: str, backend: str) -> Iterator[Check]:
    """Yield the checks of one feature in every mode."""
    for check in (_forward, _frozen, _stashed, _recomputed, _statistics):
        name = f"{dtype} {check.__name__.strip('_')}, {case.name}"
        yield check_of(name, _case, check, device, case, dtype, backend)


def check_cases(device: torch.device, cases: list[Case], dtype: str, backend: str) -> None:
    """Check several features as one check."""
    for case in cases:
        for check in case_checks(device, case, dtype, backend):
            found = check.run()
            assert not found.problem, f"{found.name}: {found.problem}"


def check_of(name: str, check: Callable[..., None], *arguments: Any) -> Check:
    """Return a check that has not run yet."""
    return Check(name, lambda: outcome(name, check, *arguments))


def _case(
    check: Callable[[HeadInputs, str, str], None],
    device: torch.device,
    case: Case,
    dtype: str,
    backend: str,
) -> None:
    N, V, D = case.sizes
    inputs = make_head_inputs(N, V, D, DTYPES[dtype], **case.arguments)
    check(moved(inputs, device), dtype, backend)


def _pairs(device: torch.device, scoring: str, dtype: str, backend: str) -> None:
    _rdpo_of(scoring)(pairs_of(device, dtype), dtype, backend)


def _forward(inputs: HeadInputs, dtype: str, backend: str) -> None:
    with torch.no_grad():
        actual = inputs.call(linear_logprob, backend=backend)
    assert_logps(actual, inputs, dtype)


def _frozen(inputs: HeadInputs, dtype: str, backend: str) -> None:
    _check_gradients(inputs, dtype, backend, "auto", num_leaves=1)


def _stashed(inputs: HeadInputs, dtype: str, backend: str) -> None:
    _check_gradients(inputs, dtype, backend, "stash", num_leaves=None)


def _recomputed(inputs: HeadInputs, dtype: str, backend: str) -> None:
    _check_gradients(inputs, dtype, backend, "recompute", num_leaves=None)


def _statistics(inputs: HeadInputs, dtype: str, backend: str) -> None:
    with torch.no_grad():
        actual = inputs.call(linear_logprob_stats, backend=backend)
        exact = in_float64(inputs)
        log_probs, logits = dense_log_probs(exact), dense_logits(exact)
    assert_logps(actual.token_logps, inputs, dtype)
    scored = inputs.labels != inputs.options.get("ignore_index", -100)
    labels = torch.where(scored, inputs.labels, 0)[:, None]
    probs = log_probs.exp()
    others = log_probs.scatter(-1, labels, -torch.inf)
    expected = {
        "entropy": -(probs * log_probs).sum(-1),
        "log_sum_sq_probs": (2 * log_probs).logsumexp(-1),
        "mean_logits": logits.mean(-1),
        "top_non_label_logps": others.amax(-1),
        "lse": logits.logsumexp(-1),
    }
    relative = 1e-6 * logits.abs().amax(-1)
    bound = LOGP_BOUND[dtype]
    for name, value in expected.items():
        found = getattr(actual, name)[scored]
        assert_close(name, found, value[scored], bound, relative[scored])
    ids = actual.top_non_label_ids[scored].clamp(min=0)[:, None]
    chosen, best = others[scored].gather(-1, ids).squeeze(-1), others[scored].amax(-1)
    assert_close("top_non_label_ids", chosen, best, bound, relative[scored])
    lead = log_probs.gather(-1, labels).squeeze(-1) - others.amax(-1)
    sure = scored & (lead.abs() > 2 * (bound + relative))
    wrong = int((actual.is_top1[sure] != (lead[sure] > 0)).sum())
    assert wrong == 0, f"is_top1 differs in {wrong} rows"


def _rdpo_of(scoring: str) -> Callable[[HeadInputs, str, str], None]:
    def rdpo(inputs: HeadInputs, dtype: str, backend: str) -> None:
        objective, num_cells = Objective.rdpo(0.1, 0.2, 0.5), 3
        num_pairs = len(inputs.labels) // num_cells
        generator = torch.Generator().manual_seed(1)
        ref_logps = -100 * torch.rand(num_cells, num_pairs, generator=generator)
        ref_logps = ref_logps.to(inputs.labels.device)
        lengths = (inputs.labels != -100).sum(-1).view(num_cells, num_pairs).cpu()

        def expected(leaves: HeadInputs) -> Tensor:
            scores = dense_logprob(leaves)
            if scoring == "top_non_label":
                scored = leaves.labels != -100
                labels = torch.where(scored, leaves.labels, 0)[..., None]
                others = dense_log_probs(leaves).scatter(-1, labels, -torch.inf).amax(-1)
                is_top = (torch.arange(len(scores), device=scores.device) >= num_pairs)[:, None]
                scores = torch.where(is_top & scored, others, scores)
            dtype = torch.promote_types(scores.dtype, torch.float32)
            logps = scores.to(dtype).sum(-1).view(num_cells, num_pairs)
            return preference_loss(logps, ref_logps.to(logps.dtype), objective).loss

        def actual(leaves: HeadInputs, memory: str) -> Tensor:
            return leaves.call(
                rdpo_loss, ref_logps=ref_logps, objective=objective, sequence_lengths=lengths,
                rejected_scoring=scoring, backend=backend, memory=memory,
            ).loss  # fmt: skip

        exact, plain = in_float64(inputs), inputs.as_leaves()
        truth = expected(exact)
        truth.backward()
        expected(plain).backward()
        for memory in ("stash", "tile", "recompute"):
            leaves = inputs.as_leaves()
            loss = actual(leaves, memory)
            assert_close(f"loss, {memory}", loss, truth, 20 * LOGP_BOUND[dtype])
            loss.backward()
            assert_gradients(leaves, exact, plain, dtype, memory)

    return rdpo


def pairs_of(device: torch.device, dtype: str) -> HeadInputs:
    """Return 3 cells of 5 pairs with 40 positions, of which 30 % are ignored."""
    inputs = make_head_inputs(15 * 40, 1031, 96, DTYPES[dtype], ignored=0.3, seed=3)
    hidden, labels = inputs.hidden_states.view(15, 40, 96), inputs.labels.view(15, 40)
    return moved(replace(inputs, hidden_states=hidden, labels=labels), device)


def _check_gradients(
    inputs: HeadInputs, dtype: str, backend: str, memory: str, *, num_leaves: int | None
) -> None:
    leaves, exact, plain = inputs.as_leaves(), in_float64(inputs), inputs.as_leaves()
    if num_leaves is not None:
        for call in (leaves, exact, plain):
            for tensor in call.tensors[num_leaves:]:
                tensor.requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    upstream = torch.randn(inputs.labels.shape, generator=generator, dtype=torch.float64)
    upstream = upstream.to(inputs.labels.device)
    actual = leaves.call(linear_logprob, backend=backend, memory=memory)
    assert_logps(actual.detach(), inputs, dtype)
    actual.backward(upstream.to(actual.dtype))
    dense_logprob(exact).backward(upstream)
    outputs = dense_logprob(plain)
    outputs.backward(upstream.to(outputs.dtype))
    assert_gradients(leaves, exact, plain, dtype, memory)


def moved(inputs: HeadInputs, device: torch.device) -> HeadInputs:
    """Return the same call on a device."""
    on_device = inputs.replace_tensors([tensor.to(device) for tensor in inputs.tensors])
    return replace(on_device, labels=on_device.labels.to(device))
