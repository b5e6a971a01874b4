"""What the kernels of the gated norm share: neighbouring lanes of a warp take a row of D elements, a head's of a token.

    n = x r,  r = (Σ x² / D + eps)^−½      y = w ∘ round(n) ∘ g σ(g)

L lanes share a row, a power of two, so that no row lies in two warps, and each has a piece of 8 neighbouring elements.
Where D is 96 or 192, every fourth lane has none: it loads and stores nothing, and adds zeros. The next lanes have the
next head, so a warp moves runs of up to 512 bytes of a token. Sums over a row go through shuffles, and they leave all
its lanes with the same bits.

A thread marches over a stretch of tokens with its piece of one head, and its weights and sums stay in registers.
Loads are issued for a batch of tokens before the first of them is used: that is what hides the memory.

Shuffles are for whole warps: every thread goes through every batch of its stretch, and what lies behind the last token
is neither read nor written.

Each tensor comes as one row of numbers with the step between its tokens in pieces, so that the compiler knows every
address for a multiple of 16 bytes, and any slice of a projection is read and written where it lies.
"""

import tilelang.language as T

from qlakernels.norm.hopper.sizes import PIECE


@T.macro
def load_weights(weight, lane, raw, weights):
    """weights [PIECE] ← those of a lane in float32, zeros for a lane without a piece; raw: a local of their dtype"""
    for j in T.unroll(PIECE):
        raw[j] = 0
    if lane < weight.shape[0] // PIECE:
        for j in T.vectorized(PIECE):
            raw[j] = weight[lane * PIECE + j]
    for j in T.unroll(PIECE):
        weights[j] = T.cast(raw[j], "float32")


@T.macro
def clear(rows):
    """rows [batch, PIECE] ← zeros, which they keep where a lane has no piece"""
    for i in T.unroll(rows.shape[0]):
        for j in T.unroll(PIECE):
            rows[i, j] = 0


@T.macro
def load_piece(x, place, rows, i):
    """row i of rows [batch, PIECE] ← piece number `place` of x"""
    for j in T.vectorized(PIECE):
        rows[i, j] = x[place * PIECE + j]


@T.macro
def store_piece(values, out, x, place):
    """piece number `place` of x ← values [PIECE], float32; out: a local of x's dtype"""
    round_into(out, values)
    for j in T.vectorized(PIECE):
        x[place * PIECE + j] = out[j]


@T.macro
def round_into(out, values):
    """out [PIECE] ← values [PIECE], float32, in the dtype of `out`"""
    for j in T.vectorized(PIECE):
        out[j] = T.cast(values[j], out.dtype)


@T.macro
def add_over_lanes(total, lanes):
    """total [1] ← its sum over the lanes of a row"""
    for i in T.unroll(lanes.bit_length() - 1):
        total[0] += T.shfl_xor(total[0], 1 << i)


def place_of(token, step, column):
    """The number of the piece in a column of a token, where `step` pieces lie between tokens."""
    return T.cast(token, "int64") * step + column


def sigmoid(x):
    return 1.0 / (1.0 + T.exp(-x))
