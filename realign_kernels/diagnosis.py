"""A report on the installed packages, the kernels that a call would use, and their errors.

It requires torch alone; ``python -m realign_kernels`` prints it.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from realign_kernels.backends.dispatch import describe_backends, resolve_backend
from realign_kernels.installation import DISTRIBUTIONS, __version__, installed_files
from realign_kernels.linear_logprob import linear_logprob
from realign_kernels.objective import Objective
from realign_kernels.rdpo_loss import rdpo_loss
from realign_kernels.testing import (
    HeadInputs,
    dense_logprob,
    dense_rdpo_loss,
    make_head_inputs,
)

_CELLS, _PAIRS, _POSITIONS = 3, 4, 8
# The bounds on log-probabilities in docs/guides/head.md; a gradient is rounded to its own dtype.
_LOGPROB_BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-4}
_GRADIENT_BOUND = {torch.float32: 1e-5, torch.bfloat16: 4e-3}


class Diagnosis(NamedTuple):
    """Results of :func:`diagnose`."""

    lines: list[str]
    """The lines of the report, for people and bug reports."""
    is_sound: bool
    """True if every numeric check was within its bound."""


class _Check(NamedTuple):
    """The errors of one call against float64, and their bounds."""

    logprob_error: float
    gradient_error: float
    dtype: torch.dtype

    @property
    def is_within(self) -> bool:
        """Return whether both errors are within their bounds; NaN never is."""
        return (
            self.logprob_error <= _LOGPROB_BOUND[self.dtype]
            and self.gradient_error <= _GRADIENT_BOUND[self.dtype]
        )


def diagnose() -> Diagnosis:
    """Report what is installed, which kernels a call would use, and how exact they are here.

    A small rDPO loss and its gradients are computed by every backend that can run, in float32 and
    in bfloat16, and compared with float64, which takes less than a second on a CPU.

    Returns:
        diagnosis: :class:`Diagnosis`, the lines of a report and whether every check passed.

    Example::

        >>> from realign_kernels import diagnose
        >>> diagnose().is_sound
        True
    """
    lines = [*_describe_versions()]
    lines += [f"kernel backend {name}: {state}" for name, state in describe_backends().items()]
    device_types = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    lines += [f"tensors on {kind} take: {resolve_backend('auto', kind)}" for kind in device_types]
    is_sound = True
    for device_type in device_types:
        for backend in dict.fromkeys([resolve_backend("auto", device_type), "eager"]):
            for dtype in (torch.float32, torch.bfloat16):
                check = _check_backend(backend, device_type, dtype)
                is_sound &= check.is_within
                lines.append(
                    f"check of {backend} on {device_type}, {str(dtype).removeprefix('torch.')}: "
                    f"log-probabilities within {check.logprob_error:.1e} of float64 "
                    f"(at most {_LOGPROB_BOUND[dtype]:.0e}), gradients within "
                    f"{check.gradient_error:.1e} (at most {_GRADIENT_BOUND[dtype]:.0e}): "
                    f"{'right' if check.is_within else 'WRONG'}"
                )
    return Diagnosis(lines, is_sound)


def _describe_versions() -> Iterator[str]:
    owners = [f"{name} {version(name)}" for name in DISTRIBUTIONS if installed_files(name)]
    yield (
        f"realign_kernels {__version__} in {Path(__file__).parent}, "
        f"installed by {' and '.join(owners) or 'no distribution'}"
    )
    yield f"python {platform.python_version()} on {platform.platform()}"
    build = "without GPUs"
    if torch.version.cuda is not None:
        build = f"for CUDA {torch.version.cuda}"
    elif torch.version.hip is not None:
        build = f"for ROCm {torch.version.hip}"
    yield f"torch {torch.__version__}, {build}"
    for package in ("triton", "numpy"):
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            yield f"{package} not installed"
    if torch.cuda.is_available():
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        yield f"device: {torch.cuda.get_device_name()}, capability {capability}"
    else:
        yield f"device: CPU, {torch.get_num_threads()} threads"


def _check_backend(backend: str, device_type: str, dtype: torch.dtype) -> _Check:
    """Compare a loss and its gradients on a device with the dense formula in float64."""
    num_sequences = _CELLS * _PAIRS
    rows = make_head_inputs(num_sequences * _POSITIONS, 1000, 64, dtype, ignored=0.25)
    inputs = HeadInputs(
        rows.hidden_states.view(num_sequences, _POSITIONS, -1),
        rows.lm_head_weight,
        rows.labels.view(num_sequences, _POSITIONS),
        {},
    )
    ref_logps = dense_logprob(inputs.as_leaves(torch.float64)).sum(1).detach()
    ref_logps = ref_logps.view(_CELLS, _PAIRS) + torch.linspace(-3, 3, _PAIRS, dtype=torch.float64)

    exact = inputs.as_leaves(torch.float64)
    dense_rdpo_loss(exact, ref_logps, Objective.rdpo()).loss.backward()
    hidden_states, weight = (
        part.detach().to(device_type).requires_grad_() for part in inputs.tensors
    )
    labels, ref_logps = inputs.labels.to(device_type), ref_logps.to(device_type)
    rdpo_loss(hidden_states, weight, labels, ref_logps, backend=backend).loss.backward()
    with torch.no_grad():
        scores = linear_logprob(hidden_states, weight, labels, backend=backend)
        token_logps = scores.cpu().double()
        logprob_error = (token_logps - dense_logprob(exact)).abs().max().item()
    errors = []
    for actual, expected in zip((hidden_states, weight), exact.tensors, strict=True):
        assert actual.grad is not None
        assert expected.grad is not None
        difference = actual.grad.cpu().double() - expected.grad
        errors.append((difference.norm() / expected.grad.norm()).item())
    # Python's max can lose a NaN.
    return _Check(logprob_error, torch.tensor(errors).max().item(), dtype)


def main() -> None:
    """Print the report, and exit with 1 where a number is wrong."""
    diagnosis = diagnose()
    sys.stdout.writelines(f"{line}\n" for line in diagnosis.lines)
    sys.exit(0 if diagnosis.is_sound else 1)
