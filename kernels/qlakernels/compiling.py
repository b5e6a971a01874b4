"""How a kernel is compiled, with tilelang and nvcc, no GPU.

    python -m qlakernels.compiling MODULE KEY

compiles one into the cache: the module that makes it known, its key as JSON.
"""

import importlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tilelang
import z3
from tilelang import language
from tilelang.cuda.intrinsics.macro.wgmma_macro_generator import TensorCoreIntrinEmitter

from qlakernels.compiled import UNIFORM_WARPGROUPS, library, maker_of

TARGET = {"kind": "cuda", "arch": "sm_90a"}

# tilelang asks Z3 nearly 20,000 questions for our largest kernel and learns nothing from all but ten of the answers.
# The older simplex of Z3 gives the same answers in two thirds of the time: 4 s of 26 for that kernel.
PROVER = {"auto_config": "false", "smt.arith.solver": "2"}


def kernel(key: tuple):
    """The kernel as tilelang compiles it, or finds it in its own cache: with sources, for a look at it."""
    logging.getLogger("tilelang").setLevel(logging.ERROR)
    maker = maker_of(key)
    make = getattr(importlib.import_module(f"{maker.package}.{maker.module}"), maker.function)
    configs = dict(maker.pass_configs)
    with _prover(PROVER), _uniform_warpgroups(configs.pop(UNIFORM_WARPGROUPS, False)):
        return tilelang.compile(make(*key[1:]), target=TARGET, pass_configs=configs)


def compile_into_cache(key: tuple) -> None:
    """Leaves the kernel's library where `compiled.library` says, by a rename."""
    compiled = kernel(key)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(getattr(compiled, "_tilelang_cache_path", ""), "executable.so")
        if not made.is_file():  # tilelang keeps nothing
            made = Path(folder, "kernel.so")
            compiled.export_library(str(made))
        there = library(key)
        there.parent.mkdir(parents=True, exist_ok=True)
        aside = there.with_suffix(f".{os.getpid()}")
        aside.write_bytes(made.read_bytes())
        aside.replace(there)


@contextmanager
def _prover(parameters: dict[str, str]) -> Iterator[None]:
    """Z3 with these parameters, which hold for the whole process."""
    before = {name: z3.get_param(name) for name in parameters}
    try:
        for name, value in parameters.items():
            z3.set_param(name, value)
        yield
    finally:
        for name, value in before.items():
            z3.set_param(name, value)


@contextmanager
def _uniform_warpgroups(wanted: bool) -> Iterator[None]:
    """Products over several warpgroups take the number of theirs from `first_of_warpgroup`, a function that the kernel
    brings along and that gives all lanes the same.

    tilelang takes it from the number of the thread. The compiler then has a descriptor of a tile for each lane, moves
    both halves of it to where the tensor cores read it, in front of each instruction, and keeps some in memory.
    """
    own = TensorCoreIntrinEmitter.get_thread_binding

    def binding(self):
        one = self.block_row_warps * self.block_col_warps == 4
        return own(self) if one else language.call_extern("int32", "first_of_warpgroup")

    try:
        if wanted:
            TensorCoreIntrinEmitter.get_thread_binding = binding
        yield
    finally:
        TensorCoreIntrinEmitter.get_thread_binding = own


if __name__ == "__main__":
    module, key = sys.argv[1:]
    importlib.import_module(module)
    compile_into_cache(tuple(json.loads(key)))
