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

    loads     dO, W, dV two steps ahead, S and dS one, q and k a chunk
    vectors   the step's vectors, a step ahead or two
    inner     dβ, dV repaired where β̄ is not β, and half of ⟨S, dS⟩: diagonals of products of blocks of 16×16
    dg        the other half, and dg from what the consumers have summed up

Barriers (arrivals), all phases in the order of the steps: `rows` dO, W, dV of a step, two stages (32; 256 back); `S`
and `dS` (32; 320); `keys` q and k of a chunk (32; 256); `vec` vectors, two stages (32; 288); `diagonal` that of P
(256); `repaired` dV (32); `sums` what dg is of (288; 32). An arrival at `S_empty` also says that the next state of this
step and of all before is on its way to `scratch`. Rows of a chunk's last step are given back behind dq and dk, which go
through their tile. At the named barrier 1 the consumers meet where P is there, and where it and the rows were read.

V is at most 128; `gradients_wide` has more.

Registers of a consumer, at most: dQ and dK 64, A and B 64, q or k 16. What has been loaded a step ago costs more than
to load it again, and what is spilled is read from L2, as shared memory leaves nothing of the L1 cache: 400 cycles each.
Shared memory at K = V = 128: rows 96 KB, S 32, dS 32, q and k 32, P 16, vectors 7, sums 3.
"""

from math import gcd

import tilelang.language as T
from tilelang.layout import (
    make_full_bank_swizzled_layout,
    make_half_bank_swizzled_layout,
    make_quarter_bank_swizzled_layout,
)

from qlakernels.gated_delta_rule.hopper.chunk import FAR, multiply, store_dg, sum_over_tokens
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
    release_tiles,
    take_item,
    wait,
    weight_of_W,
)
from qlakernels.gated_delta_rule.hopper.common import PRELUDE as COMMON_PRELUDE
from qlakernels.gated_delta_rule.hopper.sizes import CHUNK, PIECE, STATE_STRIDE, padded_values

PRELUDE = (
    COMMON_PRELUDE
    + """
