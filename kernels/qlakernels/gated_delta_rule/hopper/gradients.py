"""G: the gradients of q, k, g and β, all chunks at once.

Per chunk and key head, with S at the chunk's start, dS at its end, W from `forward`, dV from `reverse`, and
fix = β/β̄ (1 unless β is tiny); sums run over the value heads of the group:

    F_ij = scale χ_i κ_j Γ_ij fix_j (dO Wᵀ)_ij   (i ≥ j)      H_ij = κ_i κ_j Γ_ij fix_i fix_j (dV Wᵀ)_ij   (i > j)
    dQ = Σ scale γχ ∘ (dO Sᵀ) + F K                            dq = dQ − χ² q (q·dQ)   with L2 normalisation
    dK = Σ [ρκ fix ∘ (W dSᵀ) − γκ fix ∘ (dV Sᵀ) + Fᵀ Q − (H + Hᵀ) K]         dk likewise with κ
    dβ_i = (dV Wᵀ)_ii / β̄_i²
    dg_t = Σ_{i≥t} (c + d)_i + Σ_{j<t} e_j + γ_C ⟨S, dS⟩ + Σ_{i≥t>j} Z_ij
    c = q·(scale γχ dO Sᵀ)   d = −k·(γκ fix dV Sᵀ)   e = k·(ρκ fix W dSᵀ)   Z = F ∘ QKᵀ − H ∘ KKᵀ   (i > j)

Every term of dg carries its own decay: nothing is subtracted that was added, so strong decay costs no digits. The sum
of Z over rows is a product with a triangle of ones, Z in two bfloat16 parts; the sum over columns is a row sum.

Persistent blocks take items (slot, key head). Three warpgroups:
    first     F, dQ, c and its part of Z
    second    H, dK, d, e, dβ, its part of Z; gathers dg
    third     one warp brings tiles as their last reader leaves them; two make the chunk's vectors and ⟨S, dS⟩
Values come in parts of 64, two at a time: every tile has two places.

Registers of the first and second, at most: dQ 64, F 32, dO Sᵀ 64 or QKᵀ 32 and an operand 16.
"""

import tilelang.language as T

from qlakernels.gated_delta_rule.hopper.common import (
    BETA_MIN,
    CHUNK,
    LOG2E,
    find_document,
    load_tail,
)

VECTORS = 7
TOTAL, ROW_Q, ROW_D, ROW_E, COLUMN, BETA, BAR = range(VECTORS)


