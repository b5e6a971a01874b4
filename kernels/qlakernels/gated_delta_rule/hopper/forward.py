"""F: the forward scan.

Per document and value head, over its chunks in order, with the state S [K, V] in float32 registers (γ = exp(G),
ρ = exp(G_C − G), and P, N, κ, χ, β from `prepare`):

    X = V − γκ ∘ (K S)                 E = X + N (β ∘ X)              the prediction errors, solved within the chunk
    O = scale γχ ∘ (Q S) + P (β ∘ E)
    W = round(β̄ ∘ E)                   S ← γ_C S + Kᵀ (ρκβ/β̄ ∘ W)     β̄ = max(β, BETA_MIN)

The backward keeps W instead of V. W is what enters the state, so a replay from W repeats the state's own rounding, and
with β̄ in place of β it also holds E where β is zero.

Everything is held transposed, [V, C] and [V, K], so that the state and what is made of it are left operands from
registers. A block takes ROWS = 64 rows of V, which need nothing of the other rows, with one consumer warpgroup; two
blocks share a multiprocessor and fill each other's waits. Its producer warpgroup brings tiles (one warp, TMA) and
makes the vectors of a chunk from its gates (two warps). k, N and the vectors have two stages; q, v and P have one,
which is free again early in the chunk.

Registers of a consumer: S 64, its rounded copy 32, X 32, O 32, an operand 16, V and the output 16: about 200 of 216.
Shared memory (K = 128): k 32, q 16, v 8, N 16, P 8, O and W 16, vectors 3: 99 KB.
"""

import tilelang.language as T
from tilelang.layout import make_full_bank_swizzled_layout

from qlakernels.gated_delta_rule.hopper.common import (
    BETA_MIN,
    CHUNK,
    LOG2E,
    ROWS,
    STATE_STRIDE,
    load_tail,
    load_tail_of,
    transposed_accumulator,
)

STAGES = 2
VECTORS = 6
GAMMA_KAPPA, BETA, BETA_BAR, OUTPUT, INTO_STATE, GAMMA = range(VECTORS)


