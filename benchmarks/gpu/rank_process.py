"""One of two processes that share a GPU, or a CPU: ``python -m benchmarks.gpu.rank_process train``.

``accelerate launch`` starts it in the place of ``python -m realign``, which it then runs.  NCCL
takes one process for a GPU, so collectives go over gloo, and every process takes the first GPU.
On a CPU, accelerate has to be told that it is one that it shards over.
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
    """Let accelerate put all processes into a group over gloo."""
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    if not torch.cuda.is_available():
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        begin = PartialState.__init__
        PartialState.__init__ = lambda self, cpu=False, **options: begin(self, False, **options)


if __name__ == "__main__":
    use_gloo()
    main()
