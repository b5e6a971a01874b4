"""R: the reverse scan.

Per document and value head, over its chunks from the last to the first, with the gradient of the state dS [K, V] in
float32 registers; it needs neither S nor V (symbols as in `forward`; dO the gradient of O):

    D = ρκ ∘ (K dS) + Pᵀ dO            the gradient of β ∘ E
    Y = D + Nᵀ (β ∘ D)                 dV = β ∘ Y, written as round(β̄ ∘ Y)
    dS ← γ_C dS + Qᵀ (scale γχ ∘ dO) − Kᵀ (γκβ/β̄ ∘ round(β̄ ∘ Y))

dS is written at the end of each chunk, before that chunk is taken back: `gradients` needs it there.

Held transposed and shared out between warps as in `forward`; q, dO and P have one stage.
Registers of a consumer: dS 64, its rounded copy 32, D 32, dO 16, an operand 16, the output 16: about 190 of 216.
Shared memory (K = 128): k 32, q 16, dO 8, N 16, P 8, dV 8, dS 16, vectors 3: 107 KB.
"""

import tilelang.language as T
from tilelang.layout import make_full_bank_swizzled_layout

from qlakernels.gated_delta_rule.hopper.common import (
    BETA_MIN,
    CHUNK,
    LOG2E,
    load_tail,
    load_tail_of,
    transposed_accumulator,
)

STAGES = 2
VECTORS = 6
RHO_KAPPA, BETA, BETA_BAR, OUTPUT, INTO_STATE, GAMMA = range(VECTORS)


