"""The Hopper kernels compile for sm_90a without a GPU, and stay within their registers. Needs nvcc."""

import shutil

import pytest

from qlakernels.gated_delta_rule.hopper.kernels import load
from qlakernels.gated_delta_rule.hopper.resources import SPILL_LIMITS, resources, training_kernels

SHARED_MEMORY = 227 * 1024  # of a block on an H100
SIZES = [(128, 128), (64, 64), (96, 192)]
CASES = [(size, name) for size in SIZES for name in training_kernels(*size)]


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH: the kernels cannot be compiled here")
    load([key for size in SIZES for key in training_kernels(*size).values()])


@pytest.mark.parametrize(("size", "name"), CASES, ids=[f"{k}/{v} {name}" for (k, v), name in CASES])
def test_resources(size, name):
    found = resources(training_kernels(*size)[name])
    assert found.spilled <= SPILL_LIMITS[name], f"{found.spilled} bytes spilled, {SPILL_LIMITS[name]} allowed"
    assert found.shared <= SHARED_MEMORY
    assert 0 < found.registers <= 255


def test_every_kernel_has_a_limit():
    assert set(SPILL_LIMITS) == set(training_kernels(128, 128))