__device__ __forceinline__ int first_of_warpgroup() {
  int first;
  asm("shfl.sync.idx.b32 %0, %1, 0, 31, -1;" : "=r"(first) : "r"(threadIdx.x / 128 * 128));
  return first;
}
__device__ __forceinline__ void fetch(const void* line) { asm volatile("prefetch.global.L2 [%0];" ::"l"(line)); }
"""
)
VECTORS = 13
TOTAL, SHIFTED, COLUMN, ROW_E, BETA, BAR, OMEGA = range(7)
ROWS_P, ROWS_Y, SQUARES = 7, 9, 11  # each a vector of the queries' rows and one of the keys'


def gradients_kernel(key_dim, value_dim, dtype, l2norm):
    C = CHUNK
    K, V = key_dim, value_dim
    width = padded_values(V)
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
    def bring_rows(tile, stage, below, source, full, first, head, left):
        """C rows of tile[stage] from `below` on ← the chunk's rows of source[:, head], zero behind V and behind the
        document's end."""
        if left >= C:
            for p in T.unroll(width // 64):
                T.tma_copy(
                    source[first : first + C, head, p * 64 : (p + 1) * 64],
                    tile[stage, below : below + C, p * 64 : (p + 1) * 64],
                    barrier=full[stage],
                )
        else:
            load_tail(tile, stage, source, first, head, 0, left, width, below)

    @T.macro
    def bring_keys(tile, source, full, first, group, left):
        """tile ← the chunk's rows of source[:, group]."""
        if left >= C:
            T.tma_copy(source[first : first + C, group, :], tile, barrier=full[0])
        else:
            load_tail(tile, None, source, first, group, 0, left, K)

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
    def bring_state(source, index, head, tile, full):
        """tile ← source[index, head], zero behind V."""
        T.tma_copy(source[index, head, 0:width, :], tile, barrier=full[0])

    @T.macro
    def repair(dv, X, tiny, vec, stage, first, left, token_step, base, lane):
        """dv ← β/β̄ ∘ dv, if any β of the chunk is tiny, by a warp."""
        if tiny[stage, 0] + tiny[stage, 1] > 0:
            for row in T.serial(T.min(left, C)):
                if vec[stage, BETA, row] < vec[stage, BAR, row]:
                    for turn in T.serial(width // 32):
                        j = turn * 32 + lane
                        if j < V:
                            dv[(first + row) * token_step + base + j // PIECE, j % PIECE] = (
                                T.cast(X[stage, C + row, j], "float32") * vec[stage, BETA, row] / vec[stage, BAR, row]
                            )

    @T.macro
    def add_inner(S, dS, left, right, out, warp, lane):
        """out[0 : 16] += parts of ⟨S, dS⟩, by two warps: diagonals of products of blocks of 16×16, in turns of two."""
        for turn in T.serial(width // 32):
            row = turn * 2 + warp
            for two in T.serial(K // 32):
                for odd in T.unroll(2):
                    column = two * 2 + odd
                    T.ptx_ldmatrix(
                        T.bool(False), 4,
                        T.access_ptr(S[row * 16 + lane % 16, column * 16 + lane // 16 * 8], "r", extent=8),
                        T.access_ptr(left[0], "w", extent=8),
                    )  # fmt: skip
                    T.ptx_ldmatrix(
                        T.bool(False), 4,
                        T.access_ptr(
                            dS[row * 16 + lane // 16 * 8 + lane % 8, column * 16 + lane // 8 % 2 * 8], "r", extent=8
                        ),
                        T.access_ptr(right[0], "w", extent=8),
                    )  # fmt: skip
                    multiply(out, odd * 2, left, right, dtype)

    @T.macro
    def take_inner(S, dS, left, right, out, warp, lane, dS_full, dS_empty, S_full, S_empty, step):
        """`add_inner`, once both are there, and gives them back."""
        wait(dS_full, 0, step % 2)
        wait(S_full, 0, step % 2)
        add_inner(S, dS, left, right, out, warp, lane)
        release_tiles()
        arrive(dS_empty, 0)
        arrive(S_empty, 0)

    @T.macro
    def sum_inner(out, lane):
        """out[0] ← a warp's part of ⟨S, dS⟩; the diagonal of a block of 16×16 is in elements 0, 1, 6 and 7 of 8."""
        odd = lane // 4 % 2 == 1  # which of a lane's two elements is on the diagonal, if any
        out[0] = T.if_then_else(odd, out[1] + out[7] + out[9] + out[15], out[0] + out[6] + out[8] + out[14])
        out[0] = T.if_then_else(lane // 8 == lane % 4, out[0], 0.0)
        for distance in T.unroll(5):
            out[0] += T.shfl_xor(out[0], 16 >> distance)

    @T.macro
    def store_state(tile, at, target, worker, member, warp, lane):
        """target[worker, member], this consumer's half, ← what this warp has left of the state in tile[at]."""
        for atom in T.unroll(width // 64):
            for n in T.unroll(half // 16):
                row = atom * 64 + warp % 4 * 16 + (n * 32 + lane) // (half // PIECE)
                piece = (n * 32 + lane) % (half // PIECE) * PIECE
                for x in T.vectorized(PIECE):
                    target[worker, member, row, warp // 4 * half + piece + x] = tile[
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
            X_s = T.alloc_shared((2, 2 * C, width), dtype)  # dO, and below it dV
            W_s = T.alloc_shared((2, C, width), dtype)
            S_s = T.alloc_shared((width, K), dtype)
            dS_s = T.alloc_shared((width, K), dtype)
            P_s = T.alloc_shared((2 * C, C), dtype)  # F, and below it −H
            diagonal_s = T.alloc_shared((2 * C,), "float32")
            vec = T.alloc_shared((2, VECTORS, C), "float32")
            tiny_s = T.alloc_shared((2, 2), "int32")  # of the chunk's halves: does β̄ differ from β anywhere?
            low_s = T.alloc_shared((2 * C,), "float32")  # what dg is of, summed over either half of the columns
            e_s = T.alloc_shared((2 * C,), "float32")
            squares_s = T.alloc_shared((2, 2 * C), "float32")
            inner_s = T.alloc_shared((2,), "float32")

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

            rows_full, rows_empty = T.alloc_barrier([32] * 2), T.alloc_barrier([256] * 2)
            S_full, S_empty = T.alloc_barrier([32]), T.alloc_barrier([320])
            dS_full, dS_empty = T.alloc_barrier([32]), T.alloc_barrier([320])
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
                                wait(rows_full, stage, step // 2 % 2)
                                T.wgmma_gemm(
                                    X_s[stage, :, :], W_s[stage, :, :], P,
                                    transpose_B=True, clear_accum=True, policy=own_rows,
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
                                wait(dS_full, 0, step % 2)
                                T.wgmma_gemm(W_s[stage, :, :], dS_s, E, clear_accum=True, policy=own_half)
                                T.copy(k_s, keys_f)
                                T.wait_wgmma(1)
                                T.warpgroup_fence_operand(D, num_regs=half // 2)
                                for i, j in T.Parallel(C, K):
                                    dK[i, j] += D[i, j]
                                T.warpgroup_fence_operand(dK, num_regs=half // 2)  # or D is kept for later
                                row_sums(D, keys_f, products, d_f)
                                T.wait_wgmma(0)
                                T.warpgroup_fence_operand(E, num_regs=half // 2)
                                arrive(dS_empty, 0)
                                if not folded:
                                    for i, j in T.Parallel(C, K):
                                        E[i, j] *= vec[stage, ROW_E, i]
                                for i, j in T.Parallel(C, K):
                                    dK[i, j] += E[i, j]
                                T.warpgroup_fence_operand(dK, num_regs=half // 2)
                                row_sums(E, keys_f, products, e_f)
                                wait(S_full, 0, step % 2)
                                T.wgmma_gemm(X_s[stage, 0:C, :], S_s, A, clear_accum=True, policy=own_half)
                                T.wgmma_gemm(X_s[stage, C : 2 * C, :], S_s, B, clear_accum=True, policy=own_half)
                                T.wait_wgmma(1)
                                T.warpgroup_fence_operand(A, num_regs=half // 2)
                                for i, j in T.Parallel(C, K):
                                    A[i, j] *= vec[stage, ROWS_Y, i]
                                T.wgmma_gemm(P_s[0:C, :], k_s, A, policy=own_half)
                                T.wait_wgmma(1)
                                T.warpgroup_fence_operand(B, num_regs=half // 2)
                                T.copy(q_s, keys_f)
                                for i, j in T.Parallel(C, K):
                                    B[i, j] *= vec[stage, ROWS_Y + 1, i]
                                T.wgmma_gemm(P_s[C : 2 * C, :], k_s, B, policy=own_half)
                                T.wait_wgmma(1)
                                T.warpgroup_fence_operand(A, num_regs=half // 2)
                                for i, j in T.Parallel(C, K):
                                    dQ[i, j] += A[i, j]
                                T.warpgroup_fence_operand(dQ, num_regs=half // 2)
                                row_sums(A, keys_f, products, y_f)
                                T.copy(k_s, keys_f)
                                T.wait_wgmma(0)
                                T.warpgroup_fence_operand(B, num_regs=half // 2)
                                T.sync_threads(1, consumers)  # P_s, and these rows of X_s, have been read
                                for i, j in T.Parallel(C, K):
                                    dK[i, j] += B[i, j]
                                T.warpgroup_fence_operand(dK, num_regs=half // 2)
                                row_sums(B, keys_f, products, sums)
                                for i in T.Parallel(2 * C):
                                    y_f[i] += sums[i]
                                gamma = T.alloc_var("float32")
                                gamma = T.exp2(vec[stage, TOTAL, C - 1])
                                T.call_extern("handle", "hold_memory")  # or all of it is loaded too early
                                T.copy(S_s, state)
                                for i, j in T.Parallel(width, K):
                                    state[i, j] *= gamma
                                if folded:
                                    T.wgmma_gemm(W_s[stage, :, :], k_s, state, transpose_A=True, policy=own_half)
                                else:
                                    for i, j in T.Parallel(width, C):
                                        operand[i, j] = T.cast(W_s[stage, j, i], "float32") * vec[stage, ROW_E, j]
                                    T.wgmma_gemm(operand, k_s, state, policy=own_half)
                                T.wait_wgmma(0)
                                T.warpgroup_fence_operand(state, num_regs=width * K // 256)
                                wait(repaired, 0, step % 2)
                                if c + 1 < per_item and left > C:
                                    for i, j in T.Parallel(width, K):
                                        X_s[
                                            stage, i if width == 2 * C else j // half * C + i,
                                            j % half if width == C else j // half * 64 + j % half,
                                        ] = state[i, j]  # fmt: skip
                                    T.call_extern("handle", "__syncwarp")
                                    store_state(X_s, stage, scratch, worker, member, warp, thread % 32)
                                release_tiles()
                                if member < ratio - 1:
                                    arrive(rows_empty, stage)
                                arrive(S_empty, 0)
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
                            for x, target, token_step, head_step in (
                                (dQ, dq, dq_token, dq_head),
                                (dK, dk, dk_token, dk_head),
                            ):
                                for i, j in T.Parallel(C, K):
                                    X_s[(step + 1) % 2, j // half * C + i, j % half] = x[i, j]
                                T.call_extern("handle", "__syncwarp")
                                store_rows(
                                    X_s, (step + 1) % 2, target, first, left, token_step, group * head_step, warp,
                                    thread % 32,
                                )  # fmt: skip
                                T.call_extern("handle", "__syncwarp")
                            release_tiles()
                            arrive(rows_empty, (step + 1) % 2)
                            chunk += 1
            else:
                T.set_max_nreg(72, 0)  # launched with 168 each, which is all there is to share
                if thread < 256 + 32:
                    for turn in T.serial(T.ceildiv(items - worker, workers)):
                        take_item(cu_seqlens, documents, worker + turn * workers, groups, steps, slot, group, place)
                        for c in T.serial(per_item):
                            first = place[FIRST] + c * C
                            left = place[LEFT] - c * C
                            if left > 0:
                                for member in T.serial(ratio):
                                    head = group * ratio + member
                                    stage = step % 2
                                    wait(rows_empty, stage, (step // 2 + 1) % 2)
                                    bring_rows(X_s, stage, 0, do, rows_full, first, head, left)
                                    bring_rows(X_s, stage, C, dv, rows_full, first, head, left)
                                    bring_rows(W_s, stage, 0, W, rows_full, first, head, left)
                                    arrive(rows_full, stage)
                                    wait(dS_empty, 0, (step + 1) % 2)
                                    bring_state(d_states, place[BASE] + c, head, dS_s, dS_full)
                                    arrive(dS_full, 0)
                                    wait(S_empty, 0, (step + 1) % 2)
                                    if c == 0:
                                        if place[FIRST] == cu_seqlens[place[0]]:
                                            bring_state(first_states, place[0] * with_first, head, S_s, S_full)
                                        else:
                                            bring_state(states, slot - place[0] - 1, head, S_s, S_full)
                                    else:
                                        acquire_stores()
                                        bring_state(scratch, worker, member, S_s, S_full)
                                    arrive(S_full, 0)
                                    step += 1
                                    if member == 0:
                                        wait(keys_empty, 0, (chunk + 1) % 2)
                                        bring_keys(q_s, q, keys_full, first, group, left)
                                        bring_keys(k_s, k, keys_full, first, group, left)
                                        arrive(keys_full, 0)
                                        chunk += 1
                                        if c + 1 < per_item:
                                            fetch_keys(q, first + C, group, left - C, thread % 32)
                                            fetch_keys(k, first + C, group, left - C, thread % 32)
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
                                            dbeta[first + u, head] = diagonal_s[C + u] / (
                                                vec[stage, BAR, u] * vec[stage, OMEGA, u]
                                            )
                                    for x in T.unroll(16):
                                        inside[x] = 0.0
                                    wait(rows_full, stage, step // 2 % 2)
                                    repair(
                                        dv_again, X_s, tiny_s, vec, stage, first, left, dv_token, head * dv_head, lane
                                    )
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
                                    for x in T.unroll(16):
                                        inside[x] = 0.0
                                    take_inner(
                                        S_s, dS_s, left_16, right_16, inside, 1, lane, dS_full, dS_empty, S_full,
                                        S_empty, step,
                                    )  # fmt: skip
                                    sum_inner(inside, lane)
                                    head = group * ratio + member
                                    inside[0] *= T.exp2(gates[place[BASE] + c, head, 0, C - 1] * LOG2E)
                                    wait(sums_full, 0, step % 2)
                                    # tokens `lane` and `lane + 32`: [0] summed from the end, [1] from the start
                                    low[0] = low_s[lane] + low_s[lane + C]
                                    high[0] = low_s[lane + 32] + low_s[lane + 32 + C]
                                    low[1] = e_s[lane] + e_s[lane + C]
                                    high[1] = e_s[lane + 32] + e_s[lane + 32 + C]
                                    inside[0] += inner_s[0]
                                    release_tiles()
                                    arrive(sums_empty, 0)
                                    sum_over_tokens(low, high, moved, lane)
                                    store_dg(dg, first, left, head, low, high, inside, moved, lane)
                                    step += 1

    return gradients
