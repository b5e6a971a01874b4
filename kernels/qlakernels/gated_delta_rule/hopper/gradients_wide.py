"""G where a head has more than 128 values: the gradients of q, k, g and β as `gradients` makes them, by two consumers
that have roles of their own.

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
At a step each of the two consumers takes 64 columns of V of the state to the next chunk and stores them to `scratch`,
[V, K] a block and head and so in L2, whence the copy engine brings them at the next chunk. Three warpgroups:

    first     F, H, dβ, then the state's first half, A, dQ; repairs dV where β̄ is not β
    second    E, then the state's second half, B, D, dK
    third     warp 0 brings dO, W, dV two steps ahead, S and dS one; warps 1 and 2 make the step's vectors and ⟨S, dS⟩;
              warp 3 brings q and k and gathers dg

Barriers (arrivals), all phases in the order of the steps: `rows` dO, W, dV of a step, two stages (32; 256 back); `S`
(32; 320) and `dS` (32; 192); `keys` q and k of a chunk (32; 256); `vec` vectors, two stages (64; 256); `FH` F, H and f
from the first to the second (128; 128); `sums` what dg is of, to warp 3 (320; 32). An arrival at `S_empty` also says
that the next state of this step and of all before is on its way to `scratch`.

V is more than 128; `gradients` has fewer. Values come in parts of 64, two at a time. F and H are made of all of them
first, and the rows are brought a second time for the rest.

Registers of a consumer, at most: dQ or dK 64, a product 64, an operand 16, q or k or F 16 to 32; or dQ, F, H 128.
Shared memory at K = 128: rows 96 KB, S 32, dS 32, q and k 32, F and H 16, vectors 6.
"""

import tilelang.language as T

from qlakernels.gated_delta_rule.hopper.chunk import FAR, cut, store_dg, sum_over_tokens, weigh
from qlakernels.gated_delta_rule.hopper.common import (
    BASE,
    BETA_MIN,
    FIRST,
    LEFT,
    LOG2E,
    PRELUDE,
    accumulator_rows,
    acquire_stores,
    arrive,
    folds_decay,
    load_tail,
    release_tiles,
    take_item,
    wait,
    weight_of_W,
)
from qlakernels.gated_delta_rule.hopper.sizes import CHUNK, PART, PIECE, STATE_STRIDE, value_parts

VECTORS = 13
TOTAL, SHIFTED, COLUMN, ROW_F, ROW_H, ROW_A, ROW_B, ROW_E, CHI_2, KAPPA_2, BETA, BAR, OMEGA = range(VECTORS)


