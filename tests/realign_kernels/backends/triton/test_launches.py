"""The choice of launches, and compilation for GPUs, which needs none."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import realign_kernels
from realign_kernels.backends.triton import launches

KERNELS = ("epilogue", "label_dot", "combine", "add_entries", "sum_sequences")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [0, 1, 63, 64, 65, 1000, 8192])
def test_every_thread_has_an_element(kernel, dtype, width):
    launch = launches.choose_launch(kernel, dtype, width, (9, 0))
    assert launch.block >= 64 * launch.num_warps
    assert launch.block & (launch.block - 1) == 0
    assert launch.block <= max(64, 2 * width)


def test_launches_depend_on_nothing_but_the_arguments():
    first = launches.choose_launch("epilogue", torch.float32, 8192, (8, 0))
    assert first == launches.choose_launch("epilogue", torch.float32, 8192, (12, 0))
    assert first == launches.launch_of("epilogue", torch.float32, 8192, torch.device("cpu"))


COMPILATION = """
    import sys

    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    import realign_kernels.backends.triton

    def module_of(name):
        return sys.modules[f"realign_kernels.backends.triton.{name}"]

    def build(module, kernel, constants, num_warps, floats, **types):
        function = getattr(module_of(module), kernel)
        signature, values = {}, {}
        for index, name in enumerate(function.arg_names):
            if name in constants or types.get(name, "") is None:
                signature[name] = "constexpr"
                values[(index,)] = constants.get(name)
            else:
                signature[name] = types.get(name, floats if name.endswith("_ptr") else "i32")
        source = ASTSource(fn=function, signature=signature, constexprs=values)
        built = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
        return built.asm["ptx"]

    def pointers(names, dtype):
        return {f"{name}_ptr": dtype for name in names.split()}

    ids = pointers("labels ids top_ids released_ids starts order counts", "*i64")
    transform = {"SCALE": 0.5, "SOFTCAP": 30.0, "TEMPERATURE": 1.0, "BLOCK_V": 1024}
    flags = {"BOUND": 60.0, "FINDS_TOP_FIRST": False, "HAS_STATISTICS": False, "TRACKS_TOP": False}
    nothing = pointers("logit_sum label_logits entropy_sum square_sum top_logits top_ids", None)
    nothing |= pointers("released_ids released_values", None)
    lazy = transform | flags
    whole = lazy | {"FINDS_TOP_FIRST": True, "HAS_STATISTICS": True, "TRACKS_TOP": True}
    half = pointers("exponentials weight hidden", "*bf16")
    stash = pointers("accumulator", "*bf16")
    row, entries = {"BLOCK_D": 1024}, {"BLOCK_D": 256, "BLOCK_E": 8}
    for ptx in (
        build("epilogue", "_epilogue_kernel", lazy, 4, "*fp32", **half, **ids | nothing),
        build("epilogue", "_epilogue_kernel", whole, 4, "*fp32", **ids | half),
        build("epilogue", "_replay_kernel", transform, 4, "*fp32", **ids | half),
        build("rows", "_label_dot_kernel", row, 4, "*fp32", **ids | half),
        build("rows", "_combine_kernel", row, 4, "*fp32", **ids | half | stash),
        build("rows", "_add_entries_kernel", entries, 1, "*fp32", **ids),
    ):
        assert ".f64" not in ptx  # nothing is promoted on the way
    build("epilogue", "_epilogue_kernel", whole, 4, "*fp64", **ids)
    tokens = pointers("token_logps", "*fp32")
    build("pairs", "_sum_sequences_kernel", {"BLOCK_T": 256}, 4, "*fp64", **ids | tokens)
    table = {"HEADER_SIZE": 3, "TERM_SIZE": 9}
    build("pairs", "_pair_loss_kernel", table, 1, "*fp64", **ids)
"""


def test_kernels_compile_for_a_gpu(tmp_path):
    """In a process of its own: the interpreter, once on, stays on."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": str(Path(realign_kernels.__file__).parent.parent),
        "PYTHONWARNINGS": "ignore",
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    script = tmp_path / "compilation.py"  # Triton reads the source of what it compiles
    script.write_text(textwrap.dedent(COMPILATION), encoding="utf-8")
    subprocess.run([sys.executable, str(script)], env=environment, check=True, timeout=120)
