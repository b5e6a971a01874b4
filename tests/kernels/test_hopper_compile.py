"""The Hopper kernels compile for sm_90a without a GPU, and stay within their registers. Needs nvcc."""

import os
import shutil
import subprocess
import sys

import pytest
import z3

import qlakernels.short_conv.hopper.kernels  # noqa: F401  makes its kernels known
from qlakernels import compiled, compiling
from qlakernels.compiled import UNIFORM_WARPGROUPS, library, load, maker_of, sources_digest
from qlakernels.compiling import kernel
from qlakernels.gated_delta_rule.hopper.resources import CODE_LIMITS, SPILL_LIMITS, resources, training_kernels

SHARED_MEMORY = 227 * 1024  # of a block on an H100
SIZES = [(128, 128), (64, 64), (96, 192)]
CASES = [(size, name) for size in SIZES for name in training_kernels(*size)]


@pytest.fixture(scope="module", autouse=True)
def all_compiled():
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH: the kernels cannot be compiled here")
    load([key for size in SIZES for key in training_kernels(*size).values()])


@pytest.mark.parametrize(("size", "name"), CASES, ids=[f"{k}/{v} {name}" for (k, v), name in CASES])
def test_resources(size, name):
    found = resources(training_kernels(*size)[name])
    assert found.spilled <= SPILL_LIMITS[name], f"{found.spilled} bytes spilled, {SPILL_LIMITS[name]} allowed"
    assert found.shared <= SHARED_MEMORY
    assert 0 < found.registers <= 255
    whole = size[1] <= 128 or name.endswith("64 rows")  # else blocks have rows that V has not, and code for that
    limit = CODE_LIMITS.get(name, 128) if whole else 128
    assert 0 < found.code <= limit * 1024, f"{found.code / 1024:.1f} KB of code, {limit} allowed"


def test_every_kernel_has_a_limit():
    assert set(SPILL_LIMITS) == set(training_kernels(128, 128))


def test_a_kernel_that_does_not_compile(monkeypatch, tmp_path):
    monkeypatch.setattr("tilelang.env.TILELANG_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"the kernel \('reach', 1, 2\) does not compile: TypeError: "):
        load([("reach", 1, 2)])
    with pytest.raises(RuntimeError, match=r"the kernel \('decay', 2\) does not compile: TypeError: "):
        load([("reach", True), ("decay", 2)])


def test_what_was_compiled_is_found(monkeypatch, tmp_path):
    """In the cache, by a process that has not compiled it; neither that nor the one that asked imports a compiler."""
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    script = """if True:
        import sys
        from qlakernels import compiled
        from qlakernels.gated_delta_rule.hopper import operator
        key = ("reach", True)
        print(compiled.library(key).exists(), callable(compiled.launcher(key)), "tilelang" in sys.modules)
        import tilelang  # both ways to its runtime, in one process
        print(tilelang.__version__ is not None, callable(compiled.launcher(("reach", False))))
    """
    for there in (False, True):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.split("\n")[:2] == [f"{there} True False", "True True"]


def test_compiling_without_a_python_to_start(monkeypatch, tmp_path):
    """As where Python is part of another program."""
    monkeypatch.setattr("tilelang.env.TILELANG_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "")
    monkeypatch.setattr(compiled, "_functions", {})
    load([("reach", True)])
    assert library(("reach", True)).exists()
    with pytest.raises(RuntimeError, match=r"the kernel \('decay', 2\) does not compile: TypeError: "):
        load([("decay", 2)])


def test_a_compilation_that_is_killed(monkeypatch):
    """Cannot say so; the process that started it does."""
    script = """if True:
        import os, signal, sys
        from qlakernels import compiling
        def dies(key):
            os.kill(os.getpid(), signal.SIGKILL)
        compiling.try_to_compile = dies
        compiling.compile_in_forks([("qlakernels.gated_delta_rule.hopper.kernels", ("reach", True))] * 2, 1)
    """
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split("\n")[:2]) == [f'[{n}, "its process ended with -9"]' for n in (0, 1)]


def test_a_compiler_that_does_not_start(monkeypatch, tmp_path):
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    (tmp_path / "tilelang.py").write_text("raise ImportError('libcuda.so is missing')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(compiled, "_functions", {})
    with pytest.raises(
        RuntimeError, match=r"the process that compiles kernels failed: ImportError: libcuda.so is miss"
    ):
        load([("reach", True)])


def test_the_prover_is_left_as_it_was():
    before = z3.get_param("smt.arith.solver")
    kernel(("reach", True))
    assert z3.get_param("smt.arith.solver") == before != compiling.PROVER["smt.arith.solver"]


def test_warpgroups_are_as_they_were():
    """Once a kernel is made that takes the number of its warpgroup from its own function."""
    emitter = compiling.TensorCoreIntrinEmitter
    before = emitter.get_thread_binding
    key = training_kernels(128, 128)["gradients"]
    assert maker_of(key).pass_configs[UNIFORM_WARPGROUPS]
    source = kernel(key).get_kernel_source()
    assert emitter.get_thread_binding is before
    products = [line for line in source.split("\n") if "wgmma_ss<" in line]
    assert products and all("threadIdx" not in line for line in products)
    assert any("first_of_warpgroup()" in line for line in products)
    assert "first_of_warpgroup" not in kernel(training_kernels(128, 128)["forward"]).get_kernel_source()


def test_a_place_follows_from_key_and_sources():
    """And from nothing that the operator alone is made of."""
    keys = [("reach", True), ("reach", False), ("boundaries",), ("short_conv_forward", 4)]
    assert len({library(key) for key in keys}) == len(keys)
    maker = maker_of(("reach", True))
    assert maker.host == {"operator", "constants", "resources", "kernels"}
    digests = {sources_digest(maker.package, maker.host - some) for some in (set(), {"kernels"}, {"operator"})}
    assert len(digests) == 3
