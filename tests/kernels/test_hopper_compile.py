"""The Hopper kernels compile for sm_90a without a GPU, and stay within their registers. Needs nvcc."""

import os
import shutil
import subprocess
import sys

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


def test_a_kernel_that_does_not_compile(monkeypatch, tmp_path):
    monkeypatch.setattr("tilelang.env.TILELANG_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"the kernel \('nothing',\) does not compile: KeyError: 'nothing'"):
        load([("nothing",), ("nobody",)])


def test_what_was_compiled_is_found(monkeypatch, tmp_path):
    """In the cache, by a process that has not compiled it."""
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    find = "from qlakernels.gated_delta_rule.hopper import kernels as k; key = ('reach', True); "
    compile_it = find + "print(k._library(key).exists()); k.load([key]); print(k._library(key).exists())"
    for expected in ("False\nTrue", "True\nTrue"):
        done = subprocess.run([sys.executable, "-c", compile_it], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected
