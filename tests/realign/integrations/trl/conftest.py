"""Every test of the integration is checked to leave TRL as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from trl.kernels import ChunkedLogProbFunction, chunked_logprob
from trl.trainer import utils

USES_TRITON = utils._use_triton


@pytest.fixture(autouse=True)
def _is_undone() -> Iterator[None]:
    """Check that a test has left TRL as it was."""
    yield
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    assert chunked_logprob.ChunkedLogProbFunction is ChunkedLogProbFunction
    assert utils._use_triton is USES_TRITON
