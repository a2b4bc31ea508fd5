"""K27: the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FLAGS = ["-std=c++17", "-O1", "-g", "-w", "-shared", "-fPIC", "-fopenmp"]
SCRIPT = """
import sys, pytest
from realign_kernels.backends import cpu
cpu.library_path = lambda: sys.argv[1]
sys.exit(pytest.main(["-q", "-x", "-s", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


@pytest.mark.slow
def test_kernels_have_no_out_of_bounds_access_or_undefined_behaviour(tmp_path):
    """Each instruction set that this machine has is tried, since each has code of its own."""
    library, objects = tmp_path / "library.so", []
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sets = {
        "baseline": [],
        "avx2": ["-mavx2", "-mfma"],
        "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"],
    }
    for name, flags in sets.items():
        objects.append(str(tmp_path / f"{name}.o"))
        subprocess.run(
            ["g++", *FLAGS, *sanitize, *flags, f"-DREALIGN_KERNELS=kernels_{name}", "-c",
             str(ROOT / "csrc/kernels.cpp"), "-o", objects[-1]],
            check=True,
        )  # fmt: skip
    product_sets = {"portable": [], "avx512": [*sets["avx512"], "-mavx512bf16"]}
    product_sets["amx"] = [*product_sets["avx512"], "-mamx-tile", "-mamx-bf16"]
    for name, flags in product_sets.items():
        objects.append(str(tmp_path / f"products_{name}.o"))
        subprocess.run(
            ["g++", *FLAGS, *sanitize, *flags, f"-DREALIGN_PRODUCTS=products_{name}", "-c",
             str(ROOT / "csrc/products.cpp"), "-o", objects[-1]],
            check=True,
        )  # fmt: skip
    others = [str(ROOT / "csrc" / name) for name in ("pairs.cpp", "dispatch.cpp")]
    defined = ["-DREALIGN_X86", "-DREALIGN_AVX512BF16", "-DREALIGN_AMX"]
    subprocess.run(
        ["g++", *FLAGS, *sanitize, *defined, *objects, *others, "-o", str(library)],
        check=True,
    )
    # Exceptions that torch throws need the C++ runtime to be there when the sanitizer starts.
    runtime = " ".join(
        subprocess.run(
            ["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    )
    names = ("fused/test_modes", "test_linear_logprob", "test_statistics", "test_rdpo_loss")
    tests = [str(ROOT / f"tests/realign_kernels/{name}.py") for name in names]
    products = str(ROOT / "tests/realign_kernels/backends/test_products.py")
    for name, files in [*((name, tests) for name in sets), ("avx512", [products])]:
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(library), *files],
            env={
                **os.environ,
                "LD_PRELOAD": runtime,
                # Python and torch never free what they hold at exit.
                "ASAN_OPTIONS": "detect_leaks=0",
                "REALIGN_CPU_ISA": name,
            },
            cwd=ROOT,
            check=True,
            timeout=1200,
        )
