"""The short convolution's kernels compile for sm_90a without a GPU, and spill nothing. Needs nvcc."""

import shutil

import pytest

from qlakernels.compiled import launchers, library
from qlakernels.compiling import kernel
from qlakernels.gated_delta_rule.hopper.resources import resources
from qlakernels.short_conv.hopper.kernels import specialisations
from qlakernels.short_conv.hopper.sizes import BLOCKS, THREADS

REGISTERS = 2**16  # of a multiprocessor
CASES = [(4, "bfloat16", "float32"), (4, "bfloat16", "bfloat16"), (3, "float16", "float32")]


@pytest.fixture(autouse=True)
def needs_nvcc():
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH: the kernels cannot be compiled here")


@pytest.mark.parametrize("name", ["forward", "backward"])
@pytest.mark.parametrize(("width", "dtype", "weight_dtype"), CASES)
def test_resources(width, dtype, weight_dtype, name):
    key = specialisations(width, dtype, weight_dtype, "int64", True, True)[name]
    found = resources(key)
    assert found.spilled == 0 and found.shared == 0
    assert 0 < found.registers * THREADS * BLOCKS[name] <= REGISTERS
    source = kernel(key).get_kernel_source()
    assert "*(uint4*)(y +" in source if name == "forward" else "*(uint2*)(dx +" in source
    rows = ("rows", "((bfloat16_t*)rows)") if name == "forward" else ("dy_rows", "((bfloat16_t*)dy_rows)")
    vector = "uint4" if name == "forward" else "uint2"
    assert any(f"*({vector}*)({row} +" in source for row in rows)


def test_what_was_compiled_is_found():
    keys = specialisations(4, "bfloat16", "float32", "int64", True, True)
    launch = launchers(keys)
    assert set(launch) == {"forward", "backward"} and all(map(callable, launch.values()))
    assert all(library(key).exists() for key in keys.values())
