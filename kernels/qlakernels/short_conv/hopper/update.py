"""One token of the short convolution from the last W tokens, which it moves on by one: what decoding needs.

A thread takes four channels of a row: their state of 4 W numbers, which lie behind each other, the new token's and the
filters'. Bytes: the state read and written, 4 W a channel in half precision, besides 4 for the token.
"""

import tilelang.language as T

from qlakernels.short_conv.hopper.sizes import THREADS, UPDATED


def update_kernel(width, dtype, weight_dtype, silu):
    C = UPDATED
    rows, groups = T.dynamic("rows"), T.dynamic("groups")

    @T.prim_func
    def short_conv_update(
        x: T.Tensor((rows, groups, C), dtype),
        state: T.Tensor((rows, groups, C * width), dtype),
        weight: T.Tensor((groups, C * width), weight_dtype),
        y: T.Tensor((rows, groups, C), dtype),
    ):
        with T.Kernel(T.ceildiv(rows * groups, THREADS), threads=THREADS) as block:
            token, taps = T.alloc_local((C,), dtype), T.alloc_local((C * width,), dtype)
            filters, out = T.alloc_local((C * width,), weight_dtype), T.alloc_local((C,), dtype)
            p = T.alloc_local((1,), "float32")
            row = T.alloc_var("int32")
            group = T.alloc_var("int32")
            item = block * THREADS + T.get_thread_binding()
            row = T.truncdiv(item, groups)
            group = T.truncmod(item, groups)
            if row < rows:
                for j in T.vectorized(C):
                    token[j] = x[row, group, j]
                for i in T.unroll(width):
                    for j in T.vectorized(C):
                        taps[i * C + j] = state[row, group, i * C + j]
                for i in T.unroll(width):
                    for j in T.vectorized(C):
                        filters[i * C + j] = weight[group, i * C + j]
                for j in T.unroll(C):
                    for s in T.unroll(width - 1):
                        taps[j * width + s] = taps[j * width + s + 1]
                    taps[j * width + width - 1] = token[j]
                    p[0] = 0.0
                    for s in T.unroll(width):
                        p[0] += T.cast(filters[j * width + s], "float32") * T.cast(taps[j * width + s], "float32")
                    if silu:
                        p[0] = p[0] / (1.0 + T.exp(-p[0]))
                    out[j] = T.cast(p[0], dtype)
                for i in T.unroll(width):
                    for j in T.vectorized(C):
                        state[row, group, i * C + j] = taps[i * C + j]
                for j in T.vectorized(C):
                    y[row, group, j] = out[j]

    return short_conv_update
