"""One of two processes that share a GPU, or a CPU: ``python -m benchmarks.gpu.rank_process train``.

``accelerate launch`` starts it in place of ``python -m realign``, which it then runs.  NCCL allows
one process per GPU, so collectives use gloo, and every process takes the first GPU.  On a CPU, an
environment variable makes accelerate shard over CPU processes.
"""

from __future__ import annotations

import os

# before anything asks for a device
os.environ["LOCAL_RANK"] = "0"

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from realign.cli import main


def use_gloo() -> None:
    """Make accelerate put all processes into one gloo group."""
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    if not torch.cuda.is_available():
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        begin = PartialState.__init__
        PartialState.__init__ = lambda self, cpu=False, **options: begin(self, False, **options)


if __name__ == "__main__":
    use_gloo()
    main()
