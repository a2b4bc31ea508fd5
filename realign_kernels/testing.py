"""Inputs and a dense oracle for tests and benchmarks. It shares no code with the kernels.

Letters: **N** rows, **D** hidden size, **V** vocabulary, **r** rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from realign_kernels.objective import Objective, Term


@dataclass(frozen=True)
class HeadInputs:
    """Arguments of one call; ``options`` are the keyword arguments that change the result."""

    hidden_states: Tensor
    lm_head_weight: Tensor
    labels: Tensor
    options: dict[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        """Every differentiable input: hidden states, weight, then bias, A and B where given."""
        bias = self.options.get("lm_head_bias")
        factors = self.options.get("lm_head_lora", ())[:2]
        given = [] if bias is None else [bias]
        return [self.hidden_states, self.lm_head_weight, *given, *factors]

    def replace_tensors(self, tensors: list[Tensor] | tuple[Tensor, ...]) -> HeadInputs:
        """Return the same call with other differentiable inputs, in the order of ``tensors``."""
        hidden_states, weight, *others = tensors
        options = dict(self.options)
        if "lm_head_bias" in options:
            options["lm_head_bias"] = others.pop(0)
        if "lm_head_lora" in options:
            options["lm_head_lora"] = (*others, options["lm_head_lora"][2])
        return replace(self, hidden_states=hidden_states, lm_head_weight=weight, options=options)

    def as_leaves(self, dtype: torch.dtype | None = None) -> HeadInputs:
        """Return copies of the inputs that require gradients, cast to ``dtype`` if given."""
        copies = [tensor.detach().to(dtype or tensor.dtype, copy=True) for tensor in self.tensors]
        return self.replace_tensors([copy.requires_grad_() for copy in copies])

    def call(self, function: Any, **extra: Any) -> Any:
        """Call a function of the head with these arguments."""
        return function(
            self.hidden_states, self.lm_head_weight, self.labels, **self.options, **extra
        )


def seeded(seed: int) -> torch.Generator:
    """Return a seeded generator on the default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def make_head_inputs(
    N: int,
    V: int,
    D: int,
    dtype: torch.dtype = torch.float64,
    *,
    seed: int = 0,
    bias: bool = False,
    rank: int = 0,
    ignored: float = 0.0,
    logit_std: float = 3.0,
    **options: Any,
) -> HeadInputs:
    """Return random inputs, already rounded to ``dtype``, whose raw logits have a given spread."""
    generator = seeded(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (values * std).to(dtype)

    labels = torch.randint(0, V, (N,), generator=generator)
    labels[torch.rand(N, generator=generator) < ignored] = options.get("ignore_index", -100)
    hidden_states, weight = normal(N, D), normal(V, D, std=logit_std / D**0.5)
    if bias:
        options["lm_head_bias"] = normal(V)
    if rank:
        factors = normal(rank, D, std=D**-0.5), normal(V, rank)
        options["lm_head_lora"] = (*factors, 0.5)
    return HeadInputs(hidden_states, weight, labels, options)


def dense_log_probs(inputs: HeadInputs) -> Tensor:
    """Return ``log_softmax`` of the logits of every row, (..., V), in the dtype of the inputs."""
    return dense_logits(inputs).log_softmax(dim=-1)


def dense_logits(inputs: HeadInputs) -> Tensor:
    """Return the transformed logits of every row, (..., V), by the plain formula."""
    options = inputs.options
    logits: Tensor = inputs.hidden_states @ inputs.lm_head_weight.T
    if "lm_head_bias" in options:
        logits = logits + options["lm_head_bias"]
    if "lm_head_lora" in options:
        lora_a, lora_b, scaling = options["lm_head_lora"]
        logits = logits + scaling * (inputs.hidden_states @ lora_a.T @ lora_b.T)
    logit_scale: float = options.get("logit_scale", 1.0)
    logits = logits * logit_scale
    if options.get("logit_softcap") is not None:
        cap = options["logit_softcap"]
        logits = cap * torch.tanh(logits / cap)
    temperature: float = options.get("temperature", 1.0)
    return logits / temperature


def dense_logprob(inputs: HeadInputs) -> Tensor:
    """Return the log-probability of each label, 0 where it is ignored; differentiable."""
    is_scored = inputs.labels != inputs.options.get("ignore_index", -100)
    index = torch.where(is_scored, inputs.labels, 0).unsqueeze(-1)
    label_logps = dense_log_probs(inputs).gather(-1, index).squeeze(-1)
    return torch.where(is_scored, label_logps, 0.0)


def dense_rdpo_loss(
    inputs: HeadInputs,
    ref_logps: Tensor,
    objective: Objective,
    *,
    sequence_ids: Tensor | None = None,
    rejected_scoring: str = "label",
) -> DensePairs:
    """Return the results of the loss by the plain formula, pair by pair; differentiable.

    Without ``sequence_ids`` hidden states are padded, one sequence per row.
    """
    num_cells, num_pairs = ref_logps.shape
    if sequence_ids is None:
        sequence_ids = torch.arange(num_cells * num_pairs)[:, None].expand(inputs.labels.shape)
    is_scored = inputs.labels != inputs.options.get("ignore_index", -100)
    index = torch.where(is_scored, inputs.labels, 0).unsqueeze(-1)
    log_probs = dense_log_probs(inputs)
    scores = log_probs.gather(-1, index).squeeze(-1)
    if rejected_scoring == "top_non_label":
        others = log_probs.scatter(-1, index, -torch.inf).amax(dim=-1)
        scores = torch.where(sequence_ids < num_pairs, scores, others)
    answers = [is_scored & (sequence_ids == number) for number in range(num_cells * num_pairs)]
    logps = torch.stack([scores[answer].sum() for answer in answers]).view(num_cells, num_pairs)
    num_tokens = torch.stack([answer.sum() for answer in answers]).view(num_cells, num_pairs)
    return _dense_pairs(logps, num_tokens, ref_logps.to(logps.dtype), objective)


class DensePairs(NamedTuple):
    """Results of :func:`dense_rdpo_loss`, in the order of ``RdpoOutput``."""

    loss: Tensor
    logps: Tensor
    num_tokens: Tensor
    rewards: Tensor
    text_margins: Tensor
    image_margins: Tensor


def _dense_pairs(
    logps: Tensor, num_tokens: Tensor, ref_logps: Tensor, objective: Objective
) -> DensePairs:
    num_cells, num_pairs = logps.shape
    rho = torch.where(num_tokens > 0, logps - ref_logps, 0.0)
    losses = []
    for pair in range(num_pairs):
        loss = logps.new_zeros(())
        for term in objective.terms:
            cells = [cell for cell in range(4) if term.coefficients[cell] != 0]
            if all(num_tokens[cell, pair] > 0 for cell in cells):
                loss = loss + term.weight * _dense_link(term, rho[:, pair], num_tokens[:, pair])
        if objective.nll_weight > 0 and num_tokens[0, pair] > 0:
            loss = loss - objective.nll_weight * logps[0, pair] / num_tokens[0, pair]
        losses.append(loss)

    def margins(cell: int, beta: float) -> Tensor:
        if cell >= num_cells:
            return torch.zeros_like(rho[0])
        are_present = (num_tokens[0] > 0) & (num_tokens[cell] > 0)
        return torch.where(are_present, beta * (rho[0] - rho[cell]), 0.0)

    return DensePairs(
        torch.stack(losses).mean(),
        logps,
        num_tokens,
        objective.beta * rho,
        margins(1, objective.beta),
        margins(2, objective.image_beta),
    )


def _dense_link(term: Term, rho: Tensor, num_tokens: Tensor) -> Tensor:
    coefficients = rho.new_tensor(term.coefficients[: len(rho)])
    if term.link == "ipo":
        # The coefficient of an absent cell is 0 here, and so is the product.
        contrast = (coefficients * rho / num_tokens.clamp(min=1)).sum()
        return (contrast - 1 / (2 * term.beta)) ** 2
    contrast = (coefficients * rho).sum()
    if term.link == "hinge":
        return (1 - term.beta * contrast).clamp(min=0)
    x, zero = term.beta * contrast - term.offset, torch.zeros_like(contrast)
    smoothing = term.label_smoothing
    return (1 - smoothing) * torch.logaddexp(-x, zero) + smoothing * torch.logaddexp(x, zero)


def peak_bytes(function: Callable[[], Any]) -> int:
    """Return the peak of the CPU memory that a call's tensors hold, with those that it returns.

    It is read from the profiler's record of the allocator, which sees allocations inside operators.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        result = function()
    events = profile.profiler.kineto_results.events()
    sizes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    alive = peak = 0
    for _, size in sorted(sizes, key=lambda item: item[0]):
        alive += size
        peak = max(peak, alive)
    del result
    return peak
