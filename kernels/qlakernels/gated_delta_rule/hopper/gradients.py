"""G: the gradients of q, k, g and β, from the states that the forward kept.

Per chunk and key head, with S at the chunk's start, dS at its end (from `reverse`), W and ω from `forward`, dV from
`reverse`, u = κβ/ω, and fix = β/β̄ (1 unless β is tiny); sums run over the value heads of the group, i > j:

    F_ij = scale χ_i Γ_ij u_j (dO Wᵀ)_ij          f_i = F_ii    H_ij = κ_i fix_i Γ_ij u_j (dV Wᵀ)_ij
    A = scale γχ ∘ (dO Sᵀ) + F K                   dQ = Σ [A + f ∘ K]                  dq = dQ − χ² q (q·dQ)
    B = −γκ fix ∘ (dV Sᵀ) − H K                    dK = Σ [B + D + E + f ∘ Q]          dk = dK − κ² k (k·dK)
    D = Fᵀ Q − Hᵀ K                                E = ρu ∘ (W dSᵀ)                    (with L2 normalisation)
    dβ_i = (dV Wᵀ)_ii / (ω_i β̄_i)
    dg_t = Σ_{i≥t} (q·A + k·B − k·D)_i + Σ_{j<t} (k·E)_j + γ_C ⟨S, dS⟩
    S ← γ_C S + Kᵀ (ρu ∘ W)                        to the next chunk, symbols and rounding as in `forward`

With Z = F ∘ QKᵀ − H ∘ KKᵀ, q·A holds the row sums of F ∘ QKᵀ, −k·B those of H ∘ KKᵀ, k·D the column sums of Z: what
remains of them in dg_t is Σ_{i≥t>j} Z_ij. F is the same rounded matrix in both of its products, H too, and their
diagonal stays out (f), so what cancels is what strong decay leaves small anyhow, in float32. The sum over E is a
shifted prefix sum: taken as its total minus the rest it would lose all digits.

Persistent blocks take items (256 tokens, key head), in them chunks, in them value heads: a step is a chunk and a head.

Two consumers run the same code, so that it is half as long: [F; −H] is one matrix P [2 C, C] of [dO; dV] Wᵀ, the first
has F and the second −H; of all else each has half of the columns of K. At a step: P to shared memory; D, E, A, B; then
their halves of the state to the next chunk, through the tile of the rows to `scratch`, [V, K] a block and head and so
in L2, whence the copy engine brings them at the next chunk. A last warpgroup of four roles, a warp each:

    loads     dO, W, dV a step or two ahead, S and dS, q and k a chunk
    vectors   the step's vectors, a step ahead or two
    inner     dβ, dV repaired where β̄ is not β, and half of ⟨S, dS⟩: diagonals of products of blocks of 16×16
    dg        the other half, and dg from what the consumers have summed up

Up to 128 values are taken at once. More are taken in parts of 64: all of a step's rows are there for P, and stay until
E, A, B and the state have been through the parts, one after the other. Their sums stay in registers: A and B get their
decay and their products with F and H behind the last part, E enters dK part by part, where registers are short.

Barriers (arrivals), all phases in the order of the steps, or of steps and parts: `rows` dO, W, dV of a part, two
stages, four of parts of 64 (32; 256 back); `S` and `dS`, one stage or two (32; 320); `keys` q and k of a chunk (32;
256); `vec` vectors, two stages (32; 288); `diagonal` that of P (256); `repaired` dV (32); `sums` what dg is of (288;
32). An arrival at `S_empty` also says that the next state of this part and of all before is on its way to `scratch`.
The last rows of a chunk are given back behind dq and dk, which go through their tile. At the named barrier 1 the
consumers meet where P is there, and where it or the rows were read.

The loads go by turns of an item: states of a step beside rows of the next one, a part behind, as rows wait for room
that a part of this step gives back, once its states are there. q and k come behind a chunk's first states: in front of
them they would hold them up until the chunk before is done, and behind all of them they would never come.

Registers of a consumer, at most: dQ and dK 64, A and B 64, q or k 16; in parts E or the state 32 besides. What has been
loaded a step ago costs more than to load it again, and what is spilled is read from L2, as shared memory leaves nothing
of the L1 cache: 400 cycles each. `here` keeps the addresses of rare loads and stores from being kept through the loops.
Shared memory at K = V = 128, and at V > 128: rows 96 KB, S 32, dS 32, q and k 32, P 16, vectors 7, sums 3.
"""

from math import gcd

import tilelang.language as T
from tilelang.layout import (
    make_full_bank_swizzled_layout,
    make_half_bank_swizzled_layout,
    make_quarter_bank_swizzled_layout,
)

from qlakernels.gated_delta_rule.hopper.chunk import FAR, multiply
from qlakernels.gated_delta_rule.hopper.common import (
    BASE,
    BETA_MIN,
    FIRST,
    LEFT,
    LOG2E,
    accumulator,
    accumulator_rows,
    acquire_stores,
    arrive,
    exp2,
    folds_decay,
    load_tail,
    locate,
    release_tiles,
    wait,
    weight_of_W,
)
from qlakernels.gated_delta_rule.hopper.common import PRELUDE as COMMON_PRELUDE
from qlakernels.gated_delta_rule.hopper.sizes import CHUNK, PIECE, STATE_STRIDE, padded_values, values_at_once

