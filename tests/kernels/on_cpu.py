"""Runs simple kernels on the CPU, in float32: TileLang's `c` target, which has one thread.

What the threads of a block have together (fragments, shared memory, T.Parallel) becomes arrays and loops; assertions
go, and tensors are contiguous.
"""

import tilelang
import tilelang.language as T


def compile_for_cpu(maker, *arguments, monkeypatch):
    """The kernel of `maker(*arguments)`: called with CPU tensors, as on a GPU."""
    stand_ins = {
        "alloc_fragment": T.alloc_local,
        "alloc_shared": T.alloc_local,
        "Parallel": T.grid,
        "StridedTensor": lambda shape, strides, dtype: T.Tensor(shape, dtype),
        "get_thread_binding": lambda: 0,
        "device_assert": lambda *_, **__: None,
        "abs": lambda x: T.max(x, -x),
        "log1p": lambda x: T.call_pure_extern("float32", "log1pf", x),
    }
    with monkeypatch.context() as patch:
        for name, stand_in in stand_ins.items():
            patch.setattr(T, name, stand_in)
        return tilelang.compile(maker(*arguments), target="c")
