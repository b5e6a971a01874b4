"""The backward: the gradient of the total, and so of x and of δ, and that of the weight, in one pass over dy and t, and
the normed rows once more if asked for, bit for bit those of the forward.

    a = dy ∘ (offset + w)      c = Σ a n / D      d = r (a − c n) + dt      dw = Σ dy ∘ n

the sum of c over a row, that of dw over all; dt is what else arrives at the total, where anything does. n = t r and r
are made again from t, as `rows` says. Σ a t, which is D c / r, goes through the lanes beside Σ t²: neither needs r.

In float32, d rounded once. A block goes over batches of rows, a grid apart from each other, and loads the next one
before it uses the one it has. A thread adds up dw of its columns over its own rows, one after the other; where a block
has rows side by side, it adds those up at the end, in their order. It leaves one row of `sums`.

Bytes in half precision: 8 an element with dt, 6 without, 2 more with the normed rows, besides a row of sums a block. At
3.0 TB/s, 8192 rows of 2048 take 45, 34 and 11 more µs. On their way are 48 KB a multiprocessor with dt and 32 without;
half of that where D is just above 4096.
"""

import tilelang.language as T

from qlakernels.residual_norm.hopper.rows import add_over_rows, load_rows, load_weights, round_into, store_row
from qlakernels.residual_norm.hopper.sizes import PIECE, WARP, abreast_of, batch_of, blocks_of, lanes_of, threads_of


def backward_kernel(dim, dtype, weight_dtype, with_total, with_normed):
    """Without a gradient of the total the kernel does not touch `d_total`, and without being asked not `normed`."""
    lanes, abreast, threads, batch = lanes_of(dim), abreast_of(dim), threads_of(dim), batch_of("backward", dim)
    pieces = dim // PIECE
    size = T.dynamic("size", "int64")
    blocks = T.dynamic("blocks")

    @T.prim_func
    def residual_norm_backward(
        d_normed: T.Tensor((size,), dtype),
        d_total: T.Tensor((size,), dtype),
        total: T.Tensor((size,), dtype),
        weight: T.Tensor((dim,), weight_dtype),
        d: T.Tensor((size,), dtype),
        normed: T.Tensor((size,), dtype),
        sums: T.Tensor((blocks, dim), "float32"),
        rows: T.int32,
        eps: T.float32,
        offset: T.float32,
    ):
        with T.Kernel(blocks, threads=threads) as block:
            T.annotate_min_blocks_per_sm(blocks_of("backward", dim))
            raw_weights, weights = T.alloc_local((PIECE,), weight_dtype), T.alloc_local((PIECE,), "float32")
            dy_rows, total_rows, residual_rows = (T.alloc_local((batch, PIECE), dtype) for _ in range(3))
            dy_next, total_next, residual_next = (T.alloc_local((batch, PIECE), dtype) for _ in range(3))
            dw, values, scaled = (T.alloc_local((PIECE,), "float32") for _ in range(3))
            row_sums = T.alloc_local((2 * batch,), "float32")  # of t² and a t, row after row; later r and c
            parts = T.alloc_shared((2, T.max(threads // WARP, 1), 2 * batch), "float32")
            dw_parts = T.alloc_shared((abreast, dim), "float32")
            lane = T.alloc_var("int32")
            first = T.alloc_var("int32")
            last = T.alloc_var("int32")  # the one behind it
            thread = T.get_thread_binding()
            lane = T.truncmod(thread, lanes)
            first = block * (batch * abreast) + T.truncdiv(thread, lanes)
            last = T.if_then_else(lane < pieces, rows, 0)
            load_rows(d_normed, first, abreast, last, pieces, lane, dy_next)
            load_rows(total, first, abreast, last, pieces, lane, total_next)
            if with_total:
                load_rows(d_total, first, abreast, last, pieces, lane, residual_next)
            load_weights(weight, offset, lane, raw_weights, weights)
            for j in T.unroll(PIECE):
                dw[j] = 0.0
            for turn in T.serial(T.ceildiv(T.ceildiv(rows, batch * abreast) - block, blocks)):
                move(dy_next, dy_rows)
                move(total_next, total_rows)
                load_rows(d_normed, first + blocks * (batch * abreast), abreast, last, pieces, lane, dy_next)
                load_rows(total, first + blocks * (batch * abreast), abreast, last, pieces, lane, total_next)
                if with_total:
                    move(residual_next, residual_rows)
                    load_rows(d_total, first + blocks * (batch * abreast), abreast, last, pieces, lane, residual_next)
                for i in T.unroll(batch):
                    row_sums[2 * i] = 0.0
                    row_sums[2 * i + 1] = 0.0
                    for j in T.unroll(PIECE):
                        values[j] = T.cast(total_rows[i, j], "float32")
                        row_sums[2 * i] += values[j] * values[j]
                        row_sums[2 * i + 1] += T.cast(dy_rows[i, j], "float32") * weights[j] * values[j]
                add_over_rows(row_sums, parts, T.truncmod(turn, 2), thread, lanes)
                for i in T.unroll(batch):
                    row = first + i * abreast
                    row_sums[2 * i] = T.rsqrt(row_sums[2 * i] * (1.0 / dim) + eps)
                    row_sums[2 * i + 1] *= row_sums[2 * i] * (1.0 / dim)
                    for j in T.unroll(PIECE):
                        values[j] = T.cast(total_rows[i, j], "float32") * row_sums[2 * i]
                    if row < last:
                        for j in T.unroll(PIECE):
                            dw[j] += T.cast(dy_rows[i, j], "float32") * values[j]
                    if with_normed:
                        for j in T.unroll(PIECE):
                            scaled[j] = values[j] * weights[j]
                        round_into(total_rows, i, scaled)
                        if row < last:
                            store_row(total_rows, i, normed, row, pieces, lane)
                    for j in T.unroll(PIECE):
                        values[j] = T.cast(dy_rows[i, j], "float32") * weights[j] - row_sums[2 * i + 1] * values[j]
                        values[j] *= row_sums[2 * i]
                    if with_total:
                        for j in T.unroll(PIECE):
                            values[j] += T.cast(residual_rows[i, j], "float32")
                    round_into(total_rows, i, values)
                    if row < last:
                        store_row(total_rows, i, d, row, pieces, lane)
                first += blocks * (batch * abreast)
            if abreast > 1:
                T.sync_threads()  # `parts` have been read: they may lie in the same place
                if lane < pieces:
                    for j in T.vectorized(PIECE):
                        dw_parts[T.truncdiv(thread, lanes), lane * PIECE + j] = dw[j]
                T.sync_threads()
                if thread < pieces:
                    for j in T.unroll(PIECE):
                        dw[j] = 0.0
                        for k in T.unroll(abreast):
                            dw[j] += dw_parts[k, thread * PIECE + j]
            if thread < pieces:
                for j in T.vectorized(PIECE):
                    sums[block, thread * PIECE + j] = dw[j]

    return residual_norm_backward


@T.macro
def move(source, rows):
    """rows [batch, PIECE] ← source"""
    for i in T.unroll(rows.shape[0]):
        for j in T.vectorized(PIECE):
            rows[i, j] = source[i, j]
