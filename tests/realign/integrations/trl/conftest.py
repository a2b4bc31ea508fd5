"""What every test of the integration leaves behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from trl.kernels import ChunkedLogProbFunction, chunked_logprob
from trl.trainer import utils

USES_TRITON = utils._use_triton


@pytest.fixture(autouse=True)
def _is_undone() -> Iterator[None]:
    """Every test leaves TRL as it was."""
    yield
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    assert chunked_logprob.ChunkedLogProbFunction is ChunkedLogProbFunction
    assert utils._use_triton is USES_TRITON
