"""The gated norm's kernels compile for sm_90a without a GPU, and spill nothing. Needs nvcc."""

import shutil

import pytest

from qlakernels.compiled import launchers, library
from qlakernels.compiling import kernel
from qlakernels.gated_delta_rule.hopper.resources import resources
from qlakernels.norm.hopper.kernels import specialisations
from qlakernels.norm.hopper.sizes import BATCH, BLOCKS, LANES, PIECE, THREADS

REGISTERS, SHARED = 2**16, 227 * 2**10  # of a multiprocessor
CASES = [(128, "bfloat16", "float32"), (96, "float16", "float16")]


@pytest.fixture(autouse=True)
def needs_nvcc():
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH: the kernels cannot be compiled here")


@pytest.mark.parametrize("name", ["forward", "backward"])
@pytest.mark.parametrize(("dim", "dtype", "weight_dtype"), CASES)
def test_resources(dim, dtype, weight_dtype, name):
    key = specialisations(dim, dtype, weight_dtype, True, with_output=dim == 128)[name]
    found = resources(key)
    assert found.spilled == 0
    assert 0 < found.registers * THREADS * BLOCKS[name] <= REGISTERS
    assert found.shared == (0 if name == "forward" else THREADS // LANES[dim] * dim * 4)
    assert (found.shared + 2**10) * BLOCKS[name] <= SHARED
    source = kernel(key).get_kernel_source()
    read = ("x", "gate") if name == "forward" else ("dy", "x", "gate")
    written = ("y",) if name == "forward" else ("dx", "dgate", "y") if dim == 128 else ("dx", "dgate")
    for tensor in read:
        assert f"*(uint4*)({tensor}_rows + (" in source and source.count(f"= *(uint4*)({tensor} + ") == 1
    for tensor in written:
        assert source.count(f"*(uint4*)({tensor} + ") == 1


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_rows_fit_into_lanes(name):
    """A row lies in one warp, and 32 KB a multiprocessor are on their way."""
    for dim, lanes in LANES.items():
        assert 32 % lanes == 0 and dim % PIECE == 0 and lanes // 2 < dim // PIECE <= lanes
        ahead = BATCH[name] * (2 if name == "forward" else 3) * PIECE * 2
        assert BLOCKS[name] * THREADS * ahead * dim // (lanes * PIECE) >= 32 * 2**10


def test_what_was_compiled_is_found():
    keys = specialisations(128, "bfloat16", "float32", True, with_output=True)
    launch = launchers(keys)
    assert set(launch) == {"forward", "backward"} and all(map(callable, launch.values()))
    assert all(library(key).exists() for key in keys.values())
