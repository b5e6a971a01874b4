"""Runs simple kernels on the CPU, in float32: TileLang's `c` target, which has one thread.

What the threads of a block have together (fragments, shared memory, T.Parallel) becomes arrays and loops; assertions
go, and tensors are contiguous.
"""

import tilelang
import tilelang.language as T


@T.macro
def _sum_of_rows(x, sums, dim):
    for j in T.serial(sums.shape[0]):
        sums[j] = 0.0
        for i in T.serial(x.shape[0]):
            sums[j] += x[i, j]


def compile_for_cpu(maker, *arguments, monkeypatch, sizes=None):
    """The kernel of `maker(*arguments)`: called with CPU tensors, as on a GPU.

    sizes: fixed ones by name, in place of dynamic ones that are not the whole length of anything.
    """
    dynamic, call, sizes = T.dynamic, T.call_extern, sizes or {}
    stand_ins = {
        "alloc_fragment": T.alloc_local,
        "alloc_shared": T.alloc_local,
        "Parallel": T.grid,
        "StridedTensor": lambda shape, strides, dtype: T.Tensor(shape, dtype),
        "get_thread_binding": lambda: 0,
        "dynamic": lambda name, *dtype: sizes.get(name) or dynamic(name, *dtype),
        "import_source": lambda _: None,
        "reduce_sum": _sum_of_rows,
        "call_extern": lambda dtype, name, *rest: None if name.startswith("require_") else call(dtype, name, *rest),
        "abs": lambda x: T.max(x, -x),
        "log1p": lambda x: T.call_pure_extern("float32", "log1pf", x),
    }
    with monkeypatch.context() as patch:
        for name, stand_in in stand_ins.items():
            patch.setattr(T, name, stand_in)
        return tilelang.compile(maker(*arguments), target="c")
