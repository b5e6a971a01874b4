"""E: the state at the start of every chunk, from the states that the forward kept and from W.

    S ← γ_C S + Kᵀ (ρκβ/β̄ ∘ W)        symbols as in `forward`, whose rounding this repeats

Linear in S, so nothing is solved: one product a chunk. One block of 128 threads for 256 tokens and 64 rows of V of one
value head; all blocks are independent.
"""

import tilelang.language as T
from tilelang.layout import make_full_bank_swizzled_layout

from qlakernels.gated_delta_rule.hopper.common import (
    BETA_MIN,
    CHUNK,
    LOG2E,
    STATE_STRIDE,
    find_document,
    transposed_accumulator,
)


def expand_kernel(key_dim, value_dim, dtype):
    C = CHUNK
    K, V = key_dim, value_dim
    rows = 64
    tokens, heads, groups = T.dynamic("tokens"), T.dynamic("heads"), T.dynamic("groups")
    slots, documents, kept = (T.dynamic(x) for x in ("slots", "documents", "kept"))
    k_token, k_head = T.dynamic("k_token"), T.dynamic("k_head")

    @T.prim_func
    def expand(
        k: T.StridedTensor((tokens, groups, K), (k_token, k_head, 1), dtype),
        W: T.Tensor((tokens, heads, V), dtype),
        gates: T.Tensor((slots, heads, 2, C), "float32"),
        norms: T.Tensor((slots, groups, 2, C), "float32"),
        cu_seqlens: T.Tensor((documents + 1,), "int32"),
        states: T.Tensor((kept, heads, V, K), dtype),
        every: T.Tensor((slots, heads, V, K), dtype),
        steps: T.int32,
        ratio: T.int32,
    ):
        with T.Kernel(T.ceildiv(V, rows), heads, kept, threads=128) as (p, head, slot):
            k_s = T.alloc_shared((C, K), dtype)
            W_s = T.alloc_shared((C, rows), dtype)
            vec = T.alloc_shared((C,), "float32")
            S = T.alloc_fragment((rows, K), "float32")
            S_s = T.alloc_shared((rows, K), dtype)
            loaded, begun = T.alloc_barrier([32]), T.alloc_barrier([32])
            thread = T.get_thread_binding()
            W_f = T.alloc_fragment((C, rows), dtype)
            left = T.alloc_fragment((rows, C), dtype)
            T.annotate_layout({W_f: transposed_accumulator(rows), W_s: make_full_bank_swizzled_layout(W_s)})
            group = T.alloc_var("int32")
            group = head // ratio
            place = T.alloc_local((3,), "int32")
            find_document(cu_seqlens, documents, slot, steps, STATE_STRIDE, place)
            document = T.alloc_var("int32")
            document = place[0]
            start = T.alloc_var("int32")
            length = T.alloc_var("int32")
            chunk = T.alloc_var("int32")
            start = cu_seqlens[document]
            length = cu_seqlens[document + 1] - start
            chunk = (slot - start // STATE_STRIDE - document) * (STATE_STRIDE // C)
            base = T.alloc_var("int32")
            base = start // C + document
            columns = p * rows
            if chunk * C < length:
                if thread < 32:
                    T.tma_copy(states[slot, head, columns : columns + rows, :], S_s, barrier=begun[0])
                    T.barrier_arrive(begun[0])
                T.barrier_wait(begun[0], 0)
                T.copy(S_s, S)
                T.copy(S_s, every[base + chunk, head, columns : columns + rows, :])
                for step in T.serial(STATE_STRIDE // C - 1):
                    c = chunk + step
                    if (c + 1) * C < length:  # so chunk c is whole
                        first = start + c * C
                        if thread < 32:
                            T.tma_copy(W[first : first + C, head, columns : columns + rows], W_s, barrier=loaded[0])
                            T.tma_copy(k[first : first + C, group, :], k_s, barrier=loaded[0])
                            T.barrier_arrive(loaded[0])
                        for i in T.Parallel(C):
                            beta = gates[base + c, head, 1, i]
                            vec[i] = (
                                T.exp2((gates[base + c, head, 0, C - 1] - gates[base + c, head, 0, i]) * LOG2E)
                                * norms[base + c, group, 1, i]
                                * beta
                                / T.max(beta, BETA_MIN[dtype])
                            )
                        gamma = T.alloc_var("float32")
                        gamma = T.exp2(gates[base + c, head, 0, C - 1] * LOG2E)
                        T.barrier_wait(loaded[0], step % 2)
                        T.copy(W_s, W_f)
                        for i, j in T.Parallel(rows, C):
                            left[i, j] = T.cast(W_f[j, i], "float32") * vec[j]
                        for i, j in T.Parallel(rows, K):
                            S[i, j] *= gamma
                        T.gemm(left, k_s, S)
                        T.copy(S, S_s)
                        T.copy(S_s, every[base + c + 1, head, columns : columns + rows, :])

    return expand
