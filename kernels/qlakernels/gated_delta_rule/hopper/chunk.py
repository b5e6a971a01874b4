"""What both scans prepare of a chunk, one chunk ahead of the state: its vectors, and its matrices N and P.

For a chunk of C tokens and one value head, with G = cumsum(g), Γ_ij = exp(G_i − G_j) (i ≥ j), and χ, κ the reciprocal
lengths of q and k (1 without L2 normalisation):

    L_ij = κ_i κ_j Γ_ij k_i·k_j   (i > j)          P_ij = scale χ_i κ_j Γ_ij q_i·k_j   (i ≥ j)
    N = (I + M)⁻¹ − I                               with M = L diag(β) in the forward direction, diag(β) L in reverse

N is strictly lower triangular and regular at β = 0; what it is added to keeps its float32. I + N is solved in blocks of
16 from −M, warp I with the rows of block I:

    A_II     of I + N: its blocks of 8 row by row in float32, a thread a column; what is between them as below
    A_IJ     for the pairs (1, 0) and (3, 2): A_IJ = A_II (−M_IJ) A_JJ
    A_IJ     for I in {2, 3}, J in {0, 1}: the same with the blocks of 32 that are known by now

in tensor-core products of 16×16 blocks, as M is made too. Their operands are rounded to float16: entries of A stay
within 2 for unit keys and β ≤ 2, and bfloat16 would double the error where keys repeat.

One warp runs `make_gates`, two `make_query_vectors`, one warpgroup or two in turns `make_N`, all ahead of the state;
the consumers of the scans make P beside their products.
"""

import tilelang.language as T

from qlakernels.gated_delta_rule.hopper.common import (
    BETA_MIN,
    L2_EPS,
    LOG2E,
    arrive,
    exp2,
    folds_decay,
    log2,
    release_tiles,
    sync_warpgroup,
    wait,
    weight_of_W,
)
from qlakernels.gated_delta_rule.hopper.sizes import CHUNK, VECTORS

BLOCK = 16
STAGES = 3  # of k and the vectors in a scan
Q_STAGES = 2
PLACES = 2  # of N and P
BLOCKS_OF_8 = CHUNK // 8
AUXILIARIES = {1: 2, 2: 1}  # warpgroups of a scan that make N, by the number of its consumers
# rows of a chunk's vectors in shared memory, [VECTORS, CHUNK] in float32
LOG2, BETA, GAMMA, RHO = range(4)  # of the gates
ROW_P, OUTPUT = 4, 5  # of the queries
LEFT_L, RIGHT_L, RIGHT_P, BAR, STATE_KAPPA, INTO_STATE = range(6, VECTORS)  # of the keys
FROM_P = RIGHT_P  # in reverse: what both terms of D are multiplied by, of which STATE_KAPPA has the first before
LEAST_DECAY = -104.0  # its exponential is 0 in float32; sums over a chunk keep the digits of the others
FAR = 80.0  # powers of two: decay over a chunk up to which it can be taken out of Γ
ABBREVIATION = {"bfloat16": "bf16", "float16": "fp16"}


def softplus(y):
    """Without overflow, and without loss where it is small."""
    return T.max(y, 0.0) + T.log1p(T.exp(-T.abs(y)))


def sigmoid_of(x, factor):
    """factor σ(x)"""
    return factor / (1.0 + T.exp(-x))


def address_of(element):
    """In shared memory, of a piece of 16 bytes. Needs PRELUDE."""
    return T.call_extern("uint32", "shared_address", T.access_ptr(element, "r", extent=8))


def load_matrices(block, address):
    """block [8] ← four matrices of 8×8 elements, a lane's address that of a row, by a warp. Needs PRELUDE."""
    return T.call_extern("handle", "load_matrices", T.access_ptr(block[0], "w", extent=8), address)


