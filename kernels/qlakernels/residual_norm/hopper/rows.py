"""What both kernels share: a row of D elements lies over neighbouring threads of a block, 8 neighbouring ones in each.

    t = x + δ, rounded      r = (Σ t² / D + eps)^−½      n = t r      y = n ∘ (offset + w)

Up to 256 elements, the L lanes of a row are a power of two of them, so that no row lies in two warps; where elements
are more, they are whole warps. Lanes without a piece load and store nothing and add zeros. Small rows lie side by side,
at least 128 threads a block. A thread keeps to its 8 columns, so their weights stay in its registers.

Sums over a row go through shuffles; where it has several warps, each leaves one number in shared memory and then all of
them add those up in the same way: all lanes of a row have the same bits. That takes one barrier for the rows of a batch
together, since batches leave their numbers in two places in turns: before a place is written again, every thread has
come to the barrier in between, and so has read it.

Shuffles and barriers are for all threads of a block, which go through all its batches; what lies behind the last row is
neither read nor written.
"""

import tilelang.language as T

from qlakernels.residual_norm.hopper.sizes import PIECE, WARP


@T.macro
def load_weights(weight, offset, lane, raw, weights):
    """weights [PIECE] ← offset + those of a lane, in float32; raw: a local of the dtype of `weight`"""
    for j in T.unroll(PIECE):
        raw[j] = 0
    if lane < weight.shape[0] // PIECE:
        for j in T.vectorized(PIECE):
            raw[j] = weight[lane * PIECE + j]
    for j in T.unroll(PIECE):
        weights[j] = offset + T.cast(raw[j], "float32")


@T.macro
def load_rows(x, first, step, last, pieces, lane, rows):
    """rows [batch, PIECE] ← the pieces of a lane in rows first, first + step, … of x; from row `last` on zeros"""
    for i in T.unroll(rows.shape[0]):
        for j in T.unroll(PIECE):
            rows[i, j] = 0
        if first + i * step < last:
            for j in T.vectorized(PIECE):
                rows[i, j] = x[place_of(first + i * step, pieces, lane) + j]


@T.macro
def store_row(rows, i, x, row, pieces, lane):
    """the piece of a lane in a row of x ← row i of rows [batch, PIECE]"""
    for j in T.vectorized(PIECE):
        x[place_of(row, pieces, lane) + j] = rows[i, j]


@T.macro
def round_into(rows, i, values):
    """row i of rows [batch, PIECE] ← values [PIECE], float32, in the dtype of `rows`"""
    for j in T.vectorized(PIECE):
        rows[i, j] = T.cast(values[j], rows.dtype)


@T.macro
def add_over_rows(sums, parts, turn, thread, lanes):
    """sums [count] ← each of them added up over the `lanes` of its row.

    parts: shared [turns, warps of the block, count]; turn: the one of its places that the call before did not take.
    """
    add_over_lanes(sums, min(lanes, WARP))
    if lanes > WARP:
        if T.truncmod(thread, WARP) == 0:
            for k in T.vectorized(sums.shape[0]):
                parts[turn, T.truncdiv(thread, WARP), k] = sums[k]
        T.sync_threads()
        for k in T.unroll(sums.shape[0]):
            sums[k] = 0.0
        if T.truncmod(thread, power_of_two(lanes // WARP)) < lanes // WARP:
            for k in T.vectorized(sums.shape[0]):
                sums[k] = parts[
                    turn,
                    T.truncdiv(thread, lanes) * (lanes // WARP) + T.truncmod(thread, power_of_two(lanes // WARP)),
                    k,
                ]
        add_over_lanes(sums, power_of_two(lanes // WARP))


@T.macro
def add_over_lanes(sums, lanes):
    """sums [count] ← each of them added up over neighbouring lanes, a power of two"""
    for i in T.unroll(lanes.bit_length() - 1):
        for k in T.unroll(sums.shape[0]):
            sums[k] += T.shfl_xor(sums[k], 1 << i)


def power_of_two(number):
    """The next one that is not smaller."""
    return 1 << (number - 1).bit_length()


def place_of(row, pieces, lane):
    """Where the piece of a lane in a row begins."""
    return (T.cast(row, "int64") * pieces + lane) * PIECE
