"""G: the gradients of q, k, g and β, all chunks at once.

Per chunk and key head, with S at the chunk's start, dS at its end, W from `forward`, dV from `reverse`, and
fix = β/β̄ (1 unless β is tiny); sums run over the value heads of the group:

    F_ij = scale χ_i κ_j Γ_ij fix_j (dO Wᵀ)_ij   (i ≥ j)      H_ij = κ_i κ_j Γ_ij fix_i fix_j (dV Wᵀ)_ij   (i > j)
    dQ = Σ scale γχ ∘ (dO Sᵀ) + (ΣF) K                         dq = dQ − χ² q (q·dQ)   with L2 normalisation
    dK = Σ [ρκ fix ∘ (W dSᵀ) − γκ fix ∘ (dV Sᵀ)] + (ΣF)ᵀ Q − (ΣH + ΣHᵀ) K       dk likewise with κ
    dβ_i = (dV Wᵀ)_ii / β̄_i²
    dg_t = Σ_{i≥t} (c + d)_i + Σ_{j<t} e_j + γ_C ⟨S, dS⟩ + Σ_{i≥t>j} Z_ij
    c = q·(scale γχ dO Sᵀ)   d = −k·(γκ fix dV Sᵀ)   e = k·(ρκ fix W dSᵀ)   Z = F ∘ QKᵀ − H ∘ KKᵀ   (i > j)

Every term of dg carries its own decay: nothing is subtracted that was added, so strong decay costs no digits.

Persistent blocks take items (slot, key head). Two consumer warpgroups: the first makes F, dQ, c and γ_C⟨S, dS⟩, the
second H, dK, d, e, dβ and from both sides dg. A producer warp brings tiles as their last reader leaves them.
Values come in parts of `part` rows of S, so that V = 256 fits into shared memory.
"""

import tilelang.language as T

from qlakernels.gated_delta_rule.hopper.common import (
    BETA_MIN,
    CHUNK,
    LOG2E,
    find_document,
    load_tail_of,
)

PAD = 1  # floats behind a row of Z: sums along rows and along columns then meet no bank twice


