"""The libraries whose own tests are run against our entries, and how their tests are adapted.

A replacement is a regular expression and the text in its place.  Each must be found in at least one
of the files: otherwise they are of another version, and might test the peer itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

PEERS_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Peer:
    """The files that are taken from a folder of a peer, and the changes that are made to them."""

    tests: tuple[str, ...]
    """Test files, by their path in the folder; each is copied under its name alone."""
    replaced: Mapping[str, str] = field(default_factory=dict)
    """Regular expressions in any of the files, and the text in their place."""
    helpers: Mapping[str, str] = field(default_factory=dict)
    """Modules of the peer that test files import: path in its folder, and path of the copy.

    Nothing else of the peer can be imported, so that what is tested cannot be the peer."""
    source: Path | None = None
    """The folder, where it is our own."""


_ON_CPU = {
    # In a skip mark and inside of tests: without it every test would be skipped.
    r"not torch\.cuda\.is_available\(\)": "False",
    r'device="cuda"': 'device="cpu"',
    r"torch\.cuda\.manual_seed": "torch.manual_seed",
}
_CCE = Peer(
    tests=("tests/test_cce_loss_forward.py", "tests/test_cce_loss_backward.py"),
    replaced={
        r"from cut_cross_entropy import linear_cross_entropy": (
            "from realign_kernels.compat.cce import linear_cross_entropy"
        ),
        **_ON_CPU,
        # Of the formulas that they compare with, which would be compiled anew for every shape.
        r"(?m)^@torch\.compile\(.*\)$": "",
    },
    helpers={
        "cut_cross_entropy/constants.py": "cut_cross_entropy/constants.py",
        "cut_cross_entropy/utils.py": "cut_cross_entropy/utils.py",
    },
)
_LIGER = Peer(
    tests=("test/chunked_loss/test_dpo_loss.py",),
    replaced={
        r"from liger_kernel\.chunked_loss import LigerFusedLinearDPOLoss": (
            "from realign_kernels.compat.liger import LigerFusedLinearDPOLoss"
        ),
        r"from liger_kernel\.chunked_loss\.functional import liger_fused_linear_dpo": (
            "from realign_kernels.compat.liger import liger_fused_linear_dpo"
        ),
        # Called by .apply alone, with the arguments of the function.
        r"from liger_kernel\.chunked_loss\.dpo_loss import LigerFusedLinearDPOFunction": (
            "from realign_kernels.compat import liger\n"
            "class LigerFusedLinearDPOFunction:\n"
            "    apply = staticmethod(liger.liger_fused_linear_dpo)"
        ),
    },
    helpers={
        "src/liger_kernel/utils.py": "liger_kernel/utils.py",
        "test/utils.py": "test/utils.py",
    },
)
_TRL = Peer(
    tests=("tests/test_kernels.py",),
    replaced={
        r"from trl\.kernels import ChunkedLogProbFunction, selective_log_softmax_and_entropy": (
            "import trl.trainer.utils\n"
            "from realign.integrations.trl import patch_trl\n"
            "patch_trl()\n"
            "ChunkedLogProbFunction = trl.trainer.utils._ChunkedLogProbFunction\n"
        ),
        # A skip mark: without it every test would be skipped on a CPU.
        r"from \.testing_utils import require_torch_accelerator": (
            "def require_torch_accelerator(case):\n    return case\n"
        ),
    },
)

PEERS = {
    "cce": _CCE,
    "cce-head": _CCE,
    "liger": _LIGER,
    "torch": Peer(tests=("torch_samples.py",), source=PEERS_FOLDER),
    "trl": _TRL,
}