@T.macro
def load_block(block, source, place, row, column, lane, right):
    """block [8] ← the 16×16 block of source[place] at (row, column), as a left operand of `multiply`, by a warp.

    `right`: as a right one instead.
    """
    T.ptx_ldmatrix(
        T.bool(right),
        4,
        T.access_ptr(source[place, row + lane % 16, column + lane // 16 * 8], "r", extent=8),
        T.access_ptr(block[0], "w", extent=8),
    )


@T.macro
def load_transposed(block, source, place, row, column, lane):
    """block [8] ← the transpose of the 16×16 block of source[place] at (row, column), as a right operand, by a warp."""
    T.ptx_ldmatrix(
        T.bool(False),
        4,
        T.access_ptr(source[place, row + lane // 16 * 8 + lane % 8, column + lane // 8 % 2 * 8], "r", extent=8),
        T.access_ptr(block[0], "w", extent=8),
    )


@T.macro
def multiply(out, tile, left, right, dtype):
    """out[4 tile : 4 tile + 8] += left right, blocks of 16×16 in the registers of a warp."""
    for half in T.unroll(2):
        T.ptx_mma(
            "float32", "m16n8k16", "row", "col", ABBREVIATION[dtype], ABBREVIATION[dtype], "fp32",
            left.data, 0, right.data, half * 4, out.data, (tile + half) * 4, T.bool(False),
        )  # fmt: skip


@T.macro
def multiply_half(out, left, right):
    """out[0 : 4] += the first 8 columns of left right."""
    T.ptx_mma(
        "float32", "m16n8k16", "row", "col", "fp16", "fp16", "fp32",
        left.data, 0, right.data, 0, out.data, 0, T.bool(False),
    )  # fmt: skip


@T.macro
def clear(out, count):
    for x in T.unroll(count):
        out[x] = 0.0


@T.macro
def load_gates(loaded_g, loaded_beta, g, beta, first, size, head, lane):
    """loaded_g, loaded_beta [2], as they are stored ← those of tokens `lane` and `lane` + 32 of the chunk at token
    `first`, which has `size` tokens, one at least; of its last one, where there is none.

    Called a chunk ahead: the loads are on their way while the chunk before is worked on. Without a branch, or one would
    wait for the other, and without a cast, which would wait at once: as columns of a wide projection they lie in 128
    rows, and together took longer than a chunk.
    """
    for half in T.unroll(2):
        token = T.min(half * 32 + lane, size - 1)
        loaded_g[half] = g[first + token, head]
        loaded_beta[half] = beta[first + token, head]


@T.macro
def make_gates(
    vec, stage, lane, loaded_g, loaded_beta, x, rate, bias, size, beta_factor, gate, sigmoid, gates, slot, head, write
):
    """vec[stage]'s vectors of the gates ← what is made of those that `load_gates` has loaded, `size` tokens; by a warp,
    two tokens a lane, one after the other in a loop that is not unrolled, as in `make_N`.

    rate, bias: −exp(A_log) and dt_bias of the head. x: a local float32 [3]. `write`: gates[slot, head] ← Σg and β too.
    """
    sum_before = T.alloc_var("float32", init=0.0)
    for half in T.unroll(2, unroll_factor=1):
        token = half * 32 + lane
        x[0] = T.Select(half == 0, T.cast(loaded_g[0], "float32"), T.cast(loaded_g[1], "float32"))
        x[1] = T.Select(half == 0, T.cast(loaded_beta[0], "float32"), T.cast(loaded_beta[1], "float32"))
        if gate:
            y = x[0] + bias
            x[0] = rate * softplus(y)
        if sigmoid:
            x[1] = sigmoid_of(x[1], beta_factor)
        x[0] = T.Select(token < size, T.max(x[0], LEAST_DECAY), T.float32(0.0))
        x[1] = T.Select(token < size, x[1], T.float32(0.0))
        for step in T.unroll(5):
            x[2] = T.shfl_up(x[0], 1 << step)
            if lane >= 1 << step:
                x[0] += x[2]
        x[0] += sum_before
        sum_before = T.shfl_sync(x[0], 31)
        vec[stage, LOG2, token] = x[0] * LOG2E
        vec[stage, BETA, token] = x[1]
        vec[stage, GAMMA, token] = exp2(x[0] * LOG2E)
        if write:
            gates[slot, head, 0, token] = x[0]
            gates[slot, head, 1, token] = x[1]
    for half in T.unroll(2):
        token = half * 32 + lane
        vec[stage, RHO, token] = exp2(sum_before * LOG2E - vec[stage, LOG2, token])


@T.macro
def square_rows(vec, stage, q_s, q_stage, top, lane, a, b, sums, key_dim, dtype):
    """vec[stage, ROW_P, top : top + 16] ← the sums of squares of 16 rows of q_s[q_stage], by a warp.

    They are the diagonal of a product: columns 0 to 7 of its upper half, 8 to 15 of its lower one.
    """
    clear(sums, 8)
    for step in T.unroll(key_dim // BLOCK, unroll_factor=2):
        load_block(a, q_s, q_stage, top, step * BLOCK, lane, False)
        for x in T.unroll(8):  # the same rows as columns: [0 1 4 5] and [2 3 6 7]
            b[x] = a[x // 4 * 2 + x % 4 // 2 * 4 + x % 2]
        multiply(sums, 0, a, b, dtype)
    for e in T.unroll(2):
        if lane // 4 == lane % 4 * 2 + e:
            vec[stage, ROW_P, top + lane // 4] = sums[e]
            vec[stage, ROW_P, top + 8 + lane // 4] = sums[6 + e]


@T.macro
def make_query_vectors(
    vec, stage, i, q_s, q_stage, gates_full, parity, scale, a, b, sums, key_dim, dtype, l2norm, fold, norms, slot,
    group, write,
):  # fmt: skip
    """vec[stage]'s vectors of the queries, by two warps, i the thread's token. `fold`: P takes the decay of rows.

    Waits for the gates after q itself. `write`: norms[slot, group, 0] ← χ as well.
    """
    lane = i % 32
    chi = T.alloc_var("float32", init=1.0)
    if l2norm:
        for half in T.serial(2):
            square_rows(vec, stage, q_s, q_stage, i // 32 * 32 + half * BLOCK, lane, a, b, sums, key_dim, dtype)
        T.sync_warp()
        chi = T.rsqrt(vec[stage, ROW_P, i] + L2_EPS)
        T.sync_warp()
    if write:
        norms[slot, group, 0, i] = chi
    wait(gates_full, stage, parity)
    vec[stage, OUTPUT, i] = scale * chi * vec[stage, GAMMA, i]
    whole = vec[stage, LOG2, CHUNK - 1]
    if fold and whole > -FAR:
        # (κβ/ω)_j is 1/ρ_j: what is left of Γ depends on the row alone, but for decay that bfloat16 cannot hold
        vec[stage, ROW_P, i] = scale * chi * exp2(vec[stage, LOG2, i] - whole)
    else:
        vec[stage, ROW_P, i] = scale * chi


@T.macro
def make_key_vectors(i, vec, stage, dtype, l2norm, reverse, norms, slot, group, write):
    """vec[stage]'s vectors of the keys, a thread a token i; vec[stage, STATE_KAPPA] holds the squares of their lengths.

    `reverse`: as the reverse scan needs them. `write`: norms[slot, group, 1] ← κ as well.
    """
    kappa = T.alloc_var("float32", init=1.0)
    if l2norm:
        kappa = T.rsqrt(vec[stage, STATE_KAPPA, i] + L2_EPS)
    if write:
        norms[slot, group, 1, i] = kappa
    beta = vec[stage, BETA, i]
    log2_kappa = log2(kappa)
    if reverse:
        vec[stage, LEFT_L, i] = vec[stage, LOG2, i] + log2(kappa * beta)
        vec[stage, RIGHT_L, i] = vec[stage, LOG2, i] - log2_kappa
        bar = T.max(beta, BETA_MIN[dtype])
        vec[stage, BAR, i] = bar
        vec[stage, INTO_STATE, i] = -vec[stage, GAMMA, i] * kappa * (beta / bar)
        if folds_decay(dtype) and vec[stage, LOG2, CHUNK - 1] > -FAR:
            vec[stage, STATE_KAPPA, i] = vec[stage, GAMMA, CHUNK - 1]
            vec[stage, FROM_P, i] = kappa * exp2(-vec[stage, LOG2, i])
        else:
            vec[stage, STATE_KAPPA, i] = vec[stage, RHO, i] * kappa
            vec[stage, FROM_P, i] = 1.0
    else:
        vec[stage, LEFT_L, i] = vec[stage, LOG2, i] + log2_kappa
        vec[stage, RIGHT_L, i] = vec[stage, LOG2, i] - log2(kappa * beta)
        omega = T.alloc_var("float32")
        omega = weight_of_W(beta, vec[stage, RHO, i], kappa, dtype)
        vec[stage, BAR, i] = omega
        vec[stage, STATE_KAPPA, i] = vec[stage, GAMMA, i] * kappa
        vec[stage, INTO_STATE, i] = vec[stage, RHO, i] * (kappa * beta / omega)
        vec[stage, RIGHT_P, i] = vec[stage, LOG2, i] - log2(kappa * beta / omega)


@T.macro
def weigh(matrix, vec, stage, left, right):
    """matrix_ij [C, C] ← 2^(left_i − right_j) matrix_ij, rows of vec; above the diagonal it may become infinite."""
    for i, j in T.Parallel(CHUNK, CHUNK):
        matrix[i, j] *= exp2(vec[stage, left, i] - vec[stage, right, j])


@T.macro
def weigh_P(matrix, vec, stage, folded):
    """P of the reverse scan but for its cut ← `matrix` = Q Kᵀ. `folded`: its weights are in what it is multiplied by
    and in FROM_P, but for decay that cannot be taken apart."""
    if not folded or vec[stage, LOG2, CHUNK - 1] <= -FAR:
        for i, j in T.Parallel(CHUNK, CHUNK):
            matrix[i, j] *= vec[stage, ROW_P, i]
        weigh(matrix, vec, stage, LOG2, RIGHT_L)


@T.macro
def cut(matrix, registers, strict):
    """matrix_ij [C, C] ← 0 for i < j (i ≤ j if strict). The fence keeps what was computed from becoming a branch."""
    T.warpgroup_fence_operand(matrix, num_regs=registers)
    for i, j in T.Parallel(CHUNK, CHUNK):
        matrix[i, j] = T.Select(i > j if strict else i >= j, matrix[i, j], T.float32(0.0))


@T.macro
def clear_solve(t, threads, N_s, places, A_s, halves, block_s, auxiliaries, diagonal):
    """Before the first chunk, by the warpgroups that make N, for `make_N`: what is on and above the diagonal stays as
    it is. Behind the blocks that are solved by rows stands the identity, from which their columns start."""
    for place in T.unroll(places):
        for i, j in T.Parallel(CHUNK, CHUNK):
            N_s[place, i, j] = 0.0
    for half in T.unroll(halves):
        for i, j in T.Parallel(CHUNK, CHUNK + 8):
            A_s[half, i, j] = 0.0
    for i, j in T.Parallel(8, 12):
        block_s[auxiliaries * BLOCKS_OF_8, i, j] = 0.0
    T.sync_threads(7, threads)
    if t < CHUNK:
        for half in T.unroll(halves):
            A_s[half, t, t] = 1.0
        block_s[auxiliaries * BLOCKS_OF_8, t % 8, t % 8] = 1.0
    T.sync_threads(7, threads)
    for e in T.unroll(2):
        diagonal[e] = T.Select(t % 32 // 4 == t % 4 * 2 + e, T.float32(1.0), T.float32(0.0))


@T.macro
def as_left(block, out, tile):
    """block ← a left operand of `multiply` from out's tiles of 16×8 from `tile` on."""
    for x in T.unroll(8):
        block[x] = out[tile * 4 + x]


@T.macro
def as_right(block, out):
    """block ← a right operand from the transpose of out's first two tiles of 16×8."""
    for x in T.unroll(8):
        block[x] = out[x // 2 % 2 * 4 + x // 4 * 2 + x % 2]


@T.macro
def store_block(target, place, out, tile, row, column, lane):
    """target[place] ← two tiles of `out`."""
    for pair in T.unroll(4):
        for x in T.vectorized(2):
            target[place, row + lane // 4 + pair % 2 * 8, column + pair // 2 * 8 + lane % 4 * 2 + x] = out[
                tile * 4 + pair * 2 + x
            ]


@T.macro
def multiply_keys(out, k_s, stage, row, column, lane, a, b, key_dim, dtype):
    """out[0 : 8] ← the 16×16 block of K Kᵀ at (row, column), by a warp. Of out [16] the rest is a second sum, as a
    chain of products takes its time."""
    clear(out, 16)
    # In the layout of k_s pieces of 16 bytes change places in tiles of so many columns: two pieces on, an address is
    # that of the first with one or two bits turned over.
    tile = 64 if key_dim % 64 == 0 else 32
    from_left = T.alloc_var("uint32")
    from_right = T.alloc_var("uint32")
    from_left = address_of(k_s[stage, row + lane % 16, lane // 16 * 8])
    from_right = address_of(k_s[stage, column + lane // 16 * 8 + lane % 8, lane // 8 % 2 * 8])
    for step in T.unroll(key_dim // BLOCK):
        turned = step % (tile // BLOCK) * BLOCK * 2
        beyond = step // (tile // BLOCK) * CHUNK * tile * 2
        load_matrices(a, (from_left ^ T.uint32(turned)) + T.uint32(beyond))
        load_matrices(b, (from_right ^ T.uint32(turned)) + T.uint32(beyond))
        multiply(out, step % 2 * 2, a, b, dtype)
    for x in T.unroll(8):
        out[x] += out[8 + x]


@T.macro
def solve_rows(warp, lane, A_s, half, block_s, which, identity, column):
    """A_s[half] ← the two blocks of 8 of warp I on the diagonal of A, from −M in block_s; 16 lanes have a column each,
    and take what is known of it to the rows below."""
    lower = lane // 8 % 2
    eight = warp * BLOCK + lower * 8
    if lane < BLOCK:
        for i in T.unroll(8):
            column[i] = block_s[identity, lane % 8, i]
        for m in T.unroll(7):
            for i in T.unroll(m + 1, 8):
                column[i] += block_s[which * BLOCKS_OF_8 + warp * 2 + lower, m, i] * column[m]
        for i in T.unroll(8):
            A_s[half, eight + i, eight + lane % 8] = column[i]
    T.sync_warp()


@T.macro
def make_N(
    t, which, auxiliaries, vec, stage, k_s, N_s, place, A_s, half, Mt_s, block_s, a_, b_, a, b, c, out, column,
    diagonal, gates_full, parity, key_full, free, free_parity, key_dim, dtype, l2norm, reverse, norms, slot, group,
    write,
):  # fmt: skip
    """N_s[place] ← the chunk's N, and vec[stage]'s vectors of the keys, before. Run by a warpgroup, whose threads are
    t = 0 to 127; arrives at `key_full`.

    `which` of the `auxiliaries` that make N in turns this is: it has Mt_s[which], a part of block_s and a named barrier
    to itself, and A_s[half] until its next chunk but one. `free`, `free_parity`: the barriers behind which a place may
    be written. `diagonal` [2]: the identity at rows lane // 4 and columns lane % 4 · 2 and the next.

    A block of M, transposed, is made of one of K Kᵀ as it comes from the tensor cores, in a loop that is not unrolled:
    the scans wait for code more than for its latency. First each warp makes that on the diagonal and solves it; then
    the odd warps make their A_IJ, the even ones two blocks of M each, of which the odd ones make the rest. On and above
    the diagonal M is without meaning, perhaps infinite, and nowhere used.
    """
    warp = t // 32
    lane = t % 32
    own = warp * BLOCK
    for turn in T.unroll(3, unroll_factor=1):
        if turn < 2 or warp % 2 == 0:
            top = T.if_then_else(turn == 0 or warp % 2 == 1, warp, 2 + warp // 2) * BLOCK
            left = T.if_then_else(turn == 0, warp, T.if_then_else(warp % 2 == 1, warp - 1, turn - 1)) * BLOCK
            multiply_keys(out, k_s, stage, left, top, lane, a_, b_, key_dim, dtype)
            if turn == 0:
                wait(gates_full, stage, parity)
                if l2norm:
                    for e in T.unroll(2):
                        if lane // 4 == lane % 4 * 2 + e:
                            vec[stage, STATE_KAPPA, own + lane // 4] = out[e]
                            vec[stage, STATE_KAPPA, own + 8 + lane // 4] = out[6 + e]
                    T.sync_warp()
                if lane < BLOCK:
                    make_key_vectors(own + lane, vec, stage, dtype, l2norm, reverse, norms, slot, group, write)
                T.sync_warp()
                arrive(key_full, stage)
            for x in T.unroll(8):
                i = top + x // 4 * 8 + lane % 4 * 2 + x % 2
                j = left + x // 2 % 2 * 8 + lane // 4
                out[x] *= -exp2(vec[stage, LEFT_L, i] - vec[stage, RIGHT_L, j])
            if turn == 0:
                for e in T.vectorized(2):
                    block_s[which * BLOCKS_OF_8 + warp * 2, lane // 4, lane % 4 * 2 + e] = out[e]
                for e in T.vectorized(2):
                    block_s[which * BLOCKS_OF_8 + warp * 2 + 1, lane // 4, lane % 4 * 2 + e] = out[6 + e]
                T.sync_warp()
                solve_rows(warp, lane, A_s, half, block_s, which, auxiliaries * BLOCKS_OF_8, column)
                # of the products of this block only rows 8 to 15, columns 0 to 7 are wanted
                load_block(a, A_s, half, own, own, lane, False)
                for x in T.unroll(8):
                    c[x] = 0.0 if x // 2 == 1 else a[x]
                for x in T.unroll(4):
                    b[x] = out[2 + x] if x >= 2 else 0.0
                clear(out, 4)
                multiply_half(out, c, b)
                for x in T.unroll(8):
                    c[x] = out[x] if x // 2 == 1 else 0.0
                load_block(b, A_s, half, own, own, lane, True)
                clear(out, 4)
                multiply_half(out, c, b)
                for x in T.unroll(2):
                    a[2 + x] = out[2 + x]
                for x in T.vectorized(2):
                    A_s[half, own + 8 + lane // 4, own + lane % 4 * 2 + x] = out[2 + x]
                for x in T.unroll(8):
                    out[x] = T.cast(a[x], "float32") - (diagonal[x % 2] if x // 2 % 3 == 0 else 0.0)
                wait(free, place, free_parity)
                store_block(N_s, place, out, 0, own, own, lane)
                sync_warpgroup(7 + which)
            elif warp % 2 == 1:
                as_right(b, out)
                clear(out, 8)
                multiply(out, 0, a, b, "float16")
                as_left(c, out, 0)
                load_block(b, A_s, half, left, left, lane, True)
                clear(out, 8)
                multiply(out, 0, c, b, "float16")
                store_block(A_s, half, out, 0, own, left, lane)
                store_block(N_s, place, out, 0, own, left, lane)
            else:
                store_block(Mt_s, which, out, 0, left, top - CHUNK // 2, lane)
    sync_warpgroup(7 + which)
    if warp % 2 == 1:
        row = (2 + warp // 2) * BLOCK
        clear(out, 16)
        for step in T.unroll(2, unroll_factor=1):
            if step <= warp // 2:
                load_block(a, A_s, half, row, (2 + step) * BLOCK, lane, False)
                for J in T.unroll(2):
                    load_transposed(b, Mt_s, which, J * BLOCK, step * BLOCK, lane)
                    multiply(out, J * 2, a, b, "float16")
        as_left(a, out, 0)
        as_left(b, out, 2)
        clear(out, 16)
        load_block(c, A_s, half, 0, 0, lane, True)
        multiply(out, 0, a, c, "float16")
        load_block(c, A_s, half, BLOCK, 0, lane, True)
        multiply(out, 0, b, c, "float16")
        load_block(c, A_s, half, BLOCK, BLOCK, lane, True)
        multiply(out, 2, b, c, "float16")
        for J in T.unroll(2):
            store_block(N_s, place, out, J * 2, row, J * BLOCK, lane)
    release_tiles()


@T.macro
def serve_gates(
    vec, lane, g_now, beta_now, loaded_g, loaded_beta, x, g, beta, A_log, dt_bias, start, length, chunks, head,
    beta_factor, k_empty, gates_full, gate, sigmoid, reverse, gates, slot,
):  # fmt: skip
    """The role of a scan's warp that makes the gates of its chunks, from the last to the first if `reverse`."""
    rate = T.alloc_var("float32", init=0.0)
    bias = T.alloc_var("float32", init=0.0)
    if gate:
        rate = -T.exp(A_log[head])
        bias = dt_bias[head]
    if chunks > 0:
        first_chunk = chunks - 1 if reverse else 0
        size = length - first_chunk * CHUNK
        load_gates(loaded_g, loaded_beta, g, beta, start + first_chunk * CHUNK, size, head, lane)
    for step in T.serial(chunks):
        c = chunks - 1 - step if reverse else step
        for half in T.unroll(2):
            g_now[half] = loaded_g[half]
            beta_now[half] = loaded_beta[half]
        if step + 1 < chunks:
            then = c - 1 if reverse else c + 1
            size = length - then * CHUNK
            load_gates(loaded_g, loaded_beta, g, beta, start + then * CHUNK, size, head, lane)
        wait(k_empty, step % STAGES, (step // STAGES + 1) % 2)
        make_gates(
            vec, step % STAGES, lane, g_now, beta_now, x, rate, bias, length - c * CHUNK, beta_factor, gate, sigmoid,
            gates, slot + c, head, reverse,
        )  # fmt: skip
        arrive(gates_full, step % STAGES)


@T.macro
def serve_queries(
    vec, i, q_s, q_full, k_empty, gates_full, query_full, chunks, scale, a, b, sums, key_dim, dtype, l2norm, fold,
    reverse, norms, slot, group, write,
):  # fmt: skip
    """The role of a scan's two warps that make the vectors of the queries. `write`, if `reverse`: norms as well."""
    for step in T.serial(chunks):
        wait(k_empty, step % STAGES, (step // STAGES + 1) % 2)
        wait(q_full, step % Q_STAGES, step // Q_STAGES % 2)
        make_query_vectors(
            vec, step % STAGES, i, q_s, step % Q_STAGES, gates_full, step // STAGES % 2, scale, a, b, sums, key_dim,
            dtype, l2norm, fold, norms, slot + chunks - 1 - step, group, write,
        )  # fmt: skip
        arrive(query_full, step % STAGES)


@T.macro
def serve_keys(
    t, auxiliaries, k_s, vec, N_s, A_s, Mt_s, block_s, a_, b_, a, b, c, out, column, diagonal, k_full, gates_full,
    key_full, made_full, made_empty, chunks, key_dim, dtype, l2norm, reverse, norms, slot, group, write,
):  # fmt: skip
    """The role of a scan's warpgroups that make the vectors of the keys and N, in turns; their threads are t = 0 and
    onwards. `write`, if `reverse`: norms as well."""
    clear_solve(t, 128 * auxiliaries, N_s, PLACES, A_s, 2 * auxiliaries, block_s, auxiliaries, diagonal)
    which = t // 128
    for turn in T.serial(T.ceildiv(chunks - which, auxiliaries)):
        step = turn * auxiliaries + which
        stage = step % STAGES
        wait(k_full, stage, step // STAGES % 2)
        make_N(
            t % 128, which, auxiliaries, vec, stage, k_s, N_s, step % PLACES, A_s, step % (2 * auxiliaries), Mt_s,
            block_s, a_, b_, a, b, c, out, column, diagonal, gates_full, step // STAGES % 2, key_full, made_empty,
            (step // PLACES + 1) % 2, key_dim, dtype, l2norm, reverse, norms, slot + chunks - 1 - step, group, write,
        )  # fmt: skip
        arrive(made_full, step % PLACES)