def reverse_kernel(key_dim, value_dim, dtype):
    C = CHUNK
    K, V = key_dim, value_dim
    part = 64
    consumers = 128
    tokens, heads, groups = T.dynamic("tokens"), T.dynamic("heads"), T.dynamic("groups")
    slots, documents, starts, ends = (T.dynamic(x) for x in ("slots", "documents", "starts", "ends"))
    q_token, q_head = T.dynamic("q_token"), T.dynamic("q_head")
    k_token, k_head = T.dynamic("k_token"), T.dynamic("k_head")
    o_token, o_head = T.dynamic("o_token"), T.dynamic("o_head")

    @T.prim_func
    def reverse(
        q: T.StridedTensor((tokens, groups, K), (q_token, q_head, 1), dtype),
        k: T.StridedTensor((tokens, groups, K), (k_token, k_head, 1), dtype),
        do: T.StridedTensor((tokens, heads, V), (o_token, o_head, 1), dtype),
        N: T.Tensor((slots, heads, C, C), dtype),
        P: T.Tensor((slots, heads, C, C), dtype),
        gates: T.Tensor((slots, heads, 2, C), "float32"),
        norms: T.Tensor((slots, groups, 2, C), "float32"),
        cu_seqlens: T.Tensor((documents + 1,), "int32"),
        d_final_state: T.Tensor((ends, heads, K, V), "float32"),
        dv: T.Tensor((tokens, heads, V), dtype),
        d_states: T.Tensor((slots, heads, V, K), dtype),
        d_initial_state: T.Tensor((starts, heads, K, V), "float32"),
        scale: T.float32,
        ratio: T.int32,
    ):
        with T.Kernel(T.ceildiv(V, part), heads, documents, threads=consumers + 128) as (p, head, document):
            q_s = T.alloc_shared((C, K), dtype)
            k_s = T.alloc_shared((STAGES, C, K), dtype)
            do_s = T.alloc_shared((C, part), dtype)
            N_s = T.alloc_shared((STAGES, C, C), dtype)
            P_s = T.alloc_shared((C, C), dtype)
            vec = T.alloc_shared((STAGES, VECTORS, C), "float32")
            dv_s = T.alloc_shared((C, part), dtype)
            dS_s = T.alloc_shared((part, K), dtype)
            dS = T.alloc_fragment((part, K), "float32")
            dS_r = T.alloc_fragment((part, K), dtype)
            D = T.alloc_fragment((part, C), "float32")
            left = T.alloc_fragment((part, C), dtype)
            do_f = T.alloc_fragment((C, part), dtype)
            dv_f = T.alloc_fragment((C, part), dtype)
            full = T.alloc_barrier([96] * STAGES)
            empty = T.alloc_barrier([consumers] * STAGES)
            q_full, q_empty = T.alloc_barrier([32]), T.alloc_barrier([consumers])
            P_full, P_empty = T.alloc_barrier([32]), T.alloc_barrier([consumers])
            T.annotate_min_blocks_per_sm(2)
            T.annotate_layout(
                {
                    do_f: transposed_accumulator(part),
                    dv_f: transposed_accumulator(part),
                    do_s: make_full_bank_swizzled_layout(do_s),
                    dv_s: make_full_bank_swizzled_layout(dv_s),
                }
            )
            thread = T.get_thread_binding()
            group = T.alloc_var("int32")
            group = head // ratio
            start = T.alloc_var("int32")
            length = T.alloc_var("int32")
            start = cu_seqlens[document]
            length = cu_seqlens[document + 1] - start
            slot = T.alloc_var("int32")
            slot = start // C + document
            chunks = T.alloc_var("int32")
            chunks = T.ceildiv(length, C)
            columns = p * part

            if thread < consumers:
                T.set_max_nreg(216, 1)
                if ends > 0:
                    for i, j in T.Parallel(part, K):
                        dS[i, j] = d_final_state[document, head, j, columns + i]
                else:
                    T.clear(dS)
                for step in T.serial(chunks):
                    c = chunks - 1 - step
                    T.copy(dS, dS_r)
                    T.tma_store_wait(0)
                    T.sync_threads(1, consumers)
                    T.copy(dS_r, dS_s)
                    T.fence_proxy_async()
                    T.barrier_wait(full[step % STAGES], step // STAGES % 2)
                    T.gemm(dS_r, k_s[step % STAGES, :, :], D, transpose_B=True, clear_accum=True)
                    T.barrier_wait(P_full[0], step % 2)
                    T.copy(do_s, do_f)
                    for i, j in T.Parallel(part, C):
                        D[i, j] *= vec[step % STAGES, RHO_KAPPA, j]
                    for i, j in T.Parallel(part, C):
                        left[i, j] = do_f[j, i]
                    T.gemm(left, P_s, D)
                    T.fence_proxy_async()
                    T.barrier_arrive(P_empty[0])
                    gamma = T.alloc_var("float32")
                    gamma = vec[step % STAGES, GAMMA, C - 1]
                    for i, j in T.Parallel(part, K):
                        dS[i, j] *= gamma
                    for i, j in T.Parallel(part, C):
                        left[i, j] = T.cast(do_f[j, i], "float32") * vec[step % STAGES, OUTPUT, j]
                    T.barrier_wait(q_full[0], step % 2)
                    T.gemm(left, q_s, dS)
                    T.barrier_arrive(q_empty[0])
                    for i, j in T.Parallel(part, C):
                        left[i, j] = D[i, j] * vec[step % STAGES, BETA, j]
                    T.gemm(left, N_s[step % STAGES, :, :], D)
                    for i, j in T.Parallel(part, C):
                        dv_f[j, i] = D[i, j] * vec[step % STAGES, BETA_BAR, j]
                    for i, j in T.Parallel(part, C):
                        left[i, j] = T.cast(dv_f[j, i], "float32") * vec[step % STAGES, INTO_STATE, j]
                    T.gemm(left, k_s[step % STAGES, :, :], dS)
                    T.barrier_arrive(empty[step % STAGES])
                    T.copy(dv_f, dv_s)
                    T.fence_proxy_async()
                    T.sync_threads(1, consumers)
                    T.tma_copy(dS_s, d_states[slot + c, head, columns : columns + part, :])
                    first = start + c * C
                    if c * C + C <= length:
                        T.tma_copy(dv_s, dv[first : first + C, head, columns : columns + part])
                    else:
                        for i, j in T.Parallel(C, part):
                            if c * C + i < length and columns + j < V:
                                dv[first + i, head, columns + j] = dv_s[i, j]
                if starts > 0:
                    for i, j in T.Parallel(part, K):
                        d_initial_state[document, head, j, columns + i] = dS[i, j]
                T.tma_store_wait(0)
            else:
                T.set_max_nreg(40, 0)
                if thread < consumers + 32:
                    for step in T.serial(chunks):
                        c = chunks - 1 - step
                        T.barrier_wait(empty[step % STAGES], (step // STAGES + 1) % 2)
                        first = start + c * C
                        left_rows = length - c * C
                        if left_rows >= C:
                            T.tma_copy(
                                k[first : first + C, group, :], k_s[step % STAGES, :, :], barrier=full[step % STAGES]
                            )
                        else:
                            load_tail(k_s, step % STAGES, k, first, group, 0, left_rows, K)
                            T.fence_proxy_async()
                        T.tma_copy(N[slot + c, head, :, :], N_s[step % STAGES, :, :], barrier=full[step % STAGES])
                        T.barrier_arrive(full[step % STAGES])
                        T.barrier_wait(P_empty[0], (step + 1) % 2)
                        if left_rows >= C:
                            T.tma_copy(do[first : first + C, head, columns : columns + part], do_s, barrier=P_full[0])
                        else:
                            load_tail_of(do_s, do, first, head, columns, left_rows, part)
                            T.fence_proxy_async()
                        T.tma_copy(P[slot + c, head, :, :], P_s, barrier=P_full[0])
                        T.barrier_arrive(P_full[0])
                        T.barrier_wait(q_empty[0], (step + 1) % 2)
                        if left_rows >= C:
                            T.tma_copy(q[first : first + C, group, :], q_s, barrier=q_full[0])
                        else:
                            load_tail_of(q_s, q, first, group, 0, left_rows, K)
                            T.fence_proxy_async()
                        T.barrier_arrive(q_full[0])
                elif thread < consumers + 96:
                    i = thread - consumers - 32
                    for step in T.serial(chunks):
                        c = chunks - 1 - step
                        T.barrier_wait(empty[step % STAGES], (step // STAGES + 1) % 2)
                        total = gates[slot + c, head, 0, i]
                        beta = gates[slot + c, head, 1, i]
                        chi = norms[slot + c, group, 0, i]
                        kappa = norms[slot + c, group, 1, i]
                        gamma_i = T.exp2(total * LOG2E)
                        bar = T.max(beta, BETA_MIN[dtype])
                        vec[step % STAGES, RHO_KAPPA, i] = (
                            T.exp2((gates[slot + c, head, 0, C - 1] - total) * LOG2E) * kappa
                        )
                        vec[step % STAGES, GAMMA, i] = gamma_i
                        vec[step % STAGES, BETA, i] = beta
                        vec[step % STAGES, BETA_BAR, i] = bar
                        vec[step % STAGES, OUTPUT, i] = scale * gamma_i * chi
                        vec[step % STAGES, INTO_STATE, i] = -gamma_i * kappa * beta / bar
                        T.barrier_arrive(full[step % STAGES])

    return reverse
