"""The forward of the short convolution, y_t = p_t σ(p_t), or p_t without an activation; `march` says what p is.

In float32, rounded once. Bytes: each element of x read once and of y written once, 4 a token and channel in half
precision, besides (W − 1) / stretch of x a second time, 8 a token for positions and 16 a channel and stretch for
float32 weights. At 3.0 TB/s, 8192 tokens of 8192 channels take 89 µs.
"""

import tilelang.language as T

from qlakernels.short_conv.hopper.march import (
    FAR,
    convolve,
    load_before,
    load_given,
    load_row,
    load_weights,
    sigmoid,
    take,
    take_reaches,
    widen,
)
from qlakernels.short_conv.hopper.sizes import BLOCKS, CHANNELS, THREADS

BATCH = 4  # tokens of a turn, and as many that are loaded ahead


def forward_kernel(width, dtype, weight_dtype, position_dtype, silu):
    C = CHANNELS["forward"]
    x_size, y_size, positioned = T.dynamic("x_size", "int64"), T.dynamic("y_size", "int64"), T.dynamic("positioned")
    groups = T.dynamic("groups")

    @T.prim_func
    def short_conv_forward(
        x: T.Tensor((x_size,), dtype),
        weight: T.Tensor((groups, C * width), weight_dtype),
        positions: T.Tensor((positioned,), position_dtype),
        y: T.Tensor((y_size,), dtype),
        x_step: T.int64,
        tokens: T.int32,
        row_length: T.int32,
        stretch: T.int32,
    ):
        with T.Kernel(T.ceildiv(T.ceildiv(tokens, stretch) * groups, THREADS), threads=THREADS) as block:
            T.annotate_min_blocks_per_sm(BLOCKS["forward"])
            raw_weights = T.alloc_local((C * width,), weight_dtype)
            weights, window = T.alloc_local((width, C), "float32"), T.alloc_local((width, C), "float32")
            before, out = T.alloc_local((width - 1, C), dtype), T.alloc_local((C,), dtype)
            rows, values = T.alloc_local((BATCH, C), dtype), T.alloc_local((BATCH, C), "float32")
            given, reach = T.alloc_local((BATCH,), position_dtype), T.alloc_local((BATCH,), "int32")
            place = T.alloc_local((1,), "int32")
            x_at, y_at = T.alloc_local((1,), "int64"), T.alloc_local((1,), "int64")
            p = T.alloc_local((C,), "float32")
            group = T.alloc_var("int32")
            token = T.alloc_var("int32")
            last = T.alloc_var("int32")  # the one behind it
            item = block * THREADS + T.get_thread_binding()
            group = T.truncmod(item, groups)
            token = T.truncdiv(item, groups) * stretch
            if token < tokens:
                last = T.min(token + stretch, tokens)
                x_at[0] = T.cast(token, "int64") * x_step + group
                y_at[0] = T.cast(token, "int64") * groups + group
                place[0] = T.truncmod(token, row_length)
                load_before(x, x_step, group, token, before)
                for i in T.unroll(BATCH):
                    given[i] = FAR
                    if token + i < last:
                        load_row(x, x_at[0], rows, i)
                    x_at[0] += x_step
                load_given(positions, positioned, token, last, given)
                load_weights(weight, group, raw_weights, weights)
                widen(before, window)
                while token < last:
                    widen(rows, values)
                    take_reaches(given, place, row_length, reach)
                    for i in T.unroll(BATCH):
                        if token + BATCH + i < last:
                            load_row(x, x_at[0], rows, i)
                        x_at[0] += x_step
                    load_given(positions, positioned, token + BATCH, last, given)
                    for i in T.unroll(BATCH):
                        take(values, i, window)
                        convolve(window, weights, reach, i, p)
                        if silu:
                            for j in T.unroll(C):
                                p[j] *= sigmoid(p[j])
                        for j in T.vectorized(C):
                            out[j] = T.cast(p[j], dtype)
                        if token + i < last:
                            for j in T.vectorized(C):
                                y[y_at[0] * C + j] = out[j]
                        y_at[0] += groups
                    token += BATCH

    return short_conv_forward
