"""Cross entropy over rows of logits, x, and in the second of two passes its gradient in their place:

    s = max x log₂e      Z = Σ 2^(x log₂e − s)      nll = ln 2 (log₂ Z − (x log₂e − s) at the label)
    dx = 2^(x log₂e − s) / Z − [at the label]

In float32, the gradient rounded once. s is rounded before it is used, so that it drops out of both, whatever its size.

A block has a row. First each thread goes through pieces of 8 columns, as far from each other as a block is wide, and
keeps the s and Z of what it has seen; a batch of pieces is loaded before the first is used. Then those of a warp come
together by shuffles and those of the warps through shared memory, in an order that nothing but the number of columns
decides: results are the same bit by bit. The second pass takes the batches in reverse: the last one still is in
registers, the others are in the L2 cache, where they fit, the latest first.

s begins at a number, not at −∞, and what is no word counts as −∞: it adds 0, and nothing is subtracted from itself but
an infinite logit, whose NaN stays in Z, as does that of a label that is no word.

The first thread alone reads the label, so that no other waits for it while the row is on its way, and its logit before
anything is written; the others find the label's column in shared memory.

Bytes in half precision: 2 an element, 4 with the gradient, where what is read again comes from the cache. At 3.0 TB/s,
4096 rows of 32,000 take 87 and 175 µs; such rows are held in registers whole. On their way are 128 KB a multiprocessor.
"""

import tilelang.language as T

from qlakernels.cross_entropy.hopper.sizes import AHEAD, BLOCKS, IGNORED, PIECE, THREADS

LEAST = -3e38  # s where there is nothing yet
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453