PRELUDE = (
    COMMON_PRELUDE
    + """
__device__ __forceinline__ int first_of_warpgroup() {
  int first;
  asm("shfl.sync.idx.b32 %0, %1, 0, 31, -1;" : "=r"(first) : "r"(threadIdx.x / 128 * 128));
  return first;
}
__device__ __forceinline__ int here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
__device__ __forceinline__ void fetch(const void* line) { asm volatile("prefetch.global.L2 [%0];" ::"l"(line)); }
"""
)
VECTORS = 13
TOTAL, SHIFTED, COLUMN, ROW_E, BETA, BAR, OMEGA = range(7)
ROWS_P, ROWS_Y, SQUARES = 7, 9, 11  # each a vector of the queries' rows and one of the keys'


@T.macro
def take_item(cu_seqlens, documents, item, groups, steps, slot: T.Ref, group: T.Ref, place):
    """What a persistent block takes: slot ← that of STATE_STRIDE tokens, group ← the key head, place as `locate`."""
    slot = item // groups
    group = item % groups  # noqa: F841
    locate(cu_seqlens, documents, slot, steps, STATE_STRIDE, place)


@T.macro
def store_dg(dg, first, left, head, low, high, inside, moved, lane):
    """dg of a chunk's `left` tokens from `first` on ← what is summed from a token on, what is summed before it, and
    inside[0], by a warp. low and high, local float32 [2], are of the tokens `lane` and `lane + 32`: [0] is summed from
    the end, [1] from the start. moved: a local float32 [4]."""
    for power in T.unroll(5):
        moved[0] = T.shfl_down(low[0], 1 << power)
        moved[1] = T.shfl_down(high[0], 1 << power)
        moved[2] = T.shfl_up(low[1], 1 << power)
        moved[3] = T.shfl_up(high[1], 1 << power)
        if lane + (1 << power) < 32:
            low[0] += moved[0]
            high[0] += moved[1]
        if lane >= (1 << power):
            low[1] += moved[2]
            high[1] += moved[3]
    # what the other half adds, and the sums that stop at the token before
    moved[0] = T.shfl_sync(high[0], 0)
    moved[1] = T.shfl_sync(low[1], 31)
    moved[2] = T.shfl_up(low[1], 1)
    moved[3] = T.shfl_up(high[1], 1)
    if lane == 0:
        moved[2] = 0.0
        moved[3] = 0.0
    if lane < left:
        dg[first + lane, head] = low[0] + moved[0] + inside[0] + moved[2]
    if lane + 32 < left:
        dg[first + lane + 32, head] = high[0] + inside[0] + moved[1] + moved[3]


def here(x):
    """x, an int32, so that what is computed of it is computed here, not kept through a loop. Needs PRELUDE."""
    return T.call_extern("int32", "here", x)