def gradients_kernel(key_dim, value_dim, part, dtype, l2norm):
    C = CHUNK
    K, V = key_dim, value_dim
    parts = -(-V // part)
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
            q_s = T.alloc_shared((C, K), dtype)
            k_s = T.alloc_shared((C, K), dtype)
            do_s = T.alloc_shared((C, part), dtype)
            W_s = T.alloc_shared((C, part), dtype)
            dv_s = T.alloc_shared((C, part), dtype)
            S_s = T.alloc_shared((part, K), dtype)
            dS_s = T.alloc_shared((part, K), dtype)
            F_s = T.alloc_shared((C, C), dtype)
            H_s = T.alloc_shared((C, C), dtype)
            zq_s = T.alloc_shared((C, C + PAD), "float32")
            zk_s = T.alloc_shared((C, C + PAD), "float32")
            total_s = T.alloc_shared((C,), "float32")
            beta_s = T.alloc_shared((C,), "float32")
            chi_s = T.alloc_shared((C,), "float32")
            kappa_s = T.alloc_shared((C,), "float32")
            c_s = T.alloc_shared((C,), "float32")
            d_s = T.alloc_shared((C,), "float32")
            e_s = T.alloc_shared((C,), "float32")
            crossing_q = T.alloc_shared((C,), "float32")
            crossing_k = T.alloc_shared((C,), "float32")
            inner_s = T.alloc_shared((32,), "float32")

            # the first consumer's
            dQ = T.alloc_fragment((C, K), "float32")
            F_sum = T.alloc_fragment((C, C), "float32")
            F = T.alloc_fragment((C, C), "float32")
            F_r = T.alloc_fragment((C, C), dtype)
            QK = T.alloc_fragment((C, C), "float32")
            from_S = T.alloc_fragment((C, K), "float32")
            rows_q = T.alloc_fragment((C,), "float32")
            c_f = T.alloc_fragment((C,), "float32")
            inner = T.alloc_fragment((32, K), "float32")
            inner_rows = T.alloc_fragment((32,), "float32")
            # the second consumer's
            dK = T.alloc_fragment((C, K), "float32")
            H_sum = T.alloc_fragment((C, C), "float32")
            H = T.alloc_fragment((C, C), "float32")
            H_r = T.alloc_fragment((C, C), dtype)
            KK = T.alloc_fragment((C, C), "float32")
            from_states = T.alloc_fragment((C, K), "float32")
            rows_k = T.alloc_fragment((C,), "float32")
            d_f = T.alloc_fragment((C,), "float32")
            e_f = T.alloc_fragment((C,), "float32")

            keys_full, keys_empty = T.alloc_barrier([32]), T.alloc_barrier([256])
            rows_full, rows_empty = T.alloc_barrier([32]), T.alloc_barrier([256])
            S_full, S_empty = T.alloc_barrier([32]), T.alloc_barrier([256])
            dS_full, dS_empty = T.alloc_barrier([32]), T.alloc_barrier([256])
            sums_full, sums_empty = T.alloc_barrier([128]), T.alloc_barrier([128])
            F_full, F_empty = T.alloc_barrier([128]), T.alloc_barrier([128])

            thread = T.get_thread_binding()
            items = slots * groups
            item_phase = T.alloc_var("int32", init=0)  # items done
            part_phase = T.alloc_var("int32", init=0)  # parts of heads done
            head_phase = T.alloc_var("int32", init=0)  # heads done
            document = T.alloc_var("int32")
            place = T.alloc_local((3,), "int32")
            first = T.alloc_var("int32")
            size = T.alloc_var("int32")
            slot = T.alloc_var("int32")
            group = T.alloc_var("int32")

            if thread < 128:
                T.set_max_nreg(232, 1)
                for turn in T.serial(T.ceildiv(items - worker, workers)):
                    slot = (worker + turn * workers) // groups
                    group = (worker + turn * workers) % groups
                    find_document(cu_seqlens, documents, slot, steps, C, place)
                    document = place[0]
                    first = cu_seqlens[document] + (slot - cu_seqlens[document] // C - document) * C
                    size = cu_seqlens[document + 1] - first
                    if size > 0:
                        T.barrier_wait(keys_full[0], item_phase % 2)
                        T.clear(dQ)
                        T.clear(F_sum)
                        for member in T.serial(ratio):
                            T.clear(c_f)
                            T.clear(inner)
                            for p in T.serial(parts):
                                T.barrier_wait(rows_full[0], part_phase % 2)
                                if p == 0:
                                    T.gemm(do_s, W_s, F, transpose_B=True, clear_accum=True)
                                else:
                                    T.gemm(do_s, W_s, F, transpose_B=True)
                                T.barrier_wait(S_full[0], part_phase % 2)
                                T.gemm(do_s, S_s, from_S, clear_accum=True)
                                T.barrier_wait(dS_full[0], part_phase % 2)
                                for piece in T.serial(part // 32):
                                    for i, j in T.Parallel(32, K):
                                        inner[i, j] += T.cast(S_s[piece * 32 + i, j], "float32") * T.cast(
                                            dS_s[piece * 32 + i, j], "float32"
                                        )
                                T.barrier_arrive(S_empty[0])
                                T.barrier_arrive(dS_empty[0])
                                for i, j in T.Parallel(C, K):
                                    from_S[i, j] *= scale * chi_s[i] * T.exp2(total_s[i] * LOG2E)
                                for i, j in T.Parallel(C, K):
                                    dQ[i, j] += from_S[i, j]
                                for i, j in T.Parallel(C, K):
                                    from_S[i, j] *= T.cast(q_s[i, j], "float32")
                                T.reduce_sum(from_S, rows_q, dim=1)
                                for i in T.Parallel(C):
                                    c_f[i] += rows_q[i]
                                if p < parts - 1:
                                    T.barrier_arrive(rows_empty[0])
                                    part_phase += 1
                            for i, j in T.Parallel(C, C):
                                F[i, j] *= T.if_then_else(
                                    i >= j,
                                    T.exp2((total_s[i] - total_s[j]) * LOG2E)
                                    * (scale * chi_s[i])
                                    * (kappa_s[j] * beta_s[j] / T.max(beta_s[j], BETA_MIN[dtype])),
                                    0.0,
                                )
                            for i, j in T.Parallel(C, C):
                                F_sum[i, j] += F[i, j]
                            T.gemm(q_s, k_s, QK, transpose_B=True, clear_accum=True)
                            T.barrier_wait(sums_empty[0], (head_phase + 1) % 2)
                            for i, j in T.Parallel(C, C):
                                zq_s[i, j] = T.if_then_else(i > j, F[i, j] * QK[i, j], 0.0)
                            T.copy(c_f, c_s)
                            T.reduce_sum(inner, inner_rows, dim=1)
                            T.copy(inner_rows, inner_s)
                            T.sync_threads(8, 128)
                            if thread < C:
                                before = T.alloc_var("float32", init=0.0)
                                here = T.alloc_var("float32")
                                for j in T.serial(C):
                                    here = zq_s[thread, j]
                                    zq_s[thread, j] = before
                                    before += here
                            T.sync_threads(8, 128)
                            if thread < C:
                                below = T.alloc_var("float32", init=0.0)
                                for i in T.serial(C):
                                    if i >= thread:
                                        below += zq_s[i, thread]
                                crossing_q[thread] = below
                            T.barrier_arrive(sums_full[0])
                            T.barrier_arrive(rows_empty[0])
                            part_phase += 1
                            head_phase += 1
                        T.copy(F_sum, F_r)
                        T.barrier_wait(F_empty[0], (item_phase + 1) % 2)
                        T.copy(F_r, F_s)
                        T.fence_proxy_async()
                        T.barrier_arrive(F_full[0])
                        T.gemm(F_r, k_s, dQ)
                        if l2norm:
                            for i, j in T.Parallel(C, K):
                                from_S[i, j] = dQ[i, j] * T.cast(q_s[i, j], "float32")
                            T.reduce_sum(from_S, rows_q, dim=1)
                            for i, j in T.Parallel(C, K):
                                dQ[i, j] -= chi_s[i] * chi_s[i] * rows_q[i] * T.cast(q_s[i, j], "float32")
                        T.barrier_arrive(keys_empty[0])
                        for i, j in T.Parallel(C, K):
                            if i < size:
                                dq[first + i, group, j] = dQ[i, j]
                        item_phase += 1
            elif thread < 256:
                T.set_max_nreg(232, 1)
                for turn in T.serial(T.ceildiv(items - worker, workers)):
                    slot = (worker + turn * workers) // groups
                    group = (worker + turn * workers) % groups
                    find_document(cu_seqlens, documents, slot, steps, C, place)
                    document = place[0]
                    first = cu_seqlens[document] + (slot - cu_seqlens[document] // C - document) * C
                    size = cu_seqlens[document + 1] - first
                    if size > 0:
                        T.barrier_wait(keys_full[0], item_phase % 2)
                        T.clear(dK)
                        T.clear(H_sum)
                        for member in T.serial(ratio):
                            head = group * ratio + member
                            T.clear(d_f)
                            T.clear(e_f)
                            for p in T.serial(parts):
                                T.barrier_wait(rows_full[0], part_phase % 2)
                                if p == 0:
                                    T.gemm(dv_s, W_s, H, transpose_B=True, clear_accum=True)
                                else:
                                    T.gemm(dv_s, W_s, H, transpose_B=True)
                                T.barrier_wait(S_full[0], part_phase % 2)
                                T.gemm(dv_s, S_s, from_states, clear_accum=True)
                                T.barrier_arrive(S_empty[0])
                                for i, j in T.Parallel(C, K):
                                    from_states[i, j] *= -(
                                        T.exp2(total_s[i] * LOG2E)
                                        * kappa_s[i]
                                        * beta_s[i]
                                        / T.max(beta_s[i], BETA_MIN[dtype])
                                    )
                                for i, j in T.Parallel(C, K):
                                    dK[i, j] += from_states[i, j]
                                for i, j in T.Parallel(C, K):
                                    from_states[i, j] *= T.cast(k_s[i, j], "float32")
                                T.reduce_sum(from_states, rows_k, dim=1)
                                for i in T.Parallel(C):
                                    d_f[i] += rows_k[i]
                                T.barrier_wait(dS_full[0], part_phase % 2)
                                T.gemm(W_s, dS_s, from_states, clear_accum=True)
                                T.barrier_arrive(dS_empty[0])
                                for i, j in T.Parallel(C, K):
                                    from_states[i, j] *= (
                                        T.exp2((total_s[C - 1] - total_s[i]) * LOG2E)
                                        * kappa_s[i]
                                        * beta_s[i]
                                        / T.max(beta_s[i], BETA_MIN[dtype])
                                    )
                                for i, j in T.Parallel(C, K):
                                    dK[i, j] += from_states[i, j]
                                for i, j in T.Parallel(C, K):
                                    from_states[i, j] *= T.cast(k_s[i, j], "float32")
                                T.reduce_sum(from_states, rows_k, dim=1)
                                for i in T.Parallel(C):
                                    e_f[i] += rows_k[i]
                                for i, j in T.Parallel(C, part):
                                    if i < size and p * part + j < V and beta_s[i] < BETA_MIN[dtype]:
                                        dv[first + i, head, p * part + j] = (
                                            T.cast(dv_s[i, j], "float32") * beta_s[i] / BETA_MIN[dtype]
                                        )
                                if p < parts - 1:
                                    T.barrier_arrive(rows_empty[0])
                                    part_phase += 1
                            for i, j in T.Parallel(C, C):
                                if i == j and i < size:
                                    dbeta[first + i, head] = H[i, j] / (
                                        T.max(beta_s[i], BETA_MIN[dtype]) * T.max(beta_s[i], BETA_MIN[dtype])
                                    )
                            for i, j in T.Parallel(C, C):
                                H[i, j] *= T.if_then_else(
                                    i > j,
                                    T.exp2((total_s[i] - total_s[j]) * LOG2E)
                                    * (kappa_s[i] * beta_s[i] / T.max(beta_s[i], BETA_MIN[dtype]))
                                    * (kappa_s[j] * beta_s[j] / T.max(beta_s[j], BETA_MIN[dtype])),
                                    0.0,
                                )
                            for i, j in T.Parallel(C, C):
                                H_sum[i, j] -= H[i, j]
                            T.gemm(k_s, k_s, KK, transpose_B=True, clear_accum=True)
                            for i, j in T.Parallel(C, C):
                                zk_s[i, j] = -H[i, j] * KK[i, j]
                            T.copy(d_f, d_s)
                            T.copy(e_f, e_s)
                            T.sync_threads(9, 128)
                            if thread < 128 + C:
                                prefix = T.alloc_var("float32", init=0.0)
                                value = T.alloc_var("float32")
                                for j in T.serial(C):
                                    value = zk_s[thread - 128, j]
                                    zk_s[thread - 128, j] = prefix
                                    prefix += value
                            T.sync_threads(9, 128)
                            if thread < 128 + C:
                                under = T.alloc_var("float32", init=0.0)
                                for i in T.serial(C):
                                    if i >= thread - 128:
                                        under += zk_s[i, thread - 128]
                                crossing_k[thread - 128] = under
                            T.barrier_wait(sums_full[0], head_phase % 2)
                            if thread < 128 + C:
                                t = thread - 128
                                inside = T.alloc_var("float32", init=0.0)
                                for i in T.serial(32):
                                    inside += inner_s[i]
                                sum_g = T.alloc_var("float32")
                                sum_g = inside * T.exp2(total_s[C - 1] * LOG2E) + crossing_q[t] + crossing_k[t]
                                for i in T.serial(C):
                                    if i >= t:
                                        sum_g += c_s[i] + d_s[i]
                                    else:
                                        sum_g += e_s[i]
                                if t < size:
                                    dg[first + t, head] = sum_g
                            T.barrier_arrive(sums_empty[0])
                            T.barrier_arrive(rows_empty[0])
                            part_phase += 1
                            head_phase += 1
                        T.copy(H_sum, H_r)
                        T.copy(H_r, H_s)
                        T.fence_proxy_async()
                        T.gemm(H_r, k_s, dK)
                        T.sync_threads(9, 128)
                        T.gemm(H_s, k_s, dK, transpose_A=True)
                        T.barrier_wait(F_full[0], item_phase % 2)
                        T.gemm(F_s, q_s, dK, transpose_A=True)
                        T.barrier_arrive(F_empty[0])
                        if l2norm:
                            for i, j in T.Parallel(C, K):
                                from_states[i, j] = dK[i, j] * T.cast(k_s[i, j], "float32")
                            T.reduce_sum(from_states, rows_k, dim=1)
                            for i, j in T.Parallel(C, K):
                                dK[i, j] -= kappa_s[i] * kappa_s[i] * rows_k[i] * T.cast(k_s[i, j], "float32")
                        T.barrier_arrive(keys_empty[0])
                        for i, j in T.Parallel(C, K):
                            if i < size:
                                dk[first + i, group, j] = dK[i, j]
                        item_phase += 1
            else:
                T.set_max_nreg(40, 0)
                if thread < 256 + 32:
                    for turn in T.serial(T.ceildiv(items - worker, workers)):
                        slot = (worker + turn * workers) // groups
                        group = (worker + turn * workers) % groups
                        find_document(cu_seqlens, documents, slot, steps, C, place)
                        document = place[0]
                        first = cu_seqlens[document] + (slot - cu_seqlens[document] // C - document) * C
                        size = cu_seqlens[document + 1] - first
                        if size > 0:
                            T.barrier_wait(keys_empty[0], (item_phase + 1) % 2)
                            if size >= C:
                                T.tma_copy(q[first : first + C, group, :], q_s, barrier=keys_full[0])
                                T.tma_copy(k[first : first + C, group, :], k_s, barrier=keys_full[0])
                            else:
                                load_tail_of(q_s, q, first, group, 0, size, K)
                                load_tail_of(k_s, k, first, group, 0, size, K)
                                T.fence_proxy_async()
                            for i in T.Parallel(C):
                                chi_s[i] = norms[slot, group, 0, i]
                            for i in T.Parallel(C):
                                kappa_s[i] = norms[slot, group, 1, i]
                            T.barrier_arrive(keys_full[0])
                            for member in T.serial(ratio):
                                head = group * ratio + member
                                for p in T.serial(parts):
                                    T.barrier_wait(rows_empty[0], (part_phase + 1) % 2)
                                    if size >= C:
                                        T.tma_copy(
                                            do[first : first + C, head, p * part : p * part + part],
                                            do_s,
                                            barrier=rows_full[0],
                                        )
                                        T.tma_copy(
                                            W[first : first + C, head, p * part : p * part + part],
                                            W_s,
                                            barrier=rows_full[0],
                                        )
                                        T.tma_copy(
                                            dv[first : first + C, head, p * part : p * part + part],
                                            dv_s,
                                            barrier=rows_full[0],
                                        )
                                    else:
                                        load_tail_of(do_s, do, first, head, p * part, size, part)
                                        load_tail_of(W_s, W, first, head, p * part, size, part)
                                        load_tail_of(dv_s, dv, first, head, p * part, size, part)
                                        T.fence_proxy_async()
                                    for i in T.Parallel(C):
                                        total_s[i] = gates[slot, head, 0, i]
                                    for i in T.Parallel(C):
                                        beta_s[i] = gates[slot, head, 1, i]
                                    T.barrier_arrive(rows_full[0])
                                    T.barrier_wait(S_empty[0], (part_phase + 1) % 2)
                                    T.tma_copy(
                                        states[slot, head, p * part : p * part + part, :], S_s, barrier=S_full[0]
                                    )
                                    T.barrier_arrive(S_full[0])
                                    T.barrier_wait(dS_empty[0], (part_phase + 1) % 2)
                                    T.tma_copy(
                                        d_states[slot, head, p * part : p * part + part, :], dS_s, barrier=dS_full[0]
                                    )
                                    T.barrier_arrive(dS_full[0])
                                    part_phase += 1
                            item_phase += 1

    return gradients
