"""The forward, t = x + δ and y = n ∘ (offset + w), or y alone where there is no δ; `rows` says what n is.

In float32, with t rounded before all else and y once. A block takes one batch of rows, all loaded before the first is
used; that the multiprocessor has other blocks, and that blocks are many, is what hides the memory.

Bytes in half precision: 8 an element with a delta, 4 without, besides the weight once a block. At 3.0 TB/s, 8192 rows
of 2048 take 45 µs with a delta, 22 without. On their way are up to 96 KB a multiprocessor, without a delta 64; half of
that where D is just above 4096 or, with a delta, 6144.
"""

import tilelang.language as T

from qlakernels.residual_norm.hopper.rows import add_over_rows, load_rows, load_weights, round_into, store_row
from qlakernels.residual_norm.hopper.sizes import PIECE, WARP, abreast_of, batch_of, blocks_of, lanes_of, threads_of


def forward_kernel(dim, dtype, weight_dtype, with_delta):
    """Without a delta, the kernel touches neither `delta` nor `total`."""
    name = "add" if with_delta else "norm"
    lanes, abreast, threads, batch = lanes_of(dim), abreast_of(dim), threads_of(dim), batch_of(name, dim)
    pieces = dim // PIECE
    size = T.dynamic("size", "int64")

    @T.prim_func
    def residual_norm_forward(
        x: T.Tensor((size,), dtype),
        delta: T.Tensor((size,), dtype),
        weight: T.Tensor((dim,), weight_dtype),
        total: T.Tensor((size,), dtype),
        normed: T.Tensor((size,), dtype),
        rows: T.int32,
        eps: T.float32,
        offset: T.float32,
    ):
        with T.Kernel(T.ceildiv(rows, batch * abreast), threads=threads) as block:
            T.annotate_min_blocks_per_sm(blocks_of(name, dim))
            raw_weights, weights = T.alloc_local((PIECE,), weight_dtype), T.alloc_local((PIECE,), "float32")
            x_rows, delta_rows = (T.alloc_local((batch, PIECE), dtype) for _ in range(2))
            values, r = T.alloc_local((PIECE,), "float32"), T.alloc_local((batch,), "float32")
            parts = T.alloc_shared((1, T.max(threads // WARP, 1), batch), "float32")
            lane = T.alloc_var("int32")
            first = T.alloc_var("int32")
            last = T.alloc_var("int32")  # the one behind it
            thread = T.get_thread_binding()
            lane = T.truncmod(thread, lanes)
            first = block * (batch * abreast) + T.truncdiv(thread, lanes)
            last = T.if_then_else(lane < pieces, rows, 0)
            load_rows(x, first, abreast, last, pieces, lane, x_rows)
            if with_delta:
                load_rows(delta, first, abreast, last, pieces, lane, delta_rows)
            load_weights(weight, offset, lane, raw_weights, weights)
            for i in T.unroll(batch):
                row = first + i * abreast
                if with_delta:
                    for j in T.unroll(PIECE):
                        values[j] = T.cast(x_rows[i, j], "float32") + T.cast(delta_rows[i, j], "float32")
                    round_into(x_rows, i, values)
                    if row < last:
                        store_row(x_rows, i, total, row, pieces, lane)
                r[i] = 0.0
                for j in T.unroll(PIECE):
                    values[j] = T.cast(x_rows[i, j], "float32")
                    r[i] += values[j] * values[j]
            add_over_rows(r, parts, 0, thread, lanes)
            for i in T.unroll(batch):
                row = first + i * abreast
                r[i] = T.rsqrt(r[i] * (1.0 / dim) + eps)
                for j in T.unroll(PIECE):
                    values[j] = T.cast(x_rows[i, j], "float32") * r[i] * weights[j]
                round_into(x_rows, i, values)
                if row < last:
                    store_row(x_rows, i, normed, row, pieces, lane)

    return residual_norm_forward