def gradients_kernel(key_dim, value_dim, dtype, l2norm):
    C = CHUNK
    K, V = key_dim, value_dim
    part = 64
    parts = -(-V // part)
    pairs = -(-parts // 2)
    tokens, heads, groups = T.dynamic("tokens"), T.dynamic("heads"), T.dynamic("groups")
    slots, documents = T.dynamic("slots"), T.dynamic("documents")
    q_token, q_head = T.dynamic("q_token"), T.dynamic("q_head")
    k_token, k_head = T.dynamic("k_token"), T.dynamic("k_head")
    o_token, o_head = T.dynamic("o_token"), T.dynamic("o_head")

    @T.prim_func
    def gradients(
        q: T.StridedTensor((tokens, groups, K), (q_token, q_head, 1), dtype),
        k: T.StridedTensor((tokens, groups, K), (k_token, k_head, 1), dtype),
        do: T.StridedTensor((tokens, heads, V), (o_token, o_head, 1), dtype),
        W: T.Tensor((tokens, heads, V), dtype),
        dv: T.Tensor((tokens, heads, V), dtype),
        states: T.Tensor((slots, heads, V, K), dtype),
        d_states: T.Tensor((slots, heads, V, K), dtype),
        gates: T.Tensor((slots, heads, 2, C), "float32"),
        norms: T.Tensor((slots, groups, 2, C), "float32"),
        cu_seqlens: T.Tensor((documents + 1,), "int32"),
        dq: T.Tensor((tokens, groups, K), dtype),
        dk: T.Tensor((tokens, groups, K), dtype),
        dg: T.Tensor((tokens, heads), "float32"),
        dbeta: T.Tensor((tokens, heads), "float32"),
        scale: T.float32,
        steps: T.int32,
        ratio: T.int32,
        workers: T.int32,
    ):
        with T.Kernel(workers, threads=384) as (worker,):
            q_s = T.alloc_shared((2, C, K), dtype)
            k_s = T.alloc_shared((2, C, K), dtype)
            do_s = T.alloc_shared((2, C, part), dtype)
            W_s = T.alloc_shared((2, C, part), dtype)
            dv_s = T.alloc_shared((2, C, part), dtype)
            S_s = T.alloc_shared((2, part, K), dtype)
            dS_s = T.alloc_shared((2, part, K), dtype)
            F_s = T.alloc_shared((C, C), dtype)
            H_s = T.alloc_shared((C, C), dtype)
            ones_s = T.alloc_shared((C, C), "bfloat16")  # [t, i]: 1 where i ≥ t
            zq_s = T.alloc_shared((C, C), "bfloat16")
            zk_s = T.alloc_shared((C, C), "bfloat16")
            vec = T.alloc_shared((VECTORS, C), "float32")
            chi_s = T.alloc_shared((2, C), "float32")
            kappa_s = T.alloc_shared((2, C), "float32")
            c_s = T.alloc_shared((C,), "float32")
            d_s = T.alloc_shared((C,), "float32")
            e_s = T.alloc_shared((C,), "float32")
            crossing_q = T.alloc_shared((C,), "float32")
            crossing_k = T.alloc_shared((C,), "float32")
            inner_s = T.alloc_shared((2,), "float32")
            tiny_s = T.alloc_shared((2,), "int32")  # of the chunk's halves: does β̄ differ from β anywhere?

            # the first warpgroup's
            dQ = T.alloc_fragment((C, K), "float32")
            F = T.alloc_fragment((C, C), "float32")
            F_r = T.alloc_fragment((C, C), dtype)
            QK = T.alloc_fragment((C, C), "float32")
            zq = T.alloc_fragment((C, C), "bfloat16")
            from_S = T.alloc_fragment((C, K), "float32")
            q_f = T.alloc_fragment((C, K), dtype)
            rows_q = T.alloc_fragment((C,), "float32")
            c_f = T.alloc_fragment((C,), "float32")
            # the second's
            dK = T.alloc_fragment((C, K), "float32")
            H = T.alloc_fragment((C, C), "float32")
            H_r = T.alloc_fragment((C, C), dtype)
            KK = T.alloc_fragment((C, C), "float32")
            zk = T.alloc_fragment((C, C), "bfloat16")
            from_states = T.alloc_fragment((C, K), "float32")
            k_f = T.alloc_fragment((C, K), dtype)
            rows_k = T.alloc_fragment((C,), "float32")
            d_f = T.alloc_fragment((C,), "float32")
            e_f = T.alloc_fragment((C,), "float32")
            # the third's
            s_8 = T.alloc_local((8,), dtype)
            ds_8 = T.alloc_local((8,), dtype)

            keys_full, keys_empty = T.alloc_barrier([96] * 2), T.alloc_barrier([256] * 2)
            rows_full, rows_empty = T.alloc_barrier([32] * 2), T.alloc_barrier([256] * 2)
            vec_full, vec_empty = T.alloc_barrier([64]), T.alloc_barrier([256])
            S_full, S_empty = T.alloc_barrier([32] * 2), T.alloc_barrier([320] * 2)
            dS_full, dS_empty = T.alloc_barrier([32] * 2), T.alloc_barrier([192] * 2)
            inner_full, inner_empty = T.alloc_barrier([64]), T.alloc_barrier([128])
            sums_full, sums_empty = T.alloc_barrier([128]), T.alloc_barrier([128])
            F_full, F_empty = T.alloc_barrier([128]), T.alloc_barrier([128])

            thread = T.get_thread_binding()
            items = slots * groups
            item_phase = T.alloc_var("int32", init=0)  # items done
            pair_phase = T.alloc_var("int32", init=0)  # pairs of parts done
            head_phase = T.alloc_var("int32", init=0)  # heads done
            document = T.alloc_var("int32")
            place = T.alloc_local((3,), "int32")
            first = T.alloc_var("int32")
            size = T.alloc_var("int32")
            slot = T.alloc_var("int32")
            group = T.alloc_var("int32")

            for i, j in T.Parallel(C, C):
                ones_s[i, j] = T.if_then_else(j >= i, 1.0, 0.0)
            T.fence_proxy_async()
            T.sync_threads()

            if thread < 128:
                T.set_max_nreg(224, 1)
                for turn in T.serial(T.ceildiv(items - worker, workers)):
                    slot = (worker + turn * workers) // groups
                    group = (worker + turn * workers) % groups
                    find_document(cu_seqlens, documents, slot, steps, C, place)
                    document = place[0]
                    first = cu_seqlens[document] + (slot - cu_seqlens[document] // C - document) * C
                    size = cu_seqlens[document + 1] - first
                    if size > 0:
                        T.barrier_wait(keys_full[item_phase % 2], item_phase // 2 % 2)
                        T.clear(dQ)
                        for member in T.serial(ratio):
                            T.barrier_wait(vec_full[0], head_phase % 2)
                            T.clear(c_f)
                            for pair in T.serial(pairs):
                                if pair > 0:
                                    for p in T.unroll(2):
                                        T.barrier_arrive(rows_empty[p])
                                T.clear(from_S)
                                for p in T.unroll(2):
                                    T.barrier_wait(rows_full[p], pair_phase % 2)
                                    T.barrier_wait(S_full[p], pair_phase % 2)
                                    if pair * 2 + p < parts:
                                        T.gemm(do_s[p, :, :], S_s[p, :, :], from_S)
                                    T.barrier_arrive(S_empty[p])
                                for i, j in T.Parallel(C, K):
                                    from_S[i, j] *= vec[ROW_Q, i]
                                for i, j in T.Parallel(C, K):
                                    dQ[i, j] += from_S[i, j]
                                T.copy(q_s[item_phase % 2, :, :], q_f)
                                for i, j in T.Parallel(C, K):
                                    from_S[i, j] *= T.cast(q_f[i, j], "float32")
                                T.reduce_sum(from_S, rows_q, dim=1)
                                for i in T.Parallel(C):
                                    c_f[i] += rows_q[i]
                                if pair == 0:
                                    T.clear(F)
                                for p in T.unroll(2):
                                    if pair * 2 + p < parts:
                                        T.gemm(do_s[p, :, :], W_s[p, :, :], F, transpose_B=True)
                                pair_phase += 1
                            for i, j in T.Parallel(C, C):
                                F[i, j] *= T.if_then_else(
                                    i >= j,
                                    T.exp2(vec[TOTAL, i] - vec[TOTAL, j])
                                    * (scale * chi_s[item_phase % 2, i])
                                    * vec[COLUMN, j],
                                    0.0,
                                )
                            for p in T.unroll(2):
                                T.barrier_arrive(rows_empty[p])
                            T.barrier_arrive(vec_empty[0])
                            T.copy(F, F_r)
                            T.barrier_wait(F_empty[0], (head_phase + 1) % 2)
                            T.copy(F_r, F_s)
                            T.fence_proxy_async()
                            T.barrier_arrive(F_full[0])
                            T.gemm(F_r, k_s[item_phase % 2, :, :], dQ)
                            T.gemm(
                                q_s[item_phase % 2, :, :],
                                k_s[item_phase % 2, :, :],
                                QK,
                                transpose_B=True,
                                clear_accum=True,
                            )
                            for i, j in T.Parallel(C, C):
                                QK[i, j] = T.if_then_else(i > j, F[i, j] * QK[i, j], 0.0)
                            T.copy(QK, zq)
                            T.copy(zq, zq_s)
                            for i, j in T.Parallel(C, C):
                                QK[i, j] -= T.cast(zq[i, j], "float32")
                            T.copy(QK, zq)
                            T.fence_proxy_async()
                            T.sync_threads(8, 128)
                            T.gemm(ones_s, zq_s, F, clear_accum=True)
                            T.sync_threads(8, 128)
                            T.copy(zq, zq_s)
                            T.fence_proxy_async()
                            T.sync_threads(8, 128)
                            T.gemm(ones_s, zq_s, F)
                            for i, j in T.Parallel(C, C):
                                F[i, j] = T.if_then_else(j < i, F[i, j], 0.0)
                            T.reduce_sum(F, rows_q, dim=1)
                            T.barrier_wait(sums_empty[0], (head_phase + 1) % 2)
                            T.copy(rows_q, crossing_q)
                            T.copy(c_f, c_s)
                            T.barrier_arrive(sums_full[0])
                            head_phase += 1
                        if l2norm:
                            T.copy(q_s[item_phase % 2, :, :], q_f)
                            for i, j in T.Parallel(C, K):
                                from_S[i, j] = dQ[i, j] * T.cast(q_f[i, j], "float32")
                            T.reduce_sum(from_S, rows_q, dim=1)
                            for i, j in T.Parallel(C, K):
                                dQ[i, j] -= (
                                    chi_s[item_phase % 2, i]
                                    * chi_s[item_phase % 2, i]
                                    * rows_q[i]
                                    * T.cast(q_f[i, j], "float32")
                                )
                        T.fence_proxy_async()
                        T.barrier_arrive(keys_empty[item_phase % 2])
                        for i, j in T.Parallel(C, K):
                            if i < size:
                                dq[first + i, group, j] = dQ[i, j]
                        item_phase += 1
            elif thread < 256:
                T.set_max_nreg(224, 1)
                for turn in T.serial(T.ceildiv(items - worker, workers)):
                    slot = (worker + turn * workers) // groups
                    group = (worker + turn * workers) % groups
                    find_document(cu_seqlens, documents, slot, steps, C, place)
                    document = place[0]
                    first = cu_seqlens[document] + (slot - cu_seqlens[document] // C - document) * C
                    size = cu_seqlens[document + 1] - first
                    if size > 0:
                        T.barrier_wait(keys_full[item_phase % 2], item_phase // 2 % 2)
                        T.clear(dK)
                        for member in T.serial(ratio):
                            head = group * ratio + member
                            T.barrier_wait(vec_full[0], head_phase % 2)
                            T.clear(d_f)
                            T.clear(e_f)
                            for pair in T.serial(pairs):
                                if pair > 0:
                                    for p in T.unroll(2):
                                        T.barrier_arrive(rows_empty[p])
                                T.clear(from_states)
                                for p in T.unroll(2):
                                    T.barrier_wait(rows_full[p], pair_phase % 2)
                                    T.barrier_wait(S_full[p], pair_phase % 2)
                                    if pair * 2 + p < parts:
                                        T.gemm(dv_s[p, :, :], S_s[p, :, :], from_states)
                                    T.barrier_arrive(S_empty[p])
                                for i, j in T.Parallel(C, K):
                                    from_states[i, j] *= vec[ROW_D, i]
                                for i, j in T.Parallel(C, K):
                                    dK[i, j] += from_states[i, j]
                                T.copy(k_s[item_phase % 2, :, :], k_f)
                                for i, j in T.Parallel(C, K):
                                    from_states[i, j] *= T.cast(k_f[i, j], "float32")
                                T.reduce_sum(from_states, rows_k, dim=1)
                                for i in T.Parallel(C):
                                    d_f[i] += rows_k[i]
                                T.clear(from_states)
                                for p in T.unroll(2):
                                    T.barrier_wait(dS_full[p], pair_phase % 2)
                                    if pair * 2 + p < parts:
                                        T.gemm(W_s[p, :, :], dS_s[p, :, :], from_states)
                                    T.barrier_arrive(dS_empty[p])
                                for i, j in T.Parallel(C, K):
                                    from_states[i, j] *= vec[ROW_E, i]
                                for i, j in T.Parallel(C, K):
                                    dK[i, j] += from_states[i, j]
                                T.copy(k_s[item_phase % 2, :, :], k_f)
                                for i, j in T.Parallel(C, K):
                                    from_states[i, j] *= T.cast(k_f[i, j], "float32")
                                T.reduce_sum(from_states, rows_k, dim=1)
                                for i in T.Parallel(C):
                                    e_f[i] += rows_k[i]
                                if pair == 0:
                                    T.clear(H)
                                for p in T.unroll(2):
                                    if pair * 2 + p < parts:
                                        T.gemm(dv_s[p, :, :], W_s[p, :, :], H, transpose_B=True)
                                if tiny_s[0] + tiny_s[1] > 0:
                                    for p in T.unroll(2):
                                        for row in T.serial(C):
                                            if vec[BETA, row] < vec[BAR, row] and row < size:
                                                for j in T.Parallel(part):
                                                    if (pair * 2 + p) * part + j < V:
                                                        dv[first + row, head, (pair * 2 + p) * part + j] = (
                                                            T.cast(dv_s[p, row, j], "float32")
                                                            * vec[BETA, row]
                                                            / vec[BAR, row]
                                                        )
                                    T.fence_proxy_async()
                                pair_phase += 1
                            for i, j in T.Parallel(C, C):
                                if i == j and i < size:
                                    dbeta[first + i, head] = H[i, j] / (vec[BAR, i] * vec[BAR, i])
                            for i, j in T.Parallel(C, C):
                                H[i, j] *= T.if_then_else(
                                    i > j,
                                    T.exp2(vec[TOTAL, i] - vec[TOTAL, j]) * vec[COLUMN, i] * vec[COLUMN, j],
                                    0.0,
                                )
                            gamma = T.alloc_var("float32")
                            gamma = T.exp2(vec[TOTAL, C - 1])
                            for p in T.unroll(2):
                                T.barrier_arrive(rows_empty[p])
                            T.barrier_arrive(vec_empty[0])
                            for i, j in T.Parallel(C, C):
                                H_r[i, j] = -H[i, j]
                            T.copy(H_r, H_s)
                            T.fence_proxy_async()
                            T.gemm(H_r, k_s[item_phase % 2, :, :], dK)
                            T.sync_threads(9, 128)
                            T.gemm(H_s, k_s[item_phase % 2, :, :], dK, transpose_A=True)
                            T.barrier_wait(F_full[0], head_phase % 2)
                            T.gemm(F_s, q_s[item_phase % 2, :, :], dK, transpose_A=True)
                            T.barrier_arrive(F_empty[0])
                            T.gemm(
                                k_s[item_phase % 2, :, :],
                                k_s[item_phase % 2, :, :],
                                KK,
                                transpose_B=True,
                                clear_accum=True,
                            )
                            for i, j in T.Parallel(C, C):
                                KK[i, j] *= -H[i, j]
                            T.copy(KK, zk)
                            T.copy(zk, zk_s)
                            for i, j in T.Parallel(C, C):
                                KK[i, j] -= T.cast(zk[i, j], "float32")
                            T.copy(KK, zk)
                            T.copy(d_f, d_s)
                            T.copy(e_f, e_s)
                            T.fence_proxy_async()
                            T.sync_threads(9, 128)
                            T.gemm(ones_s, zk_s, KK, clear_accum=True)
                            T.sync_threads(9, 128)
                            T.copy(zk, zk_s)
                            T.fence_proxy_async()
                            T.sync_threads(9, 128)
                            T.gemm(ones_s, zk_s, KK)
                            for i, j in T.Parallel(C, C):
                                KK[i, j] = T.if_then_else(j < i, KK[i, j], 0.0)
                            T.reduce_sum(KK, rows_k, dim=1)
                            T.copy(rows_k, crossing_k)
                            T.barrier_wait(inner_full[0], head_phase % 2)
                            T.barrier_wait(sums_full[0], head_phase % 2)
                            T.sync_threads(9, 128)
                            if thread < 128 + C:
                                t = thread - 128
                                inside = T.alloc_var("float32", init=0.0)
                                sum_g = T.alloc_var("float32", init=0.0)
                                inside = inner_s[0] + inner_s[1]
                                for i in T.unroll(C):
                                    sum_g += T.if_then_else(i >= t, c_s[i] + d_s[i], e_s[i])
                                if t < size:
                                    dg[first + t, head] = sum_g + inside * gamma + crossing_q[t] + crossing_k[t]
                            T.barrier_arrive(inner_empty[0])
                            T.barrier_arrive(sums_empty[0])
                            head_phase += 1
                        if l2norm:
                            T.copy(k_s[item_phase % 2, :, :], k_f)
                            for i, j in T.Parallel(C, K):
                                from_states[i, j] = dK[i, j] * T.cast(k_f[i, j], "float32")
                            T.reduce_sum(from_states, rows_k, dim=1)
                            for i, j in T.Parallel(C, K):
                                dK[i, j] -= (
                                    kappa_s[item_phase % 2, i]
                                    * kappa_s[item_phase % 2, i]
                                    * rows_k[i]
                                    * T.cast(k_f[i, j], "float32")
                                )
                        T.fence_proxy_async()
                        T.barrier_arrive(keys_empty[item_phase % 2])
                        for i, j in T.Parallel(C, K):
                            if i < size:
                                dk[first + i, group, j] = dK[i, j]
                        item_phase += 1
            else:
                T.set_max_nreg(56, 0)
                if thread < 256 + 32:
                    for turn in T.serial(T.ceildiv(items - worker, workers)):
                        slot = (worker + turn * workers) // groups
                        group = (worker + turn * workers) % groups
                        find_document(cu_seqlens, documents, slot, steps, C, place)
                        document = place[0]
                        first = cu_seqlens[document] + (slot - cu_seqlens[document] // C - document) * C
                        size = cu_seqlens[document + 1] - first
                        if size > 0:
                            T.barrier_wait(keys_empty[item_phase % 2], (item_phase // 2 + 1) % 2)
                            if size >= C:
                                T.tma_copy(
                                    q[first : first + C, group, :],
                                    q_s[item_phase % 2, :, :],
                                    barrier=keys_full[item_phase % 2],
                                )
                                T.tma_copy(
                                    k[first : first + C, group, :],
                                    k_s[item_phase % 2, :, :],
                                    barrier=keys_full[item_phase % 2],
                                )
                            else:
                                load_tail(q_s, item_phase % 2, q, first, group, 0, size, K)
                                load_tail(k_s, item_phase % 2, k, first, group, 0, size, K)
                                T.fence_proxy_async()
                            T.barrier_arrive(keys_full[item_phase % 2])
                            item_phase += 1
                            for member in T.serial(ratio):
                                head = group * ratio + member
                                for pair in T.serial(pairs):
                                    for p in T.unroll(2):
                                        columns = (pair * 2 + p) * part
                                        T.barrier_wait(rows_empty[p], (pair_phase + 1) % 2)
                                        if pair * 2 + p < parts:
                                            if size >= C:
                                                T.tma_copy(
                                                    do[first : first + C, head, columns : columns + part],
                                                    do_s[p, :, :],
                                                    barrier=rows_full[p],
                                                )
                                                T.tma_copy(
                                                    W[first : first + C, head, columns : columns + part],
                                                    W_s[p, :, :],
                                                    barrier=rows_full[p],
                                                )
                                                T.tma_copy(
                                                    dv[first : first + C, head, columns : columns + part],
                                                    dv_s[p, :, :],
                                                    barrier=rows_full[p],
                                                )
                                            else:
                                                load_tail(do_s, p, do, first, head, columns, size, part)
                                                load_tail(W_s, p, W, first, head, columns, size, part)
                                                load_tail(dv_s, p, dv, first, head, columns, size, part)
                                                T.fence_proxy_async()
                                        T.barrier_arrive(rows_full[p])
                                        T.barrier_wait(S_empty[p], (pair_phase + 1) % 2)
                                        if pair * 2 + p < parts:
                                            T.tma_copy(
                                                states[slot, head, columns : columns + part, :],
                                                S_s[p, :, :],
                                                barrier=S_full[p],
                                            )
                                        T.barrier_arrive(S_full[p])
                                    for p in T.unroll(2):
                                        columns = (pair * 2 + p) * part
                                        T.barrier_wait(dS_empty[p], (pair_phase + 1) % 2)
                                        if pair * 2 + p < parts:
                                            T.tma_copy(
                                                d_states[slot, head, columns : columns + part, :],
                                                dS_s[p, :, :],
                                                barrier=dS_full[p],
                                            )
                                        T.barrier_arrive(dS_full[p])
                                    pair_phase += 1
                elif thread < 256 + 96:
                    for turn in T.serial(T.ceildiv(items - worker, workers)):
                        slot = (worker + turn * workers) // groups
                        group = (worker + turn * workers) % groups
                        find_document(cu_seqlens, documents, slot, steps, C, place)
                        document = place[0]
                        first = cu_seqlens[document] + (slot - cu_seqlens[document] // C - document) * C
                        size = cu_seqlens[document + 1] - first
                        if size > 0:
                            u = thread - 288
                            chi = norms[slot, group, 0, u]
                            kappa = norms[slot, group, 1, u]
                            T.barrier_wait(keys_empty[item_phase % 2], (item_phase // 2 + 1) % 2)
                            chi_s[item_phase % 2, u] = chi
                            kappa_s[item_phase % 2, u] = kappa
                            T.barrier_arrive(keys_full[item_phase % 2])
                            item_phase += 1
                            for member in T.serial(ratio):
                                head = group * ratio + member
                                total = gates[slot, head, 0, u] * LOG2E
                                beta = gates[slot, head, 1, u]
                                bar = T.max(beta, BETA_MIN[dtype])
                                tiny = T.any_sync(beta < bar)
                                gamma_u = T.exp2(total)
                                kappa_fix = kappa * beta / bar
                                row_e = T.exp2(gates[slot, head, 0, C - 1] * LOG2E - total) * kappa_fix
                                inside_sum = T.alloc_var("float32")
                                inside_sum = 0.0
                                T.barrier_wait(vec_empty[0], (head_phase + 1) % 2)
                                vec[TOTAL, u] = total
                                vec[ROW_Q, u] = scale * chi * gamma_u
                                vec[ROW_D, u] = -gamma_u * kappa_fix
                                vec[ROW_E, u] = row_e
                                vec[COLUMN, u] = kappa_fix
                                vec[BETA, u] = beta
                                vec[BAR, u] = bar
                                if u % 32 == 0:
                                    tiny_s[u // 32] = tiny
                                T.barrier_arrive(vec_full[0])
                                for pair in T.serial(pairs):
                                    for p in T.unroll(2):
                                        T.barrier_wait(S_full[p], pair_phase % 2)
                                        T.barrier_wait(dS_full[p], pair_phase % 2)
                                        if pair * 2 + p < parts:
                                            for block in T.serial(part * K // 8 // 64):
                                                row = (block * 64 + u) // (K // 8)
                                                column = (block * 64 + u) % (K // 8) * 8
                                                for x in T.vectorized(8):
                                                    s_8[x] = S_s[p, row, column + x]
                                                for x in T.vectorized(8):
                                                    ds_8[x] = dS_s[p, row, column + x]
                                                for x in T.unroll(8):
                                                    inside_sum += T.cast(s_8[x], "float32") * T.cast(ds_8[x], "float32")
                                        T.fence_proxy_async()
                                        T.barrier_arrive(S_empty[p])
                                        T.barrier_arrive(dS_empty[p])
                                    pair_phase += 1
                                for distance in T.unroll(5):
                                    inside_sum += T.shfl_xor(inside_sum, 16 >> distance)
                                T.barrier_wait(inner_empty[0], (head_phase + 1) % 2)
                                if u % 32 == 0:
                                    inner_s[u // 32] = inside_sum
                                T.barrier_arrive(inner_full[0])
                                head_phase += 1

    return gradients
