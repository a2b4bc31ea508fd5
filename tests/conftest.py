"""Settings that every test shares."""

from __future__ import annotations

import os

# before any import of the libraries that read them
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# there is no GPU in CI: elsewhere none is seen, and its kernels run in Triton's interpreter
if "REALIGN_TEST_DEVICE" not in os.environ:
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tests run in parallel processes; one thread each also makes sums repeatable."""
    torch.set_num_threads(1)