def cross_entropy_kernel(dtype):
    threads, lanes = THREADS, min(THREADS, 32)
    warps, batch = threads // lanes, AHEAD * threads
    size, tokens = T.dynamic("size", "int64"), T.dynamic("tokens")

    @T.prim_func
    def cross_entropy(
        logits: T.Tensor((size,), dtype),
        labels: T.Tensor((tokens,), "int64"),
        nll: T.Tensor((tokens,), "float32"),
        pieces: T.int32,
        words: T.int32,
        with_gradient: T.int32,
    ):
        with T.Kernel(tokens, threads=threads) as token:
            T.annotate_min_blocks_per_sm(BLOCKS)
            rows = T.alloc_local((AHEAD, PIECE), dtype)
            highs, out = T.alloc_local((PIECE,), dtype), T.alloc_local((PIECE,), dtype)
            values = T.alloc_local((PIECE,), "float32")
            top, high, total, at_label = (T.alloc_local((1,), "float32") for _ in range(4))
            tops, totals = T.alloc_shared((warps,), "float32"), T.alloc_shared((warps,), "float32")
            columns = T.alloc_shared((1,), "int32")
            start = T.alloc_var("int64")
            label = T.alloc_var("int64", init=IGNORED)
            column = T.alloc_var("int32", init=IGNORED)  # the label's, -1 if it is no word
            kept = T.alloc_var("int32")  # columns whose gradient is not 0
            batches = T.alloc_var("int32")
            thread = T.get_thread_binding()
            start = T.cast(token, "int64") * pieces
            batches = T.ceildiv(pieces, batch)
            if thread == 0:
                label = labels[token]
            top[0] = LEAST
            total[0] = 0.0
            for i in T.serial(batches):
                load_batch(logits, start, i * batch + thread, words, rows)
                add_batch(rows, i * batch + thread, words, top, high, total, highs)
            at_label[0] = 0.0
            if label >= 0 and label < words:
                column = T.cast(label, "int32")
                at_label[0] = T.cast(logits[start * PIECE + label], "float32")
            elif label != IGNORED:
                column = -1
                total[0] = T.float32(float("nan"))
            join(top, high, total, lanes)
            if warps > 1:
                if thread % lanes == 0:
                    tops[thread // lanes] = top[0]
                    totals[thread // lanes] = total[0]
                if thread == 0:
                    columns[0] = column
                T.sync_threads()
                top[0] = tops[thread % warps]
                total[0] = totals[thread % warps]
                column = columns[0]
                join(top, high, total, warps)
            if thread == 0:
                nll[token] = T.if_then_else(
                    column == IGNORED, 0.0, LN_2 * (T.log2(total[0]) - (at_label[0] * LOG2_E - top[0]))
                )
            if with_gradient != 0:
                total[0] = 1.0 / total[0]
                kept = T.if_then_else(column == IGNORED, 0, words)
                for i in T.serial(batches):
                    first = (batches - 1 - i) * batch + thread
                    if i > 0:
                        load_batch(logits, start, first, kept, rows)
                    write_batch(rows, first, pieces, kept, column, top, total, values, out, logits, start)

    return cross_entropy


@T.macro
def load_batch(logits, start, first, words, rows):
    """rows [AHEAD, PIECE] ← the pieces of a row that are a thread's, from number `first` on, where they have words;
    start: pieces in front of the row"""
    for i in T.unroll(AHEAD):
        if (first + i * THREADS) * PIECE < words:
            for j in T.vectorized(PIECE):
                rows[i, j] = logits[(start + first + i * THREADS) * PIECE + j]


@T.macro
def add_batch(rows, first, words, top, high, total, highs):
    """top, total [1] ← those with a batch, in which what is no word becomes −∞.
    high, highs: locals, [1] in float32 and [PIECE] in the dtype of rows"""
    for i in T.unroll(AHEAD):
        if (first + i * THREADS + 1) * PIECE > words:
            for j in T.unroll(PIECE):
                if (first + i * THREADS) * PIECE + j >= words:
                    rows[i, j] = T.cast(-T.infinity("float32"), rows.dtype)
    for j in T.vectorized(PIECE):
        highs[j] = rows[0, j]
    for i in T.unroll(AHEAD):
        for j in T.vectorized(PIECE):
            highs[j] = T.max(highs[j], rows[i, j])
    high[0] = top[0]
    for j in T.unroll(PIECE):
        high[0] = T.max(high[0], T.cast(highs[j], "float32") * LOG2_E)
    total[0] *= T.exp2(top[0] - high[0])
    top[0] = high[0]
    for i in T.unroll(AHEAD):
        for j in T.unroll(PIECE):
            total[0] += T.exp2(T.cast(rows[i, j], "float32") * LOG2_E - top[0])


@T.macro
def join(top, high, total, lanes):
    """top, total [1] ← those of neighbouring lanes together, the same bits in all of them. high: a local [1]"""
    high[0] = top[0]
    for i in T.unroll(lanes.bit_length() - 1):
        high[0] = T.max(high[0], T.shfl_xor(high[0], 1 << i))
    total[0] *= T.exp2(top[0] - high[0])
    top[0] = high[0]
    for i in T.unroll(lanes.bit_length() - 1):
        total[0] += T.shfl_xor(total[0], 1 << i)


@T.macro
def write_batch(rows, first, pieces, kept, column, top, scale, values, out, logits, start):
    """Those pieces of logits ← the gradient, which is 0 from column number `kept` on; scale [1]: 1 / Z"""
    for i in T.unroll(AHEAD):
        piece = first + i * THREADS
        if piece < pieces:
            for j in T.unroll(PIECE):
                values[j] = T.exp2(T.cast(rows[i, j], "float32") * LOG2_E - top[0]) * scale[0]
            if T.truncdiv(column, PIECE) == piece:
                for j in T.unroll(PIECE):
                    if piece * PIECE + j == column:
                        values[j] -= 1.0
            if (piece + 1) * PIECE > kept:
                for j in T.unroll(PIECE):
                    if piece * PIECE + j >= kept:
                        values[j] = 0.0
            for j in T.unroll(PIECE):
                out[j] = T.cast(values[j], out.dtype)
            for j in T.vectorized(PIECE):
                logits[(start + piece) * PIECE + j] = out[j]