def gradients_kernel(key_dim, value_dim, dtype, l2norm):
    C = CHUNK
    K, V = key_dim, value_dim
    part = PART
    parts = value_parts(V)
    pairs = -(-parts // 2)
    per_item = STATE_STRIDE // C
    folded = folds_decay(dtype)
    tokens, heads, groups = T.dynamic("tokens"), T.dynamic("heads"), T.dynamic("groups")
    slots, documents, kept, firsts = (T.dynamic(x) for x in ("slots", "documents", "kept", "firsts"))
    places, members = T.dynamic("places"), T.dynamic("members")
    q_token, q_head = T.dynamic("q_token"), T.dynamic("q_head")
    k_token, k_head = T.dynamic("k_token"), T.dynamic("k_head")
    o_token, o_head = T.dynamic("o_token"), T.dynamic("o_head")
    dq_pieces, dk_pieces, dv_pieces = (T.dynamic(x) for x in ("dq_pieces", "dk_pieces", "dv_pieces"))
    v_token, v_head = T.dynamic("v_token"), T.dynamic("v_head")

    @T.macro
    def bring_rows(source, tiles, full, rows, p, first, head, columns, left):
        """The tile of part p ← the chunk's rows of source[:, head, columns:], zero behind the document's end."""
        if left >= C:
            T.tma_copy(
                source[first : first + C, head, columns : columns + part],
                tiles[rows % 2 * 2 + p, :, :],
                barrier=full[rows % 2],
            )
        else:
            load_tail(tiles, rows % 2 * 2 + p, source, first, head, columns, left, part)

    @T.macro
    def bring_states(source, index, head, columns, both, tile_0, tile_1, full):
        """tile_0 and, if there are both, tile_1 ← the parts from `columns` on of source[index, head]."""
        T.tma_copy(source[index, head, columns : columns + part, :], tile_0, barrier=full[0])
        if both:
            T.tma_copy(source[index, head, columns + part : columns + 2 * part, :], tile_1, barrier=full[0])

    @T.macro
    def bring_kept(
        states, first_states, slot, document, is_first, with_first, head, columns, both, tile_0, tile_1, full
    ):
        """As `bring_states`, the state at the start of an item; with_first 0: of first_states one serves all."""
        if is_first == 0:
            bring_states(states, slot - document - 1, head, columns, both, tile_0, tile_1, full)
        else:
            bring_states(first_states, document * with_first, head, columns, both, tile_0, tile_1, full)

    @T.macro
    def repair(dv, dv_s, tiny, vec, stage, tile, first, left, token_step, base, columns):
        """dv ← β/β̄ ∘ dv for two parts, if any β of the chunk is tiny."""
        if tiny[stage, 0] + tiny[stage, 1] > 0:
            for row in T.serial(C):
                if vec[stage, BETA, row] < vec[stage, BAR, row] and row < left:
                    for j in T.Parallel(2 * part):
                        if columns + j < V:
                            dv[(first + row) * token_step + base + (columns + j) // PIECE, (columns + j) % PIECE] = (
                                T.cast(dv_s[tile + j // part, row, j % part], "float32")
                                * vec[stage, BETA, row]
                                / vec[stage, BAR, row]
                            )

    @T.macro
    def advance(S, W, tile, vec, stage, k, work, operand, wanted, scratch, worker, member, columns):
        """If wanted, scratch[worker, member, columns:] ← the rows that S holds of the state, after this chunk."""
        gamma = T.alloc_var("float32")
        gamma = T.exp2(vec[stage, TOTAL, C - 1])
        T.copy(S, work)
        for i, j in T.Parallel(part, K):
            work[i, j] *= gamma
        if folded:
            T.gemm(W[tile, :, :], k, work, transpose_A=True)
        else:
            for i, j in T.Parallel(part, C):
                operand[i, j] = T.cast(W[tile, j, i], "float32") * vec[stage, ROW_E, j]
            T.gemm(operand, k, work)
        if wanted:
            T.copy(work, scratch[worker, member, columns : columns + part, :])

    @T.macro
    def add_products(work, keys, total, sums):
        """total += work, sums ← rows of work ∘ keys; work is spent."""
        for i, j in T.Parallel(C, K):
            total[i, j] += work[i, j]
        for i, j in T.Parallel(C, K):
            work[i, j] *= T.cast(keys[i, j], "float32")
        T.reduce_sum(work, sums, dim=1)

    @T.macro
    def add_inner(S, dS, inside, s_16, ds_16, u):
        """inside[0..3] += parts of ⟨S, dS⟩, by 64 threads u."""
        for block in T.serial(part * K // 8 // 128):
            for half in T.unroll(2):
                row = (block * 128 + half * 64 + u) // (K // 8)
                column = (block * 128 + half * 64 + u) % (K // 8) * 8
                for x in T.vectorized(8):
                    s_16[half * 8 + x] = S[row, column + x]
                for x in T.vectorized(8):
                    ds_16[half * 8 + x] = dS[row, column + x]
            for x in T.unroll(16):
                inside[x % 4] += T.cast(s_16[x], "float32") * T.cast(ds_16[x], "float32")

    @T.macro
    def finish(total, diagonal, square, own, other, own_f, work, sums):
        """total ← total + diagonal ∘ other, then without its part along `own` if that was normalised."""
        T.copy(other, own_f)
        for i, j in T.Parallel(C, K):
            total[i, j] += diagonal[i] * T.cast(own_f[i, j], "float32")
        if l2norm:
            T.copy(own, own_f)
            for i, j in T.Parallel(C, K):
                work[i, j] = total[i, j] * T.cast(own_f[i, j], "float32")
            T.reduce_sum(work, sums, dim=1)
            for i in T.Parallel(C):
                sums[i] *= square[i]
            for i, j in T.Parallel(C, K):
                total[i, j] -= sums[i] * T.cast(own_f[i, j], "float32")

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
        scratch: T.Tensor((places, members, parts * part, K), dtype),
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
            q_s = T.alloc_shared((C, K), dtype)
            k_s = T.alloc_shared((C, K), dtype)
            do_s = T.alloc_shared((4, C, part), dtype)  # [stage · 2 + part of the pair]
            W_s = T.alloc_shared((4, C, part), dtype)
            dv_s = T.alloc_shared((4, C, part), dtype)
            S_0, S_1 = T.alloc_shared((part, K), dtype), T.alloc_shared((part, K), dtype)
            dS_0, dS_1 = T.alloc_shared((part, K), dtype), T.alloc_shared((part, K), dtype)
            F_s = T.alloc_shared((C, C), dtype)
            H_s = T.alloc_shared((C, C), dtype)  # −H
            f_s = T.alloc_shared((C,), "float32")
            vec = T.alloc_shared((2, VECTORS, C), "float32")
            tiny_s = T.alloc_shared((2, 2), "int32")  # of the chunk's halves: does β̄ differ from β anywhere?
            a_s = T.alloc_shared((C,), "float32")
            b_s = T.alloc_shared((C,), "float32")
            e_s = T.alloc_shared((C,), "float32")
            inner_s = T.alloc_shared((2,), "float32")

            # the first warpgroup's
            dQ = T.alloc_fragment((C, K), "float32")
            work_q = T.alloc_fragment((C, K), "float32")
            picked = T.alloc_fragment((C, C), "float32")
            F = T.alloc_fragment((C, C), "float32")
            H = T.alloc_fragment((C, C), "float32")
            F_r = T.alloc_fragment((C, C), dtype)
            H_r = T.alloc_fragment((C, C), dtype)
            operand_q = T.alloc_fragment((part, C), dtype)
            q_f = T.alloc_fragment((C, K), dtype)
            rows_q = T.alloc_fragment((C,), "float32")
            a_f = T.alloc_fragment((C,), "float32")
            f_q = T.alloc_fragment((C,), "float32")
            square_q = T.alloc_fragment((C,), "float32")
            # the second's
            dK = T.alloc_fragment((C, K), "float32")
            work_k = T.alloc_fragment((C, K), "float32")
            operand_k = T.alloc_fragment((part, C), dtype)
            k_f = T.alloc_fragment((C, K), dtype)
            rows_k = T.alloc_fragment((C,), "float32")
            b_f = T.alloc_fragment((C,), "float32")
            e_f = T.alloc_fragment((C,), "float32")
            f_k = T.alloc_fragment((C,), "float32")
            square_k = T.alloc_fragment((C,), "float32")
            # the third's
            s_16 = T.alloc_local((16,), dtype)
            ds_16 = T.alloc_local((16,), dtype)
            inside = T.alloc_local((4,), "float32")
            low, high = T.alloc_local((2,), "float32"), T.alloc_local((2,), "float32")
            moved = T.alloc_local((4,), "float32")

            rows_full, rows_empty = T.alloc_barrier([32] * 2), T.alloc_barrier([256] * 2)
            S_full, S_empty = T.alloc_barrier([32]), T.alloc_barrier([320])
            dS_full, dS_empty = T.alloc_barrier([32]), T.alloc_barrier([192])
            keys_full, keys_empty = T.alloc_barrier([32]), T.alloc_barrier([256])
            vec_full, vec_empty = T.alloc_barrier([64] * 2), T.alloc_barrier([256] * 2)
            FH_full, FH_empty = T.alloc_barrier([128]), T.alloc_barrier([128])
            sums_full, sums_empty = T.alloc_barrier([320]), T.alloc_barrier([32])

            thread = T.get_thread_binding()
            items = (tokens // STATE_STRIDE + documents) * groups
            step = T.alloc_var("int32", init=0)  # steps done
            chunk = T.alloc_var("int32", init=0)  # chunks done
            rows = T.alloc_var("int32", init=0)  # pairs of rows done
            pairs_done = T.alloc_var("int32", init=0)  # pairs of S, dS done
            place = T.alloc_local((6,), "int32")
            slot = T.alloc_var("int32")
            group = T.alloc_var("int32")
            first = T.alloc_var("int32")
            left = T.alloc_var("int32")  # tokens from the chunk's first to the document's end

            if thread < 128:
                T.set_max_nreg(224, 1)
                for turn in T.serial(T.ceildiv(items - worker, workers)):
                    take_item(cu_seqlens, documents, worker + turn * workers, groups, steps, slot, group, place)
                    for c in T.serial(per_item):
                        first = place[FIRST] + c * C
                        left = place[LEFT] - c * C
                        if left > 0:
                            T.clear(dQ)
                            T.clear(f_q)
                            for member in T.serial(ratio):
                                head = group * ratio + member
                                wait(vec_full, step % 2, step // 2 % 2)
                                T.clear(F)
                                T.clear(H)
                                for pair in T.serial(pairs):
                                    wait(rows_full, rows % 2, rows // 2 % 2)
                                    T.wgmma_gemm(do_s[rows % 2 * 2, :, :], W_s[rows % 2 * 2, :, :], F, transpose_B=True)
                                    T.wgmma_gemm(dv_s[rows % 2 * 2, :, :], W_s[rows % 2 * 2, :, :], H, transpose_B=True)
                                    if pair * 2 + 1 < parts:
                                        T.wgmma_gemm(
                                            do_s[rows % 2 * 2 + 1, :, :],
                                            W_s[rows % 2 * 2 + 1, :, :],
                                            F,
                                            transpose_B=True,
                                        )
                                        T.wgmma_gemm(
                                            dv_s[rows % 2 * 2 + 1, :, :],
                                            W_s[rows % 2 * 2 + 1, :, :],
                                            H,
                                            transpose_B=True,
                                        )
                                    T.wait_wgmma(0)
                                    arrive(rows_empty, rows % 2)
                                    rows += 1
                                for i, j in T.Parallel(C, C):
                                    picked[i, j] = T.Select(i == j, H[i, j], T.float32(0.0))
                                T.reduce_sum(picked, rows_q, dim=1)
                                for i in T.Parallel(C, loop_layout=accumulator_rows()):
                                    if i < left:
                                        dbeta[first + i, head] = rows_q[i] / (
                                            vec[step % 2, BAR, i] * vec[step % 2, OMEGA, i]
                                        )
                                for i, j in T.Parallel(C, C):
                                    picked[i, j] = T.Select(i == j, F[i, j], T.float32(0.0))
                                T.reduce_sum(picked, rows_q, dim=1)
                                for i in T.Parallel(C):
                                    rows_q[i] *= vec[step % 2, ROW_F, i] * vec[step % 2, COLUMN, i]
                                for i in T.Parallel(C):
                                    f_q[i] += rows_q[i]
                                for i, j in T.Parallel(C, C):
                                    F[i, j] *= vec[step % 2, ROW_F, i]
                                for i, j in T.Parallel(C, C):
                                    H[i, j] *= -vec[step % 2, ROW_H, i]
                                if not folded or vec[step % 2, TOTAL, C - 1] <= -FAR:
                                    weigh(F, vec, step % 2, TOTAL, SHIFTED)
                                    weigh(H, vec, step % 2, TOTAL, SHIFTED)
                                cut(F, C * C // 128, True)
                                cut(H, C * C // 128, True)
                                T.copy(F, F_r)
                                T.copy(H, H_r)
                                wait(FH_empty, 0, (step + 1) % 2)
                                T.copy(F_r, F_s)
                                T.copy(H_r, H_s)
                                for i in T.Parallel(C, loop_layout=accumulator_rows()):
                                    f_s[i] = rows_q[i]
                                release_tiles()
                                arrive(FH_full, 0)
                                T.clear(a_f)
                                for pair in T.serial(pairs):
                                    wait(rows_full, rows % 2, rows // 2 % 2)
                                    wait(S_full, 0, pairs_done % 2)
                                    if pair == 0:
                                        wait(keys_full, 0, chunk % 2)
                                    advance(
                                        S_0, W_s, rows % 2 * 2, vec, step % 2, k_s, work_q, operand_q,
                                        c + 1 < per_item and left > C,
                                        scratch, worker, member, pair * 2 * part,
                                    )  # fmt: skip
                                    T.clear(work_q)
                                    T.wgmma_gemm(do_s[rows % 2 * 2, :, :], S_0, work_q)
                                    if pair * 2 + 1 < parts:
                                        T.wgmma_gemm(do_s[rows % 2 * 2 + 1, :, :], S_1, work_q)
                                    T.wait_wgmma(0)
                                    repair(
                                        dv_again, dv_s, tiny_s, vec, step % 2, rows % 2 * 2,
                                        first, left, dv_token, head * dv_head, pair * 2 * part,
                                    )  # fmt: skip
                                    release_tiles()
                                    arrive(S_empty, 0)
                                    arrive(rows_empty, rows % 2)
                                    for i, j in T.Parallel(C, K):
                                        work_q[i, j] *= vec[step % 2, ROW_A, i]
                                    if pair == pairs - 1:
                                        T.gemm(F_r, k_s, work_q)
                                    T.copy(q_s, q_f)
                                    add_products(work_q, q_f, dQ, rows_q)
                                    for i in T.Parallel(C):
                                        a_f[i] += rows_q[i]
                                    rows += 1
                                    pairs_done += 1
                                for i in T.Parallel(C):
                                    square_q[i] = vec[step % 2, CHI_2, i]
                                wait(sums_empty, 0, (step + 1) % 2)
                                for i in T.Parallel(C, loop_layout=accumulator_rows()):
                                    a_s[i] = a_f[i]
                                release_tiles()
                                arrive(sums_full, 0)
                                arrive(vec_empty, step % 2)
                                step += 1
                            finish(dQ, f_q, square_q, q_s, k_s, q_f, work_q, rows_q)
                            release_tiles()
                            arrive(keys_empty, 0)
                            for i, j in T.Parallel(C, K):
                                if i < left:
                                    dq[(first + i) * dq_token + group * dq_head + j // PIECE, j % PIECE] = dQ[i, j]
                            chunk += 1
            elif thread < 256:
                T.set_max_nreg(224, 1)
                for turn in T.serial(T.ceildiv(items - worker, workers)):
                    take_item(cu_seqlens, documents, worker + turn * workers, groups, steps, slot, group, place)
                    for c in T.serial(per_item):
                        first = place[FIRST] + c * C
                        left = place[LEFT] - c * C
                        if left > 0:
                            T.clear(dK)
                            T.clear(f_k)
                            for member in T.serial(ratio):
                                head = group * ratio + member
                                wait(vec_full, step % 2, step // 2 % 2)
                                for pair in T.serial(pairs):  # F and H are the first's alone
                                    wait(rows_full, rows % 2, rows // 2 % 2)
                                    arrive(rows_empty, rows % 2)
                                    rows += 1
                                T.clear(b_f)
                                T.clear(e_f)
                                for pair in T.serial(pairs):
                                    wait(rows_full, rows % 2, rows // 2 % 2)
                                    wait(dS_full, 0, pairs_done % 2)
                                    T.clear(work_k)
                                    T.wgmma_gemm(W_s[rows % 2 * 2, :, :], dS_0, work_k)
                                    if pair * 2 + 1 < parts:
                                        T.wgmma_gemm(W_s[rows % 2 * 2 + 1, :, :], dS_1, work_k)
                                    T.wait_wgmma(0)
                                    arrive(dS_empty, 0)
                                    if not folded:
                                        for i, j in T.Parallel(C, K):
                                            work_k[i, j] *= vec[step % 2, ROW_E, i]
                                    if pair == 0:
                                        wait(keys_full, 0, chunk % 2)
                                    T.copy(k_s, k_f)
                                    add_products(work_k, k_f, dK, rows_k)
                                    for i in T.Parallel(C):
                                        e_f[i] += rows_k[i]
                                    wait(S_full, 0, pairs_done % 2)
                                    if pair * 2 + 1 < parts:
                                        advance(
                                            S_1, W_s, rows % 2 * 2 + 1, vec, step % 2, k_s, work_k, operand_k,
                                            c + 1 < per_item and left > C,
                                            scratch, worker, member, (pair * 2 + 1) * part,
                                        )  # fmt: skip
                                    T.clear(work_k)
                                    T.wgmma_gemm(dv_s[rows % 2 * 2, :, :], S_0, work_k)
                                    if pair * 2 + 1 < parts:
                                        T.wgmma_gemm(dv_s[rows % 2 * 2 + 1, :, :], S_1, work_k)
                                    T.wait_wgmma(0)
                                    release_tiles()
                                    arrive(S_empty, 0)
                                    arrive(rows_empty, rows % 2)
                                    for i, j in T.Parallel(C, K):
                                        work_k[i, j] *= vec[step % 2, ROW_B, i]
                                    if pair == pairs - 1:
                                        wait(FH_full, 0, step % 2)
                                        T.gemm(H_s, k_s, work_k)
                                    T.copy(k_s, k_f)
                                    add_products(work_k, k_f, dK, rows_k)
                                    for i in T.Parallel(C):
                                        b_f[i] += rows_k[i]
                                    rows += 1
                                    pairs_done += 1
                                T.clear(work_k)
                                T.wgmma_gemm(F_s, q_s, work_k, transpose_A=True)
                                T.wgmma_gemm(H_s, k_s, work_k, transpose_A=True)
                                T.wait_wgmma(0)
                                for i in T.Parallel(C):
                                    f_k[i] += f_s[i]
                                release_tiles()
                                arrive(FH_empty, 0)
                                add_products(work_k, k_f, dK, rows_k)
                                for i in T.Parallel(C):
                                    b_f[i] -= rows_k[i]
                                for i in T.Parallel(C):
                                    square_k[i] = vec[step % 2, KAPPA_2, i]
                                wait(sums_empty, 0, (step + 1) % 2)
                                for i in T.Parallel(C, loop_layout=accumulator_rows()):
                                    b_s[i] = b_f[i]
                                for i in T.Parallel(C, loop_layout=accumulator_rows()):
                                    e_s[i] = e_f[i]
                                release_tiles()
                                arrive(sums_full, 0)
                                arrive(vec_empty, step % 2)
                                step += 1
                            finish(dK, f_k, square_k, k_s, q_s, k_f, work_k, rows_k)
                            release_tiles()
                            arrive(keys_empty, 0)
                            for i, j in T.Parallel(C, K):
                                if i < left:
                                    dk[(first + i) * dk_token + group * dk_head + j // PIECE, j % PIECE] = dK[i, j]
                            chunk += 1
            else:
                T.set_max_nreg(56, 0)  # launched with 168 each, which is all there is to share
                if thread < 256 + 32:
                    for turn in T.serial(T.ceildiv(items - worker, workers)):
                        take_item(cu_seqlens, documents, worker + turn * workers, groups, steps, slot, group, place)
                        for c in T.serial(per_item):
                            first = place[FIRST] + c * C
                            left = place[LEFT] - c * C
                            if left > 0:
                                for member in T.serial(ratio):
                                    head = group * ratio + member
                                    for load in T.serial(2 * pairs):  # once for F and H, and again
                                        now = load % pairs
                                        wait(rows_empty, rows % 2, (rows // 2 + 1) % 2)
                                        for p in T.unroll(2):
                                            if now * 2 + p < parts:
                                                columns = (now * 2 + p) * part
                                                bring_rows(do, do_s, rows_full, rows, p, first, head, columns, left)
                                                bring_rows(W, W_s, rows_full, rows, p, first, head, columns, left)
                                                bring_rows(dv, dv_s, rows_full, rows, p, first, head, columns, left)
                                        arrive(rows_full, rows % 2)
                                        rows += 1
                                        if load >= pairs:
                                            start = now * 2 * part
                                            both = now * 2 + 1 < parts
                                            index = place[BASE] + c
                                            wait(dS_empty, 0, (pairs_done + 1) % 2)
                                            bring_states(d_states, index, head, start, both, dS_0, dS_1, dS_full)
                                            arrive(dS_full, 0)
                                            wait(S_empty, 0, (pairs_done + 1) % 2)
                                            if c == 0:
                                                bring_kept(
                                                    states, first_states, slot, place[0],
                                                    T.cast(place[FIRST] == cu_seqlens[place[0]], "int32"), with_first,
                                                    head, start, both, S_0, S_1, S_full,
                                                )  # fmt: skip
                                            else:
                                                acquire_stores()
                                                bring_states(scratch, worker, member, start, both, S_0, S_1, S_full)
                                            arrive(S_full, 0)
                                            pairs_done += 1
                elif thread < 256 + 96:
                    u = thread - 288
                    for turn in T.serial(T.ceildiv(items - worker, workers)):
                        take_item(cu_seqlens, documents, worker + turn * workers, groups, steps, slot, group, place)
                        for c in T.serial(per_item):
                            left = place[LEFT] - c * C
                            if left > 0:
                                chi = T.alloc_var("float32")
                                kappa = T.alloc_var("float32")
                                chi = norms[place[BASE] + c, group, 0, u]
                                kappa = norms[place[BASE] + c, group, 1, u]
                                for member in T.serial(ratio):
                                    head = group * ratio + member
                                    total = gates[place[BASE] + c, head, 0, u] * LOG2E
                                    beta = gates[place[BASE] + c, head, 1, u]
                                    whole = gates[place[BASE] + c, head, 0, C - 1] * LOG2E
                                    gamma_C = T.exp2(whole)
                                    rho = T.exp2(whole - total)
                                    bar = T.max(beta, BETA_MIN[dtype])
                                    tiny = T.any_sync(beta < bar)
                                    kappa_fix = kappa * beta / bar
                                    omega = T.alloc_var("float32")
                                    omega = weight_of_W(beta, rho, kappa, dtype)
                                    column = T.alloc_var("float32")
                                    decay = T.alloc_var("float32")
                                    column = kappa * beta / omega
                                    decay = 1.0
                                    wait(vec_empty, step % 2, (step // 2 + 1) % 2)
                                    vec[step % 2, TOTAL, u] = total
                                    vec[step % 2, SHIFTED, u] = total - T.log2(column)
                                    vec[step % 2, ROW_E, u] = rho * column
                                    if folded and whole > -FAR:  # then u is 1/ρ, and Γ_ij u_j depends on i alone
                                        decay = T.exp2(total - whole)
                                        column = 1.0
                                    vec[step % 2, COLUMN, u] = column
                                    vec[step % 2, ROW_H, u] = kappa_fix * decay
                                    vec[step % 2, OMEGA, u] = omega
                                    vec[step % 2, ROW_F, u] = scale * chi * decay
                                    vec[step % 2, ROW_A, u] = scale * chi * T.exp2(total)
                                    vec[step % 2, ROW_B, u] = -T.exp2(total) * kappa_fix
                                    vec[step % 2, CHI_2, u] = chi * chi
                                    vec[step % 2, KAPPA_2, u] = kappa * kappa
                                    vec[step % 2, BETA, u] = beta
                                    vec[step % 2, BAR, u] = bar
                                    if u % 32 == 0:
                                        tiny_s[step % 2, u // 32] = tiny
                                    arrive(vec_full, step % 2)
                                    for x in T.unroll(4):
                                        inside[x] = 0.0
                                    for pair in T.serial(pairs):
                                        wait(dS_full, 0, pairs_done % 2)
                                        wait(S_full, 0, pairs_done % 2)
                                        add_inner(S_0, dS_0, inside, s_16, ds_16, u)
                                        if pair * 2 + 1 < parts:
                                            add_inner(S_1, dS_1, inside, s_16, ds_16, u)
                                        release_tiles()
                                        arrive(dS_empty, 0)
                                        arrive(S_empty, 0)
                                        pairs_done += 1
                                    inside[0] += inside[1] + inside[2] + inside[3]
                                    for distance in T.unroll(5):
                                        inside[0] += T.shfl_xor(inside[0], 16 >> distance)
                                    wait(sums_empty, 0, (step + 1) % 2)
                                    if u % 32 == 0:
                                        inner_s[u // 32] = inside[0] * gamma_C
                                    arrive(sums_full, 0)
                                    step += 1
                else:
                    lane = thread - 352
                    for turn in T.serial(T.ceildiv(items - worker, workers)):
                        take_item(cu_seqlens, documents, worker + turn * workers, groups, steps, slot, group, place)
                        for c in T.serial(per_item):
                            first = place[FIRST] + c * C
                            left = place[LEFT] - c * C
                            if left > 0:
                                wait(keys_empty, 0, (chunk + 1) % 2)
                                if left >= C:
                                    T.tma_copy(k[first : first + C, group, :], k_s, barrier=keys_full[0])
                                    T.tma_copy(q[first : first + C, group, :], q_s, barrier=keys_full[0])
                                else:
                                    load_tail(k_s, None, k, first, group, 0, left, K)
                                    load_tail(q_s, None, q, first, group, 0, left, K)
                                arrive(keys_full, 0)
                                chunk += 1
                                for member in T.serial(ratio):
                                    wait(sums_full, 0, step % 2)
                                    # tokens `lane` and `lane + 32`: [0] summed from the end, [1] from the start
                                    low[0] = a_s[lane] + b_s[lane]
                                    high[0] = a_s[lane + 32] + b_s[lane + 32]
                                    low[1] = e_s[lane]
                                    high[1] = e_s[lane + 32]
                                    inside[0] = inner_s[0] + inner_s[1]
                                    release_tiles()
                                    arrive(sums_empty, 0)
                                    sum_over_tokens(low, high, moved, lane)
                                    head = group * ratio + member
                                    store_dg(dg, first, left, head, low, high, inside, moved, lane)
                                    step += 1

    return gradients
