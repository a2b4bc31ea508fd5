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
def test_every_thread_of_a_launch_has_an_element(kernel, dtype, width):
    launch = launches.choose_launch(kernel, dtype, width, (9, 0))
    assert launch.block >= 64 * launch.num_warps
    assert launch.block & (launch.block - 1) == 0
    assert launch.block <= max(64, 2 * width)


def test_launches_depend_only_on_the_arguments():
    first = launches.choose_launch("epilogue", torch.float32, 8192, (8, 0))
    assert first == launches.choose_launch("epilogue", torch.float32, 8192, (12, 0))
    assert first == launches.launch_of("epilogue", torch.float32, 8192, torch.device("cpu"))


COMPILATION = """
    import os
    import re
    import subprocess
    import sys
    import tempfile

    import triton
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    import triton.language as tl
    import realign_kernels.backends.triton

    CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")

    def module_of(name):
        return sys.modules[f"realign_kernels.backends.triton.{name}"]

    def local_bytes(cubin):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            usage = subprocess.run(
                [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, check=True
            ).stdout.decode()
        print(usage.strip().splitlines()[-1].strip())
        return sum(map(int, re.search(r"STACK:(\\d+) .*LOCAL:(\\d+)", usage).groups()))

    def build(
        module, kernel, constants, num_warps, floats, may_spill=0, aligned=(), options=(), **types
    ):
        function = getattr(module_of(module), kernel)
        signature, values, attributes = {}, {}, {}
        for index, parameter in enumerate(function.params):
            name = parameter.name
            if name in constants or types.get(name, "") is None:
                signature[name] = "constexpr"
                values[(index,)] = constants.get(name)
            elif name in types:
                signature[name] = types[name]
            else:
                named = parameter.annotation_type or "i32"
                signature[name] = floats if name.endswith("_ptr") else named
            if aligned and (name.endswith("_ptr") or name in aligned) and (index,) not in values:
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=function, signature=signature, constexprs=values, attrs=attributes)
        options = {"num_warps": num_warps, **dict(options)}
        if "gfx942" in sys.argv:
            built = compile(source, target=GPUTarget("hip", "gfx942", 64), options=options)
            assert built.metadata.shared <= 64 << 10, kernel
        for capability in (80, 90):
            if f"sm_{capability}" not in sys.argv:
                continue
            built = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            print(kernel, capability, end=" ")
            assert local_bytes(built.asm["cubin"]) <= may_spill, kernel
            # of the GPUs that run code for sm_80, those of 8.6 and 8.9 have the least
            assert built.metadata.shared <= 99 << 10, kernel
        return built.asm["ptx"]

    def pointers(names, dtype):
        return {f"{name}_ptr": dtype for name in names.split()}

    ids = pointers("labels ids top_ids released_ids starts order counts positions lengths", "*i64")
    ids |= pointers("fits", "*i1") | pointers("count", "*i32")
    transform = {"CAPS": True, "BLOCK_V": 1024}
    flags = {"FINDS_TOP_FIRST": False, "HAS_STATISTICS": False, "TRACKS_TOP": False}
    nothing = pointers("logit_sum label_logits entropy_sum square_sum top_logits top_ids", None)
    nothing |= pointers("released_ids released_values", None)
    lazy = transform | flags
    whole = lazy | {"FINDS_TOP_FIRST": True, "HAS_STATISTICS": True, "TRACKS_TOP": True}
    half = pointers("exponentials weight hidden rows", "*bf16")
"""
PARTS = {
    "plain": """
    stash = pointers("accumulator", "*bf16")
    row, entries = {"BLOCK_D": 1024}, {"BLOCK_D": 256, "BLOCK_E": 8}
    owner = row | {"CAPS": True, "OPERAND": tl.bfloat16}
    start = owner | {"STARTS_AT_LABEL": True}
    scaled, matrix = pointers("out", "*bf16"), pointers("matrix", "*bf16")
    graded = {"CAPS": True, "BLOCK_N": 1024}

    for ptx in (
        build("epilogue", "_epilogue_kernel", lazy, 4, "*fp32", **half, **ids | nothing),
        build("epilogue", "_epilogue_kernel", whole, 4, "*fp32", **ids | half),
        build("epilogue", "_replay_kernel", transform, 4, "*fp32", **ids | half),
        build("rows", "_label_dot_kernel", row, 4, "*fp32", **ids | half),
        build("rows", "_combine_kernel", row, 4, "*fp32", **ids | half | stash),
        build("rows", "_add_entries_kernel", entries, 1, "*fp32", **ids | half),
        build("once", "_find_rows_kernel", {"BLOCK_M": 4096}, 8, "*fp32", **ids),
        build("once", "_start_rows_kernel", start, 4, "*fp32", **ids | half),
        build("once", "_finish_rows_kernel", owner, 4, "*fp32", **ids | half),
        build("once", "_spread_rows_kernel", row, 4, "*fp32", **ids | scaled),
        build("once", "_grade_rows_kernel", graded, 4, "*fp32", **ids),
        build("once", "_rescale_rows_kernel", {"BLOCK_V": 1024}, 4, "*fp32", **ids | matrix),
    ):
        # Nothing is promoted on the way: only the arguments have 64 bits.
        assert not re.search(r"(?<!cvt)[.]rn[.]f64|(add|mul|fma|div|neg|abs|setp[.]..)[.]f64", ptx)
    build("epilogue", "_epilogue_kernel", whole, 4, "*fp64", **ids)
    build("once", "_start_rows_kernel", start | {"OPERAND": tl.float64}, 4, "*fp64", **ids)
    build("once", "_finish_rows_kernel", owner | {"OPERAND": tl.float64}, 4, "*fp64", **ids)
    tokens = pointers("token_logps logps loss rewards text_margins image_margins", "*fp32")
    tokens |= pointers("ref_logps grad_logps grad_loss out", "*fp32")
    for form in (pointers("starts order", None), pointers("ids", None), {}):
        if form != {}:
            build("pairs", "_sum_sequences_kernel", {"BLOCK_T": 256}, 4, "*fp64",
                  **tokens | ids | form)
    spread = {"BLOCK_T": 256}
    build("pairs", "_spread_gradient_kernel", spread, 4, "*fp64", **ids | tokens)
    for num_terms in (1, 4):
        constants = {"NUM_TERMS": num_terms, "BLOCK_P": 32}
        table = ("i32",) * 3 * (3 + 9 * num_terms)
        build("pairs", "_pair_loss_kernel", constants, 4, "*fp64", 64, table=table, **ids | tokens)

    # No number of a transform or an objective compiles anew.
    import torch
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import create_function_from_signature
    from realign_kernels import Objective
    from realign_kernels.head import LogitTransform

    backend = CUDABackend(GPUTarget("cuda", 90, 32))

    def compiled_for(module, kernel, **arguments):
        function = getattr(module_of(module), kernel)
        bind = create_function_from_signature(function.signature, function.params, backend)
        tensor = torch.zeros(8, dtype=torch.int64)
        given = {name: tensor if name.endswith("_ptr") else 64 for name in function.arg_names}
        return bind(**given | arguments)[1]

    numbers_of = module_of("transform").transform_numbers
    for module, kernel in (
        ("epilogue", "_epilogue_kernel"), ("epilogue", "_replay_kernel"),
        ("fused_product", "_fused_product_kernel"),
        ("once", "_start_rows_kernel"), ("once", "_finish_rows_kernel"),
        ("once", "_grade_rows_kernel"),
    ):
        found = {
            str(compiled_for(module, kernel, **numbers_of(LogitTransform(scale, None, warmth))))
            for scale, warmth in ((1.0, 1.0), (2.0, 16.0), (0.3, 0.7))
        }
        assert len(found) == 1, kernel
        assert found.pop().count("fp64") >= 4
    found = {
        str(compiled_for("pairs", "_pair_loss_kernel", table=module_of("pairs")._table(objective)))
        for objective in (Objective.rdpo(0.1), Objective.rdpo(1.0, 16.0), Objective.rdpo(0.3, 2e-9))
    }
    assert len(found) == 1
""",
    "product": """
    # The product with the epilogue inside, of whole and of ragged blocks of the hidden size.
    shape = module_of("launches")._PRODUCT_LAUNCHES[2]
    blocks = {"BLOCK_N": shape.rows, "BLOCK_V": shape.columns, "BLOCK_D": shape.depth}
    blocks |= {"PARTIAL_D": 1024, "BLOCKS_AT_A_TIME": 8, "NUM_PROGRAMS": 132, "stride_wd": 1}
    blocks |= {"stride_fr": 1, "LEAST_DEPTH": 16}
    strides = ("stride_hn", "stride_wv", "stride_on", "hidden_size", "num_columns")
    staged = {"aligned": strides, "options": {"num_stages": shape.num_stages}.items()}
    mixed = half | ids | pointers("top_ids bias low_rank factor", None)
    lora = pointers("low_rank factor", "*bf16")
    narrow = blocks | {"BLOCK_V": module_of("launches")._LOW_RANK_LAUNCHES[2].columns}
    for mode, out, is_whole in ((0, "*fp32", True), (1, "*bf16", True), (2, "*bf16", False)):
        product = blocks | {"CAPS": True, "MODE": mode, "PRECISION": "ieee"}
        product |= {"HAS_WHOLE_BLOCKS": is_whole}
        build("fused_product", "_fused_product_kernel", product, shape.num_warps, "*fp32",
              **staged, **mixed | {"out_ptr": out})
        build("fused_product", "_fused_product_kernel", product | narrow, shape.num_warps, "*fp32",
              **staged, **mixed | {"out_ptr": out} | lora)
    build("fused_product", "_settle_rows_kernel", {"BLOCK_V": 128, "BLOCK": 256}, 1, "*fp32",
          **half)
""",
}


@pytest.mark.parametrize(
    ("part", "targets"),
    [
        ("plain", "sm_90"),
        pytest.param("plain", "gfx942 sm_80", marks=pytest.mark.full),
        pytest.param("product", "gfx942 sm_80 sm_90", marks=pytest.mark.full),
    ],
)
def test_kernels_compile_for_a_gpu(tmp_path, part, targets):
    """A process of its own compiles, since the interpreter cannot be switched off again."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": str(Path(realign_kernels.__file__).parent.parent),
        "PYTHONWARNINGS": "ignore",
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    script = tmp_path / "compilation.py"  # Triton reads the source of what it compiles
    script.write_text(textwrap.dedent(COMPILATION + PARTS[part]), encoding="utf-8")
    command = [sys.executable, script, *targets.split()]
    subprocess.run(command, env=environment, check=True, timeout=600)
