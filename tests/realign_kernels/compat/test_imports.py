"""An entry imports torch, and none of the libraries whose signature it has."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import realign_kernels.compat

ENTRIES = [module.name for module in pkgutil.iter_modules(realign_kernels.compat.__path__)]
PEERS = ("cut_cross_entropy", "liger_kernel", "verl", "trl", "transformers")


def test_no_compat_module_imports_its_peer_library():
    assert {"cce", "liger", "torch", "verl"} <= {*ENTRIES}
    code = (
        "import importlib, sys\n"
        f"for entry in {ENTRIES}:\n"
        "    importlib.import_module(f'realign_kernels.compat.{entry}')\n"
        f"    loaded = [name for name in {PEERS} if name in sys.modules]\n"
        "    assert not loaded, (entry, loaded)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
