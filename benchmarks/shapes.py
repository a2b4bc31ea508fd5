"""Shapes of models' heads, and random inputs for them.

Letters: **N** answer tokens, **D** hidden size, **V** vocabulary, **S** sequences, **T** positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.head.providers import Inputs


class HeadShape(NamedTuple):
    """A head and the answer tokens that it scores."""

    model: str
    N: int
    D: int
    V: int

    @property
    def key(self) -> str:
        """Name of the shape in result files."""
        return f"{self.model}/N{self.N}"


# model: hidden size, vocabulary
HEADS = {
    "llava-1.5-7b": (4096, 32064),
    "llama-3-8b": (4096, 128256),
    "qwen2.5-vl-3b": (2048, 151936),
    "qwen2.5-vl-7b": (3584, 152064),
    "gemma-3-4b": (2560, 262208),
    "gemma-3-12b": (3840, 262208),
    "gemma-3-27b": (5376, 262208),
}
NUM_TOKENS = (1024, 4096, 256, 16384)  # in the order in which they are measured
# LLaVA's vocabulary, hidden sizes that two cores multiply in a fraction of a second
CPU_HEADS = {"llava-vocabulary-d512": (512, 32064), "llava-vocabulary-d1024": (1024, 32064)}
CPU_NUM_TOKENS = (512, 1024)
TINY_HEADS = {"tiny": (64, 1003)}  # to test a script; not for speed
TINY_NUM_TOKENS = (96,)


def shapes_for(device_type: str, *, tiny: bool = False) -> list[HeadShape]:
    """Return the shapes to measure on a device, the most informative first."""
    heads, numbers = (HEADS, NUM_TOKENS) if device_type != "cpu" else (CPU_HEADS, CPU_NUM_TOKENS)
    if tiny:
        heads, numbers = TINY_HEADS, TINY_NUM_TOKENS
    return [HeadShape(model, N, D, V) for N in numbers for model, (D, V) in heads.items()]


def make_inputs(
    shape: HeadShape, job: str, dtype: torch.dtype, device: torch.device, *, seed: int = 0
) -> Inputs:
    """Draw inputs whose logits have a standard deviation of 3, on the device itself.

    ``realign_kernels.testing`` draws in float64 on the host, which takes minutes at these sizes.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int, std: float = 1.0) -> torch.Tensor:
        values = torch.randn(*sizes, generator=generator, device=device)
        return values.mul_(std).to(dtype)

    hidden_states = normal(shape.N, shape.D)
    weight = normal(shape.V, shape.D, std=3.0 / shape.D**0.5)
    labels = torch.randint(shape.V, (shape.N,), generator=generator, device=device)
    if job == "dpo":
        num_sequences = sequences_of(shape.N)
        hidden_states = hidden_states.view(num_sequences, -1, shape.D)
        labels = labels.view(num_sequences, -1)
    if job == "token":
        # the gradients of a loss of sums have either sign, and are equal within a sequence; one
        # number per token is as hard
        grad = torch.randn(shape.N, generator=generator, device=device, dtype=torch.float64)
    else:
        grad = torch.ones((), device=device, dtype=torch.float64)
    return Inputs(hidden_states, weight, labels, grad)


def sequences_of(num_tokens: int) -> int:
    """Return the number of equal answers for a number of tokens: 128 tokens each if possible."""
    return max(2, num_tokens // 128)