def gradients_kernel(key_dim, value_dim, dtype, l2norm):
    C = CHUNK
    K, V = key_dim, value_dim
    width = values_at_once(V)
    parts = padded_values(V) // width
    stages, held = (2, 1) if parts == 1 else (4, 2)  # of rows, and of S and dS
    per_item = STATE_STRIDE // C
    folded = folds_decay(dtype)
    consumers = 256
    half = K // 2  # columns of a consumer
    panel = gcd(half, 64)  # columns of a tile that are swizzled together: each consumer has whole ones
    swizzled = {64: make_full_bank_swizzled_layout, 32: make_half_bank_swizzled_layout}.get(
        panel, make_quarter_bank_swizzled_layout
    )
    tokens, heads, groups = T.dynamic("tokens"), T.dynamic("heads"), T.dynamic("groups")
    slots, documents, kept, firsts = (T.dynamic(x) for x in ("slots", "documents", "kept", "firsts"))
    places, members = T.dynamic("places"), T.dynamic("members")
    q_token, q_head = T.dynamic("q_token"), T.dynamic("q_head")
    k_token, k_head = T.dynamic("k_token"), T.dynamic("k_head")
    o_token, o_head = T.dynamic("o_token"), T.dynamic("o_head")
    dq_pieces, dk_pieces, dv_pieces = (T.dynamic(x) for x in ("dq_pieces", "dk_pieces", "dv_pieces"))
    v_token, v_head = T.dynamic("v_token"), T.dynamic("v_head")
    own_rows, own_half = T.GemmWarpPolicy.FullRow, T.GemmWarpPolicy.FullCol  # of a consumer

    @T.macro
    def bring_tile(tile, stage, below, source, full, first, head, column, left):
        """C rows of tile[stage] from `below` on ← the chunk's rows of source[:, head, column:], zero behind V and
        behind the document's end."""
        if left >= C:
            for p in T.unroll(width // 64):
                T.tma_copy(
                    source[first : first + C, head, column + p * 64 : column + (p + 1) * 64],
                    tile[stage, below : below + C, p * 64 : (p + 1) * 64],
                    barrier=full[stage],
                )
        else:
            load_tail(tile, stage, source, here(first), head, column, here(left), width, below)

    @T.macro
    def bring_rows(X, W_tile, now, do, dv, W, full, empty, first, head, part, left):
        """The tiles of `now`, the number of a step and part, ← the chunk's rows of dO, dV and W, once they are free."""
        wait(empty, now % stages, (now // stages + 1) % 2)
        bring_tile(X, now % stages, 0, do, full, first, head, part * width, left)
        bring_tile(X, now % stages, C, dv, full, first, head, part * width, left)
        bring_tile(W_tile, now % stages, 0, W, full, first, head, part * width, left)
        arrive(full, now % stages)

    @T.macro
    def bring_keys(tile, source, full, first, group, left):
        """tile ← the chunk's rows of source[:, group]."""
        if left >= C:
            T.tma_copy(source[first : first + C, group, :], tile, barrier=full[0])
        else:
            load_tail(tile, None, source, here(first), group, 0, here(left), K)

    @T.macro
    def fetch_keys(source, first, group, left, lane):
        """Has the chunk's rows of source[:, group] brought to the L2 cache, by a warp."""
        for half_of_rows in T.unroll(2):
            row = half_of_rows * 32 + lane
            if row < left:
                for line in T.unroll(-(-K // 64)):
                    T.call_extern(
                        "handle", "fetch", T.access_ptr(source[first + row, group, line * 64], "r", extent=PIECE)
                    )

    @T.macro
    def bring_state(source, index, head, part, tile, at, full):
        """tile[at] ← source[index, head], the columns of V of this part, zero behind V."""
        T.tma_copy(source[index, head, part * width : (part + 1) * width, :], tile[at, :, :], barrier=full[at])

    @T.macro
    def repair(dv, X, at, tiny, vec, stage, part, first, left, token_step, base, lane):
        """dv ← β/β̄ ∘ dv, the columns of X[at], if any β of the chunk is tiny, by a warp."""
        if tiny[stage, 0] + tiny[stage, 1] > 0:
            for row in T.serial(T.min(left, C)):
                if vec[stage, BETA, row] < vec[stage, BAR, row]:
                    for turn in T.serial(width // 32):
                        j = turn * 32 + lane
                        if part * width + j < V:
                            dv[(first + row) * token_step + base + part * (width // PIECE) + j // PIECE, j % PIECE] = (
                                T.cast(X[at, C + row, j], "float32") * vec[stage, BETA, row] / vec[stage, BAR, row]
                            )

    @T.macro
    def add_inner(S, dS, at, left, right, out, warp, lane):
        """out[0 : 16] += parts of ⟨S, dS⟩, by two warps: diagonals of products of blocks of 16×16, in turns of two."""
        for turn in T.serial(width // 32):
            row = turn * 2 + warp
            for two in T.serial(K // 32):
                for odd in T.unroll(2):
                    column = two * 2 + odd
                    T.ptx_ldmatrix(
                        T.bool(False), 4,
                        T.access_ptr(S[at, row * 16 + lane % 16, column * 16 + lane // 16 * 8], "r", extent=8),
                        T.access_ptr(left[0], "w", extent=8),
                    )  # fmt: skip
                    T.ptx_ldmatrix(
                        T.bool(False), 4,
                        T.access_ptr(
                            dS[at, row * 16 + lane // 16 * 8 + lane % 8, column * 16 + lane // 8 % 2 * 8], "r", extent=8
                        ),
                        T.access_ptr(right[0], "w", extent=8),
                    )  # fmt: skip
                    multiply(out, odd * 2, left, right, dtype)

    @T.macro
    def take_inner(S, dS, left, right, out, warp, lane, dS_full, dS_empty, S_full, S_empty, step):
        """`add_inner` of all parts, once they are there, and gives them back."""
        for x in T.unroll(16):
            out[x] = 0.0
        for part in T.serial(parts):
            now = step * parts + part
            wait(dS_full, now % held, now // held % 2)
            wait(S_full, now % held, now // held % 2)
            add_inner(S, dS, now % held, left, right, out, warp, lane)
            release_tiles()
            arrive(dS_empty, now % held)
            arrive(S_empty, now % held)

    @T.macro
    def sum_inner(out, lane):
        """out[0] ← a warp's part of ⟨S, dS⟩; the diagonal of a block of 16×16 is in elements 0, 1, 6 and 7 of 8."""
        odd = lane // 4 % 2 == 1  # which of a lane's two elements is on the diagonal, if any
        out[0] = T.if_then_else(odd, out[1] + out[7] + out[9] + out[15], out[0] + out[6] + out[8] + out[14])
        out[0] = T.if_then_else(lane // 8 == lane % 4, out[0], 0.0)
        for distance in T.unroll(5):
            out[0] += T.shfl_xor(out[0], 16 >> distance)

    @T.macro
    def store_state(state, tile, at, target, worker, member, part, warp, lane):
        """target[worker, member], this part and this consumer's half, ← the state, each warp's own through tile[at]."""
        for i, j in T.Parallel(width, K):
            tile[
                at, i if width == 2 * C else j // half * C + i,
                j % half if width == C else j // half * 64 + j % half,
            ] = state[i, j]  # fmt: skip
        T.call_extern("handle", "__syncwarp")
        for atom in T.unroll(width // 64):
            for n in T.unroll(half // 16):
                row = atom * 64 + warp % 4 * 16 + (n * 32 + lane) // (half // PIECE)
                piece = (n * 32 + lane) % (half // PIECE) * PIECE
                for x in T.vectorized(PIECE):
                    target[worker, member, part * width + row, warp // 4 * half + piece + x] = tile[
                        at, row if width == 2 * C else warp // 4 * C + row,
                        piece + x if width == C else warp // 4 * 64 + piece + x,
                    ]  # fmt: skip

    @T.macro
    def store_rows(tile, at, target, first, left, token_step, base, warp, lane):
        """target ← what this warp has left of a [C, K] in tile[at], by pieces."""
        for n in T.unroll(half // 16):
            row = warp % 4 * 16 + (n * 32 + lane) // (half // PIECE)
            piece = (n * 32 + lane) % (half // PIECE)
            if row < left:
                for x in T.vectorized(PIECE):
                    target[(first + row) * token_step + base + warp // 4 * (half // PIECE) + piece, x] = tile[
                        at, warp // 4 * C + row, piece * PIECE + x
                    ]

    @T.macro
    def add(total, x):
        """total += x, [C, K], here: put off, both would be kept."""
        for i, j in T.Parallel(C, K):
            total[i, j] += x[i, j]
        T.warpgroup_fence_operand(total, num_regs=half // 2)

    @T.macro
    def weigh_rows(x, vec, stage, row):
        """x_i [C, K] ← vec[stage, row]_i x_i"""
        for i, j in T.Parallel(C, K):
            x[i, j] *= vec[stage, row, i]

    @T.macro
    def advance(state, gamma, W, at, k, operand, vec, stage):
        """Starts the product that makes the state after the chunk of the one before it."""
        for i, j in T.Parallel(width, K):
            state[i, j] *= gamma
        if folded:
            T.wgmma_gemm(W[at, :, :], k, state, transpose_A=True, policy=own_half)
        else:
            for i, j in T.Parallel(width, C):
                operand[i, j] = T.cast(W[at, j, i], "float32") * vec[stage, ROW_E, j]
            T.wgmma_gemm(operand, k, state, policy=own_half)

    @T.macro
    def row_sums(x, y, products, sums):
        """sums [2 C] ← of each row of x ∘ y, [C, K], the half that either consumer has."""
        for r, j in T.Parallel(2 * C, half):
            products[r, j] = x[r % C, r // C * half + j] * T.cast(y[r % C, r // C * half + j], "float32")
        T.reduce_sum(products, sums, dim=1)
        T.warpgroup_fence_operand(y, num_regs=half // 4)  # or it is kept in float32

    @T.macro
    def subtract(total, sums, own):
        """total [C, K] ← total − sums ∘ own; sums [2 C] has each row for either consumer."""
        for r, j in T.Parallel(2 * C, half):
            total[r % C, r // C * half + j] -= sums[r] * T.cast(own[r % C, r // C * half + j], "float32")

    @T.prim_func
    def gradients(
        q: T.StridedTensor((tokens, groups, K), (q_token, q_head, 1), dtype),
        k: T.StridedTensor((tokens, groups, K), (k_token, k_head, 1), dtype),
        do: T.StridedTensor((tokens, heads, V), (o_token, o_head, 1), dtype),
        W: T.Tensor((tokens, heads, V), dtype),
        dv: T.StridedTensor((tokens, heads, V), (v_token, v_head, 1), dtype),
        states: T.Tensor((kept, heads, V, K), dtype),
        first_states: T.Tensor((firsts, heads, V, K), dtype),
        d_states: T.Tensor((slots, heads, V, K), dtype),
        gates: T.Tensor((slots, heads, 2, C), "float32"),
        norms: T.Tensor((slots, groups, 2, C), "float32"),
        cu_seqlens: T.Tensor((documents + 1,), "int32"),
        scratch: T.Tensor((places, members, padded_values(V), K), dtype),
        dv_again: T.Tensor((dv_pieces, PIECE), dtype),  # dv as it is written, like dq and dk
        dq: T.Tensor((dq_pieces, PIECE), dtype),
        dk: T.Tensor((dk_pieces, PIECE), dtype),
        dg: T.Tensor((tokens, heads), "float32"),
        dbeta: T.Tensor((tokens, heads), "float32"),
        dv_token: T.int32,  # steps between tokens and heads of what is written, in pieces
        dv_head: T.int32,
        dq_token: T.int32,
        dq_head: T.int32,
        dk_token: T.int32,
        dk_head: T.int32,
        scale: T.float32,
        steps: T.int32,
        ratio: T.int32,
        workers: T.int32,
        with_first: T.int32,
    ):
        with T.Kernel(workers, threads=384, prelude=PRELUDE) as (worker,):
            q_s, k_s = T.alloc_shared((C, K), dtype), T.alloc_shared((C, K), dtype)
            X_s = T.alloc_shared((stages, 2 * C, width), dtype)  # dO, and below it dV
            W_s = T.alloc_shared((stages, C, width), dtype)
            S_s = T.alloc_shared((held, width, K), dtype)
            dS_s = T.alloc_shared((held, width, K), dtype)
            P_s = T.alloc_shared((2 * C, C), dtype)  # F, and below it −H
            diagonal_s = T.alloc_shared((2 * C,), "float32")
            vec = T.alloc_shared((2, VECTORS, C), "float32")
            tiny_s = T.alloc_shared((2, 2), "int32")  # of the chunk's halves: does β̄ differ from β anywhere?
            low_s = T.alloc_shared((2 * C,), "float32")  # what dg is of, summed over either half of the columns
            e_s = T.alloc_shared((2 * C,), "float32")
            squares_s = T.alloc_shared((2, 2 * C), "float32")
            inner_s = T.alloc_shared((1,), "float32")

            # the consumers'
            dQ, dK, A, B = (T.alloc_fragment((C, K), "float32") for _ in range(4))
            state = T.alloc_fragment((width, K), "float32")
            P = T.alloc_fragment((2 * C, C), "float32")
            picked = T.alloc_fragment((2 * C, C), "float32")
            operand = T.alloc_fragment((width, C), dtype)
            E = T.alloc_fragment((C, K), "float32")
            D = T.alloc_fragment((C, K), "float32")
            products = T.alloc_fragment((2 * C, half), "float32")
            keys_f, other_f = T.alloc_fragment((C, K), dtype), T.alloc_fragment((C, K), dtype)  # of q or k
            diagonal, y_f, d_f, e_f, f_f, sums = (T.alloc_fragment((2 * C,), "float32") for _ in range(6))
            # the third's
            left_16 = T.alloc_local((8,), dtype)
            right_16 = T.alloc_local((8,), dtype)
            inside = T.alloc_local((16,), "float32")
            low, high = T.alloc_local((2,), "float32"), T.alloc_local((2,), "float32")
            moved = T.alloc_local((4,), "float32")

            rows_full, rows_empty = T.alloc_barrier([32] * stages), T.alloc_barrier([256] * stages)
            S_full, S_empty = T.alloc_barrier([32] * held), T.alloc_barrier([320] * held)
            dS_full, dS_empty = T.alloc_barrier([32] * held), T.alloc_barrier([320] * held)
            keys_full, keys_empty = T.alloc_barrier([32]), T.alloc_barrier([256])
            vec_full, vec_empty = T.alloc_barrier([32] * 2), T.alloc_barrier([288] * 2)
            diagonal_full, repaired = T.alloc_barrier([256]), T.alloc_barrier([32])
            sums_full, sums_empty = T.alloc_barrier([288]), T.alloc_barrier([32])
            T.annotate_layout(
                {x: swizzled(x) for x in (q_s, k_s, S_s, dS_s)}
                | {x: make_full_bank_swizzled_layout(x) for x in (X_s, W_s)}
                | {products: accumulator(2 * C, half)}
            )

            thread = T.get_thread_binding()
            warp = thread // 32
            items = (tokens // STATE_STRIDE + documents) * groups
            step = T.alloc_var("int32", init=0)  # steps done
            chunk = T.alloc_var("int32", init=0)  # chunks done
            place = T.alloc_local((6,), "int32")
            slot = T.alloc_var("int32")
            group = T.alloc_var("int32")
            first = T.alloc_var("int32")
            left = T.alloc_var("int32")  # tokens from the chunk's first to the document's end
            # of the loads, which bring the rows of a step beside the states of the step before
            member_of_rows, last_first, last_member = (T.alloc_var("int32", init=0) for _ in range(3))

            if thread < consumers:
                T.set_max_nreg(216, 1)
                for turn in T.serial(T.ceildiv(items - worker, workers)):
                    take_item(cu_seqlens, documents, worker + turn * workers, groups, steps, slot, group, place)
                    for c in T.serial(per_item):
                        first = place[FIRST] + c * C
                        left = place[LEFT] - c * C
                        if left > 0:
                            T.clear(dQ)
                            T.clear(dK)
                            T.clear(f_f)
                            for member in T.serial(ratio):
                                stage = step % 2
                                wait(vec_full, stage, step // 2 % 2)
                                if parts > 1:
                                    T.clear(P)
                                for part in T.unroll(parts):
                                    now = step * parts + part
                                    wait(rows_full, now % stages, now // stages % 2)
                                    T.wgmma_gemm(
                                        X_s[now % stages, :, :], W_s[now % stages, :, :], P,
                                        transpose_B=True, clear_accum=parts == 1, policy=own_rows,
                                    )  # fmt: skip
                                T.wait_wgmma(0)
                                T.warpgroup_fence_operand(P, num_regs=C // 2)
                                for i, j in T.Parallel(2 * C, C):
                                    picked[i, j] = T.Select(i % C == j, P[i, j], T.float32(0.0))
                                T.reduce_sum(picked, diagonal, dim=1)
                                for i, j in T.Parallel(2 * C, C):
                                    P[i, j] *= vec[stage, ROWS_P + i // C, i % C]
                                if not folded or vec[stage, TOTAL, C - 1] <= -FAR:
                                    for i, j in T.Parallel(2 * C, C):
                                        P[i, j] *= exp2(vec[stage, TOTAL, i % C] - vec[stage, SHIFTED, j])
                                T.warpgroup_fence_operand(P, num_regs=C // 2)
                                for i, j in T.Parallel(2 * C, C):
                                    P[i, j] = T.Select(i % C > j, P[i, j], T.float32(0.0))
                                T.copy(P, P_s)
                                for i in T.Parallel(2 * C, loop_layout=accumulator_rows(2 * C)):
                                    diagonal_s[i] = diagonal[i]
                                release_tiles()
                                arrive(diagonal_full, 0)
                                T.sync_threads(1, consumers)
                                wait(keys_full, 0, chunk % 2)
                                for i in T.Parallel(2 * C):
                                    f_f[i] += diagonal_s[i % C] * vec[stage, ROWS_P, i % C] * vec[stage, COLUMN, i % C]
                                T.wgmma_gemm(P_s[0:C, :], q_s, D, transpose_A=True, clear_accum=True, policy=own_half)
                                T.wgmma_gemm(P_s[C : 2 * C, :], k_s, D, transpose_A=True, policy=own_half)
                                if parts == 1:
                                    wait(dS_full, 0, step % 2)
                                    T.wgmma_gemm(W_s[stage, :, :], dS_s[0, :, :], E, clear_accum=True, policy=own_half)
                                    T.copy(k_s, keys_f)
                                    T.wait_wgmma(1)
                                    T.warpgroup_fence_operand(D, num_regs=half // 2)
                                    add(dK, D)
                                    row_sums(D, keys_f, products, d_f)
                                    T.wait_wgmma(0)
                                    T.warpgroup_fence_operand(E, num_regs=half // 2)
                                    arrive(dS_empty, 0)
                                    if not folded:
                                        weigh_rows(E, vec, stage, ROW_E)
                                    add(dK, E)
                                    row_sums(E, keys_f, products, e_f)
                                    wait(S_full, 0, step % 2)
                                    T.wgmma_gemm(X_s[stage, 0:C, :], S_s[0, :, :], A, clear_accum=True, policy=own_half)
                                    T.wgmma_gemm(
                                        X_s[stage, C : 2 * C, :], S_s[0, :, :], B, clear_accum=True, policy=own_half
                                    )
                                    T.wait_wgmma(1)
                                    T.warpgroup_fence_operand(A, num_regs=half // 2)
                                    weigh_rows(A, vec, stage, ROWS_Y)
                                    T.wgmma_gemm(P_s[0:C, :], k_s, A, policy=own_half)
                                    T.wait_wgmma(1)
                                    T.warpgroup_fence_operand(B, num_regs=half // 2)
                                    T.copy(q_s, keys_f)
                                    weigh_rows(B, vec, stage, ROWS_Y + 1)
                                    T.wgmma_gemm(P_s[C : 2 * C, :], k_s, B, policy=own_half)
                                    T.wait_wgmma(1)
                                    T.warpgroup_fence_operand(A, num_regs=half // 2)
                                    add(dQ, A)
                                    row_sums(A, keys_f, products, y_f)
                                    T.copy(k_s, keys_f)
                                    T.wait_wgmma(0)
                                    T.warpgroup_fence_operand(B, num_regs=half // 2)
                                    T.sync_threads(1, consumers)  # P_s, and these rows of X_s, have been read
                                    add(dK, B)
                                    row_sums(B, keys_f, products, sums)
                                    for i in T.Parallel(2 * C):
                                        y_f[i] += sums[i]
                                    gamma = T.alloc_var("float32")
                                    gamma = T.exp2(vec[stage, TOTAL, C - 1])
                                    T.call_extern("handle", "hold_memory")  # or all of it is loaded too early
                                    T.copy(S_s[0, :, :], state)
                                    advance(state, gamma, W_s, stage, k_s, operand, vec, stage)
                                    T.wait_wgmma(0)
                                    T.warpgroup_fence_operand(state, num_regs=width * K // 256)
                                    wait(repaired, 0, step % 2)
                                    if c + 1 < per_item and left > C:
                                        store_state(state, X_s, stage, scratch, worker, member, 0, warp, thread % 32)
                                    release_tiles()
                                    if member < ratio - 1:
                                        arrive(rows_empty, stage)
                                    arrive(S_empty, 0)
                                else:
                                    T.copy(k_s, keys_f)
                                    T.wait_wgmma(0)
                                    T.warpgroup_fence_operand(D, num_regs=half // 2)
                                    add(dK, D)
                                    row_sums(D, keys_f, products, d_f)
                                    T.clear(e_f)
                                    T.clear(A)
                                    T.clear(B)
                                    gamma = T.alloc_var("float32")
                                    gamma = T.exp2(vec[stage, TOTAL, C - 1])
                                    for part in T.serial(parts):
                                        now = step * parts + part
                                        at = now % held
                                        row = now % stages
                                        wait(dS_full, at, now // held % 2)
                                        T.wgmma_gemm(
                                            W_s[row, :, :], dS_s[at, :, :], E, clear_accum=True, policy=own_half
                                        )
                                        wait(S_full, at, now // held % 2)
                                        T.wgmma_gemm(X_s[row, 0:C, :], S_s[at, :, :], A, policy=own_half)
                                        T.wgmma_gemm(X_s[row, C : 2 * C, :], S_s[at, :, :], B, policy=own_half)
                                        T.wait_wgmma(2)
                                        T.warpgroup_fence_operand(E, num_regs=half // 2)
                                        arrive(dS_empty, at)
                                        if not folded:
                                            weigh_rows(E, vec, stage, ROW_E)
                                        add(dK, E)
                                        T.copy(k_s, keys_f)
                                        row_sums(E, keys_f, products, sums)
                                        for i in T.Parallel(2 * C):
                                            e_f[i] += sums[i]
                                        T.copy(S_s[at, :, :], state)
                                        advance(state, gamma, W_s, row, k_s, operand, vec, stage)
                                        T.wait_wgmma(0)
                                        T.warpgroup_fence_operand(A, num_regs=half // 2)
                                        T.warpgroup_fence_operand(B, num_regs=half // 2)
                                        T.warpgroup_fence_operand(state, num_regs=width * K // 256)
                                        wait(repaired, 0, step % 2)
                                        T.sync_threads(1, consumers)  # these rows of X_s have been read
                                        if c + 1 < per_item and left > C:
                                            store_state(
                                                state, X_s, row, scratch, worker, member, part, warp, thread % 32
                                            )
                                        release_tiles()
                                        if member < ratio - 1 or part < parts - 1:
                                            arrive(rows_empty, row)
                                        arrive(S_empty, at)
                                    weigh_rows(A, vec, stage, ROWS_Y)
                                    T.wgmma_gemm(P_s[0:C, :], k_s, A, policy=own_half)
                                    weigh_rows(B, vec, stage, ROWS_Y + 1)
                                    T.wgmma_gemm(P_s[C : 2 * C, :], k_s, B, policy=own_half)
                                    T.copy(q_s, keys_f)
                                    T.wait_wgmma(0)
                                    T.warpgroup_fence_operand(A, num_regs=half // 2)
                                    T.warpgroup_fence_operand(B, num_regs=half // 2)
                                    add(dQ, A)
                                    row_sums(A, keys_f, products, y_f)
                                    T.copy(k_s, keys_f)
                                    add(dK, B)
                                    row_sums(B, keys_f, products, sums)
                                    for i in T.Parallel(2 * C):
                                        y_f[i] += sums[i]
                                    T.sync_threads(1, consumers)  # P_s has been read
                                wait(sums_empty, 0, (step + 1) % 2)
                                for i in T.Parallel(2 * C, loop_layout=accumulator_rows(2 * C)):
                                    low_s[i] = y_f[i] - d_f[i]
                                for i in T.Parallel(2 * C, loop_layout=accumulator_rows(2 * C)):
                                    e_s[i] = e_f[i]
                                release_tiles()
                                arrive(sums_full, 0)
                                if l2norm and member == ratio - 1:
                                    for i in T.Parallel(2 * C):
                                        d_f[i] = vec[stage, SQUARES, i % C]
                                    for i in T.Parallel(2 * C):
                                        e_f[i] = vec[stage, SQUARES + 1, i % C]
                                arrive(vec_empty, stage)
                                step += 1
                            for i in T.Parallel(2 * C):
                                f_f[i] = -f_f[i]
                            T.copy(k_s, keys_f)
                            T.copy(q_s, other_f)
                            release_tiles()
                            arrive(keys_empty, 0)
                            subtract(dQ, f_f, keys_f)
                            subtract(dK, f_f, other_f)
                            if l2norm:
                                row_sums(dQ, other_f, products, sums)
                                for i in T.Parallel(2 * C, loop_layout=accumulator_rows(2 * C)):
                                    squares_s[0, i] = sums[i]
                                row_sums(dK, keys_f, products, sums)
                                for i in T.Parallel(2 * C, loop_layout=accumulator_rows(2 * C)):
                                    squares_s[1, i] = sums[i]
                            T.sync_threads(1, consumers)
                            if l2norm:
                                for i in T.Parallel(2 * C):
                                    d_f[i] *= squares_s[0, i % C] + squares_s[0, C + i % C]
                                for i in T.Parallel(2 * C):
                                    e_f[i] *= squares_s[1, i % C] + squares_s[1, C + i % C]
                                subtract(dQ, d_f, other_f)
                                subtract(dK, e_f, keys_f)
                            last = (step * parts - 1) % stages  # rows that are not given back yet
                            for x, target, token_step, head_step in (
                                (dQ, dq, dq_token, dq_head),
                                (dK, dk, dk_token, dk_head),
                            ):
                                for i, j in T.Parallel(C, K):
                                    X_s[last, j // half * C + i, j % half] = x[i, j]
                                T.call_extern("handle", "__syncwarp")
                                store_rows(
                                    X_s, last, target, first, left, token_step, group * head_step, warp, thread % 32
                                )
                                T.call_extern("handle", "__syncwarp")
                            release_tiles()
                            arrive(rows_empty, last)
                            chunk += 1
            else:
                T.set_max_nreg(72, 0)  # launched with 168 each, which is all there is to share
                if thread < 256 + 32:
                    for turn in T.serial(T.ceildiv(items - worker, workers)):
                        take_item(cu_seqlens, documents, worker + turn * workers, groups, steps, slot, group, place)
                        # one turn more than steps: the states of a step, and a part behind them the rows of the next
                        count = T.max(T.min(per_item, T.ceildiv(place[LEFT], C)), 0) * ratio
                        first = place[FIRST]
                        member_of_rows = 0
                        for at_turn in T.serial(T.if_then_else(count > 0, count + 1, 0)):
                            # a loop of one part is unrolled: rolled, it spills what it keeps
                            for part in T.unroll(parts + 1) if parts == 1 else T.serial(parts + 1):
                                if at_turn > 0 and part < parts:
                                    now = (step - 1) * parts + part
                                    chunk_of_item = (last_first - place[FIRST]) // C
                                    head = group * ratio + last_member
                                    wait(dS_empty, now % held, (now // held + 1) % 2)
                                    bring_state(
                                        d_states, place[BASE] + chunk_of_item, head, part, dS_s, now % held, dS_full
                                    )
                                    arrive(dS_full, now % held)
                                    wait(S_empty, now % held, (now // held + 1) % 2)
                                    if last_first > place[FIRST]:
                                        acquire_stores()
                                        bring_state(scratch, worker, last_member, part, S_s, now % held, S_full)
                                    elif place[FIRST] == cu_seqlens[place[0]]:
                                        bring_state(
                                            first_states, place[0] * with_first, head, part, S_s, now % held, S_full
                                        )
                                    else:
                                        bring_state(states, slot - place[0] - 1, head, part, S_s, now % held, S_full)
                                    arrive(S_full, now % held)
                                    if part == 0 and last_member == 0:
                                        left = place[LEFT] + place[FIRST] - last_first
                                        wait(keys_empty, 0, (chunk + 1) % 2)
                                        bring_keys(q_s, q, keys_full, last_first, group, left)
                                        bring_keys(k_s, k, keys_full, last_first, group, left)
                                        arrive(keys_full, 0)
                                        chunk += 1
                                        if chunk_of_item + 1 < per_item:
                                            fetch_keys(q, last_first + C, group, left - C, thread % 32)
                                            fetch_keys(k, last_first + C, group, left - C, thread % 32)
                                if at_turn < count and part > 0:
                                    bring_rows(
                                        X_s, W_s, step * parts + part - 1, do, dv, W, rows_full, rows_empty, first,
                                        group * ratio + member_of_rows, part - 1, place[LEFT] + place[FIRST] - first,
                                    )  # fmt: skip
                            if at_turn < count:
                                step += 1
                            last_first = first
                            last_member = member_of_rows
                            member_of_rows += 1
                            if member_of_rows == ratio:
                                member_of_rows = 0
                                first += C
                elif thread < 256 + 64:
                    lane = thread - 288
                    chi, kappa = T.alloc_local((2,), "float32"), T.alloc_local((2,), "float32")
                    for turn in T.serial(T.ceildiv(items - worker, workers)):
                        take_item(cu_seqlens, documents, worker + turn * workers, groups, steps, slot, group, place)
                        for c in T.serial(per_item):
                            left = place[LEFT] - c * C
                            if left > 0:
                                for h in T.unroll(2):
                                    chi[h] = norms[place[BASE] + c, group, 0, lane + h * 32]
                                    kappa[h] = norms[place[BASE] + c, group, 1, lane + h * 32]
                                for member in T.serial(ratio):
                                    head = group * ratio + member
                                    stage = step % 2
                                    whole = gates[place[BASE] + c, head, 0, C - 1] * LOG2E
                                    wait(vec_empty, stage, (step // 2 + 1) % 2)
                                    for h in T.unroll(2):
                                        u = lane + h * 32
                                        total = gates[place[BASE] + c, head, 0, u] * LOG2E
                                        beta = gates[place[BASE] + c, head, 1, u]
                                        rho = T.exp2(whole - total)
                                        bar = T.max(beta, BETA_MIN[dtype])
                                        tiny = T.any_sync(beta < bar)
                                        kappa_fix = kappa[h] * beta / bar
                                        omega = T.alloc_var("float32")
                                        omega = weight_of_W(beta, rho, kappa[h], dtype)
                                        column = T.alloc_var("float32")
                                        decay = T.alloc_var("float32")
                                        column = kappa[h] * beta / omega
                                        decay = 1.0
                                        vec[stage, TOTAL, u] = total
                                        vec[stage, SHIFTED, u] = total - T.log2(column)
                                        vec[stage, ROW_E, u] = rho * column
                                        if folded and whole > -FAR:  # then u is 1/ρ, and Γ_ij u_j depends on i alone
                                            decay = T.exp2(total - whole)
                                            column = 1.0
                                        vec[stage, COLUMN, u] = column
                                        vec[stage, ROWS_P, u] = scale * chi[h] * decay
                                        vec[stage, ROWS_P + 1, u] = -kappa_fix * decay
                                        vec[stage, OMEGA, u] = omega
                                        vec[stage, ROWS_Y, u] = scale * chi[h] * T.exp2(total)
                                        vec[stage, ROWS_Y + 1, u] = -T.exp2(total) * kappa_fix
                                        vec[stage, SQUARES, u] = chi[h] * chi[h]
                                        vec[stage, SQUARES + 1, u] = kappa[h] * kappa[h]
                                        vec[stage, BETA, u] = beta
                                        vec[stage, BAR, u] = bar
                                        if lane == 0:
                                            tiny_s[stage, h] = tiny
                                    arrive(vec_full, stage)
                                    step += 1
                elif thread < 256 + 96:
                    lane = thread - 320
                    for turn in T.serial(T.ceildiv(items - worker, workers)):
                        take_item(cu_seqlens, documents, worker + turn * workers, groups, steps, slot, group, place)
                        for c in T.serial(per_item):
                            first = place[FIRST] + c * C
                            left = place[LEFT] - c * C
                            if left > 0:
                                for member in T.serial(ratio):
                                    head = group * ratio + member
                                    stage = step % 2
                                    wait(vec_full, stage, step // 2 % 2)
                                    wait(diagonal_full, 0, step % 2)
                                    for h in T.unroll(2):
                                        u = lane + h * 32
                                        if u < left:
                                            dbeta[here(first) + u, head] = diagonal_s[C + u] / (
                                                vec[stage, BAR, u] * vec[stage, OMEGA, u]
                                            )
                                    for part in T.serial(parts):
                                        now = step * parts + part
                                        wait(rows_full, now % stages, now // stages % 2)
                                        repair(
                                            dv_again, X_s, now % stages, tiny_s, vec, stage, part, here(first), left,
                                            dv_token, head * dv_head, lane,
                                        )  # fmt: skip
                                    release_tiles()
                                    arrive(repaired, 0)
                                    take_inner(
                                        S_s, dS_s, left_16, right_16, inside, 0, lane, dS_full, dS_empty, S_full,
                                        S_empty, step,
                                    )  # fmt: skip
                                    sum_inner(inside, lane)
                                    wait(sums_empty, 0, (step + 1) % 2)
                                    if lane == 0:
                                        inner_s[0] = inside[0] * T.exp2(vec[stage, TOTAL, C - 1])
                                    release_tiles()
                                    arrive(sums_full, 0)
                                    arrive(vec_empty, stage)
                                    step += 1
                else:
                    lane = thread - 352
                    for turn in T.serial(T.ceildiv(items - worker, workers)):
                        take_item(cu_seqlens, documents, worker + turn * workers, groups, steps, slot, group, place)
                        for c in T.serial(per_item):
                            first = place[FIRST] + c * C
                            left = place[LEFT] - c * C
                            if left > 0:
                                for member in T.serial(ratio):
                                    take_inner(
                                        S_s, dS_s, left_16, right_16, inside, 1, lane, dS_full, dS_empty, S_full,
                                        S_empty, step,
                                    )  # fmt: skip
                                    sum_inner(inside, lane)
                                    head = group * ratio + member
                                    inside[0] *= T.exp2(gates[here(place[BASE] + c), head, 0, C - 1] * LOG2E)
                                    wait(sums_full, 0, step % 2)
                                    low[0] = low_s[lane] + low_s[lane + C]
                                    high[0] = low_s[lane + 32] + low_s[lane + 32 + C]
                                    low[1] = e_s[lane] + e_s[lane + C]
                                    high[1] = e_s[lane + 32] + e_s[lane + 32 + C]
                                    inside[0] += inner_s[0]
                                    release_tiles()
                                    arrive(sums_empty, 0)
                                    store_dg(dg, first, left, head, low, high, inside, moved, lane)
                                    step += 1

    return gradients