def forward_kernel(key_dim, value_dim, dtype, keep):
    """`keep`: write W and the states that the backward needs."""
    C = CHUNK
    K, V = key_dim, value_dim
    part = ROWS
    consumers = 128
    tokens, heads, groups = T.dynamic("tokens"), T.dynamic("heads"), T.dynamic("groups")
    slots, documents, kept, starts, ends = (T.dynamic(x) for x in ("slots", "documents", "kept", "starts", "ends"))
    q_token, q_head = T.dynamic("q_token"), T.dynamic("q_head")
    k_token, k_head = T.dynamic("k_token"), T.dynamic("k_head")
    v_token, v_head = T.dynamic("v_token"), T.dynamic("v_head")
    written = T.dynamic("written")

    @T.prim_func
    def forward(
        q: T.StridedTensor((tokens, groups, K), (q_token, q_head, 1), dtype),
        k: T.StridedTensor((tokens, groups, K), (k_token, k_head, 1), dtype),
        v: T.StridedTensor((tokens, heads, V), (v_token, v_head, 1), dtype),
        N: T.Tensor((slots, heads, C, C), dtype),
        P: T.Tensor((slots, heads, C, C), dtype),
        gates: T.Tensor((slots, heads, 2, C), "float32"),
        norms: T.Tensor((slots, groups, 2, C), "float32"),
        cu_seqlens: T.Tensor((documents + 1,), "int32"),
        initial_state: T.Tensor((starts, heads, K, V), "float32"),
        o: T.Tensor((tokens, heads, V), dtype),
        W: T.Tensor((written, heads, V), dtype),
        states: T.Tensor((kept, heads, V, K), dtype),
        final_state: T.Tensor((ends, heads, K, V), "float32"),
        scale: T.float32,
        ratio: T.int32,
    ):
        with T.Kernel(T.ceildiv(V, part), heads, documents, threads=consumers + 128) as (p, head, document):
            q_s = T.alloc_shared((C, K), dtype)
            k_s = T.alloc_shared((STAGES, C, K), dtype)
            v_s = T.alloc_shared((C, part), dtype)
            N_s = T.alloc_shared((STAGES, C, C), dtype)
            P_s = T.alloc_shared((C, C), dtype)
            vec = T.alloc_shared((STAGES, VECTORS, C), "float32")
            o_s = T.alloc_shared((C, part), dtype)
            W_s = T.alloc_shared((C, part), dtype)
            S = T.alloc_fragment((part, K), "float32")
            S_r = T.alloc_fragment((part, K), dtype)
            X = T.alloc_fragment((part, C), "float32")
            O = T.alloc_fragment((part, C), "float32")
            left = T.alloc_fragment((part, C), dtype)
            v_f = T.alloc_fragment((C, part), dtype)
            out_f = T.alloc_fragment((C, part), dtype)
            full = T.alloc_barrier([96] * STAGES)
            empty = T.alloc_barrier([consumers] * STAGES)
            q_full, q_empty = T.alloc_barrier([32]), T.alloc_barrier([consumers])
            P_full, P_empty = T.alloc_barrier([32]), T.alloc_barrier([consumers])
            T.annotate_min_blocks_per_sm(2)
            T.annotate_layout(
                {
                    v_f: transposed_accumulator(part),
                    out_f: transposed_accumulator(part),
                    v_s: make_full_bank_swizzled_layout(v_s),
                    o_s: make_full_bank_swizzled_layout(o_s),
                    W_s: make_full_bank_swizzled_layout(W_s),
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
            columns = p * part

            if thread < consumers:
                T.set_max_nreg(216, 1)
                if starts > 0:
                    for i, j in T.Parallel(part, K):
                        S[i, j] = initial_state[document, head, j, columns + i]
                else:
                    T.clear(S)
                for c in T.serial(T.ceildiv(length, C)):
                    T.copy(S, S_r)
                    if keep:
                        if c % (STATE_STRIDE // C) == 0:
                            T.copy(
                                S_r,
                                states[
                                    start // STATE_STRIDE + document + c // (STATE_STRIDE // C),
                                    head,
                                    columns : columns + part,
                                    :,
                                ],
                            )
                    T.barrier_wait(full[c % STAGES], c // STAGES % 2)
                    T.gemm(S_r, k_s[c % STAGES, :, :], X, transpose_B=True, clear_accum=True)
                    T.barrier_wait(q_full[0], c % 2)
                    T.gemm(S_r, q_s, O, transpose_B=True, clear_accum=True)
                    T.copy(v_s, v_f)
                    T.fence_proxy_async()  # v has been read when its place is given back: see common
                    T.barrier_arrive(q_empty[0])
                    for i, j in T.Parallel(part, C):
                        X[i, j] = T.cast(v_f[j, i], "float32") - vec[c % STAGES, GAMMA_KAPPA, j] * X[i, j]
                    for i, j in T.Parallel(part, C):
                        left[i, j] = vec[c % STAGES, BETA, j] * X[i, j]
                    T.gemm(left, N_s[c % STAGES, :, :], X, transpose_B=True)
                    for i, j in T.Parallel(part, C):
                        O[i, j] *= vec[c % STAGES, OUTPUT, j]
                    for i, j in T.Parallel(part, C):
                        left[i, j] = vec[c % STAGES, BETA, j] * X[i, j]
                    T.barrier_wait(P_full[0], c % 2)
                    T.gemm(left, P_s, O, transpose_B=True)
                    T.barrier_arrive(P_empty[0])
                    for i, j in T.Parallel(part, C):
                        out_f[j, i] = X[i, j] * vec[c % STAGES, BETA_BAR, j]
                    for i, j in T.Parallel(part, C):
                        left[i, j] = vec[c % STAGES, INTO_STATE, j] * T.cast(out_f[j, i], "float32")
                    gamma = T.alloc_var("float32")
                    gamma = vec[c % STAGES, GAMMA, C - 1]
                    for i, j in T.Parallel(part, K):
                        S[i, j] *= gamma
                    T.gemm(left, k_s[c % STAGES, :, :], S)
                    T.barrier_arrive(empty[c % STAGES])
                    T.tma_store_wait(0)
                    T.sync_threads(1, consumers)
                    if keep:
                        T.copy(out_f, W_s)
                    for i, j in T.Parallel(part, C):
                        out_f[j, i] = O[i, j]
                    T.copy(out_f, o_s)
                    T.fence_proxy_async()
                    T.sync_threads(1, consumers)
                    first = start + c * C
                    if c * C + C <= length:
                        T.tma_copy(o_s, o[first : first + C, head, columns : columns + part])
                        if keep:
                            T.tma_copy(W_s, W[first : first + C, head, columns : columns + part])
                    else:
                        for i, j in T.Parallel(C, part):
                            if c * C + i < length and columns + j < V:
                                o[first + i, head, columns + j] = o_s[i, j]
                        if keep:
                            for i, j in T.Parallel(C, part):
                                if c * C + i < length and columns + j < V:
                                    W[first + i, head, columns + j] = W_s[i, j]
                if ends > 0:
                    for i, j in T.Parallel(part, K):
                        final_state[document, head, j, columns + i] = S[i, j]
                T.tma_store_wait(0)
            else:
                T.set_max_nreg(40, 0)
                if thread < consumers + 32:
                    for c in T.serial(T.ceildiv(length, C)):
                        T.barrier_wait(empty[c % STAGES], (c // STAGES + 1) % 2)
                        first = start + c * C
                        left_rows = length - c * C
                        if left_rows >= C:
                            T.tma_copy(k[first : first + C, group, :], k_s[c % STAGES, :, :], barrier=full[c % STAGES])
                        else:
                            load_tail(k_s, c % STAGES, k, first, group, 0, left_rows, K)
                            T.fence_proxy_async()
                        T.tma_copy(N[slot + c, head, :, :], N_s[c % STAGES, :, :], barrier=full[c % STAGES])
                        T.barrier_arrive(full[c % STAGES])
                        T.barrier_wait(q_empty[0], (c + 1) % 2)
                        if left_rows >= C:
                            T.tma_copy(q[first : first + C, group, :], q_s, barrier=q_full[0])
                            T.tma_copy(v[first : first + C, head, columns : columns + part], v_s, barrier=q_full[0])
                        else:
                            load_tail_of(q_s, q, first, group, 0, left_rows, K)
                            load_tail_of(v_s, v, first, head, columns, left_rows, part)
                            T.fence_proxy_async()
                        T.barrier_arrive(q_full[0])
                        T.barrier_wait(P_empty[0], (c + 1) % 2)
                        T.tma_copy(P[slot + c, head, :, :], P_s, barrier=P_full[0])
                        T.barrier_arrive(P_full[0])
                elif thread < consumers + 96:
                    i = thread - consumers - 32
                    for c in T.serial(T.ceildiv(length, C)):
                        T.barrier_wait(empty[c % STAGES], (c // STAGES + 1) % 2)
                        total = gates[slot + c, head, 0, i]
                        beta = gates[slot + c, head, 1, i]
                        chi = norms[slot + c, group, 0, i]
                        kappa = norms[slot + c, group, 1, i]
                        gamma_i = T.exp2(total * LOG2E)
                        bar = T.max(beta, BETA_MIN[dtype])
                        vec[c % STAGES, GAMMA_KAPPA, i] = gamma_i * kappa
                        vec[c % STAGES, GAMMA, i] = gamma_i
                        vec[c % STAGES, BETA, i] = beta
                        vec[c % STAGES, BETA_BAR, i] = bar
                        vec[c % STAGES, OUTPUT, i] = scale * gamma_i * chi
                        vec[c % STAGES, INTO_STATE, i] = (
                            T.exp2((gates[slot + c, head, 0, C - 1] - total) * LOG2E) * kappa * beta / bar
                        )
                        T.barrier_arrive(full[c % STAGES])

    return forward
