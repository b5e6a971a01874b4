"""How kernels are compiled, with tilelang and nvcc, no GPU.

    python -m qlakernels.compiling FD < KERNELS

compiles some into the cache, as many at once as there are cores. KERNELS is a list of pairs in JSON: the module that
makes a kernel known, its key. To the descriptor FD goes a line for each as it is done, [its number, null or what was
wrong].
"""

import gc
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
MOST_OF_AN_ERROR = 500  # characters, of which a report is one write to its pipe

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


def try_to_compile(key: tuple) -> str | None:
    """What went wrong, in a line, if anything did: of a message of many lines, such as nvcc's, the ends."""
    try:
        compile_into_cache(key)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {' ... '.join(dict.fromkeys((lines[0], lines[-1])))}"
    return None


def compile_in_forks(wanted: list[tuple[str, tuple]], reports: int) -> None:
    """A process for each kernel, which has tilelang from this one: its import takes as long as a small kernel.

    Nothing here has threads of its own at work, nor devices.
    """
    for module in dict.fromkeys(module for module, _ in wanted):
        importlib.import_module(module)
    gc.freeze()
    at_once, running = len(os.sched_getaffinity(0)), {}
    for number, (_, key) in enumerate(wanted):
        if len(running) == at_once:
            _await_one(running, reports)
        pid = os.fork()
        if pid == 0:
            try:
                _report(reports, number, try_to_compile(key))
            finally:
                os._exit(0)
        running[pid] = number
    while running:
        _await_one(running, reports)


def _await_one(running: dict[int, int], reports: int) -> None:
    pid, status = os.wait()
    number = running.pop(pid)
    if os.waitstatus_to_exitcode(status):  # it was killed, and could not say so
        _report(reports, number, f"its process ended with {os.waitstatus_to_exitcode(status)}")


def _report(reports: int, number: int, error: str | None) -> None:
    """In one write, which those of other processes stay out of."""
    os.write(reports, (json.dumps([number, error and error[:MOST_OF_AN_ERROR]]) + "\n").encode())


if __name__ == "__main__":
    pairs = [(module, tuple(key)) for module, key in json.load(sys.stdin)]
    compile_in_forks(pairs, int(sys.argv[1]))
