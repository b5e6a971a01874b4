"""Runs the CUDA source of a kernel on the CPU, lanes and all, if it synchronises by shuffles and __syncthreads alone.

The threads of a block are coroutines that go together from one of these to the next: a kernel where only some of them
get there is an error. Blocks come one after the other. Needs nvcc.
"""

import ctypes
import re
import subprocess
from pathlib import Path

from qlakernels.compiling import kernel

BEFORE = """
#include <algorithm>
#include <cmath>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>
#undef __global__
#undef __launch_bounds__
#define __global__
#define __launch_bounds__(...)
#define rsqrtf(x) (1.0f / sqrtf(x))
using bfloat16_t = __nv_bfloat16;
using half_t = __half;
using std::max;
using std::min;

enum Place { RUNNING, AT_SHUFFLE, AT_BARRIER, DONE };
struct Thread { ucontext_t context; Place place; float given[2]; int turn; char stack[1 << 16]; };
static Thread threads[THREADS];
static ucontext_t scheduler;
static struct { int x; } threadIdx, blockIdx;

static void wait(Place place) {
  Thread& mine = threads[threadIdx.x];
  mine.place = place;
  swapcontext(&mine.context, &scheduler);
}
static float __shfl_xor_sync(unsigned, float value, int delta, int) {
  int me = threadIdx.x, turn = threads[me].turn ^= 1;
  threads[me].given[turn] = value;
  wait(AT_SHUFFLE);
  return threads[me ^ delta].given[turn];
}
static void __syncthreads() { wait(AT_BARRIER); }
"""
BEHIND = """
static void (*work)();
static void entry() { work(); wait(DONE); }
template <class Work> static int run(int blocks) {
  work = [] { Work()(); };
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (Thread& thread : threads) {
      getcontext(&thread.context);
      thread.context.uc_stack = {thread.stack, 0, sizeof thread.stack};
      makecontext(&thread.context, entry, 0);
    }
    do {
      for (threadIdx.x = 0; threadIdx.x < THREADS; ++threadIdx.x)
        swapcontext(&scheduler, &threads[threadIdx.x].context);
      for (Thread& thread : threads)
        if (thread.place != threads[0].place) return 1;
    } while (threads[0].place != DONE);
  }
  return 0;
}
"""


def emulate(key: tuple, threads: int, folder: Path):
    """The kernel of a key as function(grid, **arguments), tensors of the CPU and numbers with the source's names."""
    source = re.sub(r"#(?!pragma).*\n", "", kernel(key).get_kernel_source())
    source = re.sub(r'extern "C" __global__ void \w+\([^)]*\);', "", source)
    source = re.sub(r"extern __shared__ (__align__\(\d+\)) (\w+) (\w+)\[\];", r"static \1 \2 \3[1 << 16];", source)
    name, parameters = re.search(r"(\w+_kernel)\(([^)]*)\)", source).groups()
    parameters = [parameter.replace("__restrict__", "") for parameter in parameters.split(",")]
    names = [parameter.split()[-1] for parameter in parameters]
    given = "\n".join(f"static {parameter}_;" for parameter in parameters)
    work = f"struct Work {{ void operator()() {{ {name}({', '.join(f'{x}_' for x in names)}); }} }};"
    taken = " ".join(f"{x}_ = {x};" for x in names)
    launch = f'extern "C" int launch(int grid, {", ".join(parameters)}) {{ {taken} return run<Work>(grid); }}'
    path = folder / f"{name}.cpp"
    path.write_text("\n".join([f"#define THREADS {threads}", BEFORE, source, BEHIND, given, work, launch]))
    options = ["-O1", "-std=c++20", "-w", "-shared", "-Xcompiler=-fPIC,-fno-strict-aliasing"]
    subprocess.run(["nvcc", *options, "-o", path.with_suffix(".so"), path], check=True)
    function = ctypes.CDLL(str(path.with_suffix(".so"))).launch

    def call(grid, /, **arguments):
        values = [ctypes.c_int(grid)]
        for name, parameter in zip(names, parameters, strict=True):
            value = arguments[name]
            if "*" in parameter:
                values.append(ctypes.c_void_p(value.data_ptr()))
            else:
                values.append((ctypes.c_float if "float" in parameter else ctypes.c_int)(value))
        assert function(*values) == 0, "some threads of a block are at a shuffle or barrier, and some are not"

    return call
