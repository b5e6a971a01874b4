"""The backward of the short convolution: both gradients in one pass over x and dy.

    dp_t = dy_t σ(p_t) (1 + p_t (1 − σ(p_t)))      dx_t = Σ_s w_s dp_{t+s}      dw_s = Σ_t dp_t x_{t−s}

the sums over the s within the reach of the later token; dp = dy without an activation. p is made again from x, as
`march` says: nothing but x is kept for it. A thread goes W − 1 tokens beyond its stretch, since these take from its
last ones; `pending` holds what the tokens that it has passed have got so far. It adds up dw of its own tokens one after
the other, and writes it to a place of its own in `sums`: what is left to add is one number a stretch.

Bytes: x and dy read, dx written once, 6 a token and channel in half precision, besides (W − 1) / stretch of x before
the stretch, of x and dy behind it, and 4 W / stretch for the sums. At 3.0 TB/s, 8192 tokens of 8192
channels take 134 µs.
"""

import tilelang.language as T

from qlakernels.short_conv.hopper.march import (
    FAR,
    convolve,
    load_before,
    load_given,
    load_row,
    load_weights,
    push,
    sigmoid,
    take,
    take_reaches,
    widen,
)
from qlakernels.short_conv.hopper.sizes import BLOCKS, CHANNELS, THREADS

BATCH = 4  # tokens of a turn, and as many that are loaded ahead, of x and dy


def backward_kernel(width, dtype, weight_dtype, position_dtype, silu):
    C = CHANNELS["backward"]
    dy_size, x_size, dx_size = (T.dynamic(name, "int64") for name in ("dy_size", "x_size", "dx_size"))
    positioned, groups, stretches = T.dynamic("positioned"), T.dynamic("groups"), T.dynamic("stretches")

    @T.prim_func
    def short_conv_backward(
        dy: T.Tensor((dy_size,), dtype),
        x: T.Tensor((x_size,), dtype),
        weight: T.Tensor((groups, C * width), weight_dtype),
        positions: T.Tensor((positioned,), position_dtype),
        dx: T.Tensor((dx_size,), dtype),
        sums: T.Tensor((stretches, groups, C * width), "float32"),
        dy_step: T.int64,
        x_step: T.int64,
        dx_step: T.int64,
        tokens: T.int32,
        row_length: T.int32,
        stretch: T.int32,
    ):
        with T.Kernel(T.ceildiv(stretches * groups, THREADS), threads=THREADS) as block:
            T.annotate_min_blocks_per_sm(BLOCKS["backward"])
            raw_weights = T.alloc_local((C * width,), weight_dtype)
            weights, window = T.alloc_local((width, C), "float32"), T.alloc_local((width, C), "float32")
            pending, dw = T.alloc_local((width, C), "float32"), T.alloc_local((width, C), "float32")
            dw_row = T.alloc_local((C * width,), "float32")
            before, out = T.alloc_local((width - 1, C), dtype), T.alloc_local((C,), dtype)
            rows, dy_rows = T.alloc_local((BATCH, C), dtype), T.alloc_local((BATCH, C), dtype)
            values, dy_values = T.alloc_local((BATCH, C), "float32"), T.alloc_local((BATCH, C), "float32")
            given, reach = T.alloc_local((BATCH,), position_dtype), T.alloc_local((BATCH,), "int32")
            place = T.alloc_local((1,), "int32")
            x_at, dy_at, dx_at = (T.alloc_local((1,), "int64") for _ in range(3))
            p, dp = T.alloc_local((C,), "float32"), T.alloc_local((C,), "float32")
            group = T.alloc_var("int32")
            number = T.alloc_var("int32")
            first = T.alloc_var("int32")
            token = T.alloc_var("int32")
            last = T.alloc_var("int32")  # the one behind it, as is `end`
            end = T.alloc_var("int32")
            item = block * THREADS + T.get_thread_binding()
            group = T.truncmod(item, groups)
            number = T.truncdiv(item, groups)
            first = number * stretch
            if first < tokens:
                token = first
                last = T.min(first + stretch, tokens)
                end = T.min(last + width - 1, tokens)
                x_at[0] = T.cast(first, "int64") * x_step + group
                dy_at[0] = T.cast(first, "int64") * dy_step + group
                dx_at[0] = T.cast(first - width + 1, "int64") * dx_step + group
                place[0] = T.truncmod(first, row_length)
                load_before(x, x_step, group, first, before)
                for i in T.unroll(BATCH):
                    given[i] = FAR
                    if first + i < end:
                        load_row(x, x_at[0], rows, i)
                        load_row(dy, dy_at[0], dy_rows, i)
                    x_at[0] += x_step
                    dy_at[0] += dy_step
                load_given(positions, positioned, first, end, given)
                load_weights(weight, group, raw_weights, weights)
                widen(before, window)
                for s in T.unroll(width):
                    for j in T.unroll(C):
                        pending[s, j] = 0.0
                        dw[s, j] = 0.0
                for whole in (True, False):  # all tokens of a turn are in the stretch, or some are not
                    while token + BATCH <= last if whole else token < last + width - 1:
                        widen(rows, values)
                        widen(dy_rows, dy_values)
                        take_reaches(given, place, row_length, reach)
                        for i in T.unroll(BATCH):
                            if token + BATCH + i < end:
                                load_row(x, x_at[0], rows, i)
                                load_row(dy, dy_at[0], dy_rows, i)
                            x_at[0] += x_step
                            dy_at[0] += dy_step
                        load_given(positions, positioned, token + BATCH, end, given)
                        for i in T.unroll(BATCH):
                            take(values, i, window)
                            if not whole and token + i >= end:
                                reach[i] = -1  # of no token: nothing is added to those in front of it
                            for j in T.unroll(C):
                                dp[j] = dy_values[i, j]
                            if silu:
                                convolve(window, weights, reach, i, p)
                                for j in T.unroll(C):
                                    p[j] = slope(p[j], sigmoid(p[j]))
                                for j in T.unroll(C):
                                    dp[j] *= p[j]
                            push(pending)
                            for j in T.unroll(C):
                                pending[0, j] = 0.0
                            for s in T.unroll(width):
                                if T.Or(s == 0, reach[i] >= s):
                                    for j in T.unroll(C):
                                        pending[s, j] += weights[s, j] * dp[j]
                            if whole or token + i < last:
                                for s in T.unroll(width):
                                    if T.Or(s == 0, reach[i] >= s):
                                        for j in T.unroll(C):
                                            dw[s, j] += dp[j] * window[s, j]
                            for j in T.vectorized(C):
                                out[j] = T.cast(pending[width - 1, j], dtype)
                            if token + i - width + 1 >= first and (whole or token + i - width + 1 < last):
                                for j in T.vectorized(C):
                                    dx[dx_at[0] * C + j] = out[j]
                            dx_at[0] += dx_step
                        token += BATCH
                for s in T.unroll(width):
                    for j in T.unroll(C):
                        dw_row[j * width + width - 1 - s] = dw[s, j]
                for i in T.unroll(width):
                    for j in T.vectorized(C):
                        sums[number, group, i * C + j] = dw_row[i * C + j]

    return short_conv_backward


def slope(p, sigmoid_of_p):
    """The derivative of SiLU."""
    return sigmoid_of_p * (1.0 + p * (1.0 - sigmoid_of_p))
