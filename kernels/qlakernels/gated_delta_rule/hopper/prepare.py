"""P: what the scans need of each chunk, all chunks at once.

For a chunk of C tokens and one value head, with G = cumsum(g), Γ_ij = exp(G_i − G_j) (i ≥ j), and χ, κ the reciprocal
lengths of q and k (1 without L2 normalisation):

    L_ij = κ_i κ_j Γ_ij k_i·k_j   (i > j)          P_ij = scale χ_i κ_j Γ_ij q_i·k_j   (i ≥ j)
    N = −L (I + diag(β) L)⁻¹                        so that (I + L diag(β))⁻¹ = I + N diag(β)

N is strictly lower triangular and regular at β = 0. The 16×16 blocks on its diagonal are solved row by row in float32,
a thread a column. Then, for blocks of 32 and of 64, with L' the part of L between the halves of a block:

    Y = L' + N diag(β) L'          N ← N − Y − Y diag(β) N

which are whole 64×64 products whose other blocks are zero: N₂₁ = −(I + N₂₂ β₂) L₂₁ (I + β₁ N₁₁). Their operands are
rounded to float16: entries of N stay within 1 for unit keys and β ≤ 2, and bfloat16 would double the error where keys
repeat.

One block of 128 threads a chunk and value head.
"""

import tilelang.language as T

from qlakernels.gated_delta_rule.hopper.common import CHUNK, L2_EPS, LOG2E, find_document

BLOCK = 16


def prepare_kernel(key_dim, dtype, l2norm, gate, sigmoid, raw_dtype, beta_dtype):
    C = CHUNK
    tokens, heads, groups = T.dynamic("tokens"), T.dynamic("heads"), T.dynamic("groups")
    slots, documents = T.dynamic("slots"), T.dynamic("documents")
    q_token, q_head = T.dynamic("q_token"), T.dynamic("q_head")
    k_token, k_head = T.dynamic("k_token"), T.dynamic("k_head")
    g_token, b_token = T.dynamic("g_token"), T.dynamic("b_token")

    @T.prim_func
    def prepare(
        q: T.StridedTensor((tokens, groups, key_dim), (q_token, q_head, 1), dtype),
        k: T.StridedTensor((tokens, groups, key_dim), (k_token, k_head, 1), dtype),
        g: T.StridedTensor((tokens, heads), (g_token, 1), raw_dtype),
        beta: T.StridedTensor((tokens, heads), (b_token, 1), beta_dtype),
        A_log: T.Tensor((heads,), "float32"),
        dt_bias: T.Tensor((heads,), "float32"),
        cu_seqlens: T.Tensor((documents + 1,), "int32"),
        N: T.Tensor((slots, heads, C, C), dtype),
        P: T.Tensor((slots, heads, C, C), dtype),
        gates: T.Tensor((slots, heads, 2, C), "float32"),
        norms: T.Tensor((slots, groups, 2, C), "float32"),
        scale: T.float32,
        beta_factor: T.float32,
        steps: T.int32,
        ratio: T.int32,
    ):
        with T.Kernel(heads, slots, threads=128) as (head, slot):
            T.annotate_min_blocks_per_sm(5)
            thread = T.get_thread_binding()
            q_s = T.alloc_shared((C, key_dim), dtype)
            k_s = T.alloc_shared((C, key_dim), dtype)
            L16_s = T.alloc_shared((C, C), "float16")  # between the halves of blocks of 32
            L32_s = T.alloc_shared((C, C), "float16")  # between the halves of the block of 64
            N_s = T.alloc_shared((C, C), "float16")
            block_s = T.alloc_shared((C, BLOCK + 1), "float32")  # the blocks on the diagonal of L, then of N
            block_rows_s = T.alloc_shared((C, BLOCK), "float32")  # of L; rows begin at 64 bytes, to be read in fours
            P_s = T.alloc_shared((C, C), dtype)
            out_s = T.alloc_shared((C, C), dtype)
            loaded = T.alloc_barrier([32])
            g_s = T.alloc_shared((C,), "float32")
            sum_s = T.alloc_shared((C,), "float32")
            log2_s = T.alloc_shared((C,), "float32")
            beta_s = T.alloc_shared((C,), "float32")
            kappa_s = T.alloc_shared((C,), "float32")
            chi_s = T.alloc_shared((C,), "float32")
            kk = T.alloc_fragment((C, C), "float32")
            n = T.alloc_fragment((C, C), "float32")
            left = T.alloc_fragment((C, C), "float16")
            Y = T.alloc_fragment((C, C), "float32")
            column = T.alloc_local((BLOCK,), "float32")

            group = T.alloc_var("int32")
            group = head // ratio
            place = T.alloc_local((3,), "int32")
            find_document(cu_seqlens, documents, slot, steps, C, place)
            document = T.alloc_var("int32")
            document = place[0]
            first = T.alloc_var("int32")
            size = T.alloc_var("int32")
            first = cu_seqlens[document] + (slot - cu_seqlens[document] // C - document) * C
            size = cu_seqlens[document + 1] - first
            if size > 0:
                if size >= C:
                    if thread < 32:
                        T.tma_copy(k[first : first + C, group, :], k_s, barrier=loaded[0])
                        T.tma_copy(q[first : first + C, group, :], q_s, barrier=loaded[0])
                        T.barrier_arrive(loaded[0])
                else:
                    for i, d in T.Parallel(C, key_dim):
                        q_s[i, d] = T.if_then_else(i < size, q[first + i, group, d], 0)
                    for i, d in T.Parallel(C, key_dim):
                        k_s[i, d] = T.if_then_else(i < size, k[first + i, group, d], 0)
                    T.fence_proxy_async()
                for i in T.Parallel(C):
                    x = T.if_then_else(i < size, T.cast(g[first + i, head], "float32"), 0.0)
                    if gate:
                        y = x + dt_bias[head]
                        # softplus, without overflow and without loss where it is small
                        soft = T.max(y, 0.0) + T.log1p(T.exp(-T.abs(y)))
                        g_s[i] = T.if_then_else(i < size, -T.exp(A_log[head]) * soft, 0.0)
                    else:
                        g_s[i] = x
                for i in T.Parallel(C):
                    x = T.if_then_else(i < size, T.cast(beta[first + i, head], "float32"), 0.0)
                    if sigmoid:
                        beta_s[i] = T.if_then_else(i < size, beta_factor / (1.0 + T.exp(-x)), 0.0)
                    else:
                        beta_s[i] = x
                T.cumsum(g_s, sum_s, dim=0)
                for i in T.Parallel(C):
                    log2_s[i] = sum_s[i] * LOG2E
                if size >= C:
                    T.barrier_wait(loaded[0], 0)
                T.gemm(k_s, k_s, kk, transpose_B=True, clear_accum=True)
                if l2norm:
                    T.gemm(q_s, q_s, Y, transpose_B=True, clear_accum=True)
                    for i, j in T.Parallel(C, C):
                        if i == j:
                            kappa_s[i] = T.if_then_else(i < size, T.rsqrt(kk[i, j] + L2_EPS), 0.0)
                    for i, j in T.Parallel(C, C):
                        if i == j:
                            chi_s[i] = T.if_then_else(i < size, T.rsqrt(Y[i, j] + L2_EPS), 0.0)
                else:
                    for i in T.Parallel(C):
                        kappa_s[i] = T.if_then_else(i < size, 1.0, 0.0)
                    for i in T.Parallel(C):
                        chi_s[i] = T.if_then_else(i < size, 1.0, 0.0)
                T.gemm(q_s, k_s, Y, transpose_B=True, clear_accum=True)
                for i, j in T.Parallel(C, C):
                    Y[i, j] *= T.if_then_else(i >= j, T.exp2(log2_s[i] - log2_s[j]), 0.0) * (
                        (scale * chi_s[i]) * kappa_s[j]
                    )
                T.copy(Y, P_s)
                for i, j in T.Parallel(C, C):
                    kk[i, j] *= T.if_then_else(i > j, T.exp2(log2_s[i] - log2_s[j]), 0.0) * (kappa_s[i] * kappa_s[j])
                for i, j in T.Parallel(C, C):
                    left[i, j] = T.if_then_else(i // 32 == j // 32 and i // 16 != j // 16, kk[i, j], 0.0)
                T.copy(left, L16_s)
                for i, j in T.Parallel(C, C):
                    left[i, j] = T.if_then_else(i // 32 != j // 32, kk[i, j], 0.0)
                T.copy(left, L32_s)
                for i, j in T.Parallel(C, C):
                    if i // BLOCK == j // BLOCK:
                        block_s[i, j % BLOCK] = kk[i, j]
                        block_rows_s[i, j % BLOCK] = kk[i, j]
                T.sync_threads()
                if thread < 32:
                    T.fence_proxy_async()
                    T.tma_copy(P_s, P[slot, head, :, :])
                if thread < C:  # one thread a column of a block on the diagonal
                    top = thread // BLOCK * BLOCK
                    for i in T.unroll(BLOCK):
                        entry = T.alloc_var("float32")
                        entry = block_s[top + i, thread % BLOCK]
                        for m in T.unroll(i):
                            entry += block_rows_s[top + i, m] * column[m]
                        block_s[top + i, thread % BLOCK] = -entry
                        column[i] = -entry * beta_s[top + i]
                if thread >= C:  # meanwhile the others write what is known
                    t = thread - C
                    gates[slot, head, 0, t] = sum_s[t]
                    gates[slot, head, 1, t] = beta_s[t]
                    if head % ratio == 0:
                        norms[slot, group, 0, t] = chi_s[t]
                        norms[slot, group, 1, t] = kappa_s[t]
                if thread < 32:
                    T.tma_store_wait(0)  # the memory of P_s is used again
                T.sync_threads()
                for i, j in T.Parallel(C, C):
                    n[i, j] = T.if_then_else(i // BLOCK == j // BLOCK, block_s[i, j % BLOCK], 0.0)
                T.copy(n, N_s)
                T.copy(L16_s, left)
                T.copy(left, Y)
                for i, j in T.Parallel(C, C):
                    left[i, j] = n[i, j] * beta_s[j]
                T.gemm(left, L16_s, Y)
                for i, j in T.Parallel(C, C):
                    left[i, j] = -Y[i, j] * beta_s[j]
                for i, j in T.Parallel(C, C):
                    n[i, j] -= Y[i, j]
                T.gemm(left, N_s, n)
                T.copy(n, N_s)
                T.copy(L32_s, left)
                T.copy(left, Y)
                for i, j in T.Parallel(C, C):
                    left[i, j] = n[i, j] * beta_s[j]
                T.gemm(left, L32_s, Y)
                for i, j in T.Parallel(C, C):
                    left[i, j] = -Y[i, j] * beta_s[j]
                for i, j in T.Parallel(C, C):
                    n[i, j] -= Y[i, j]
                T.gemm(left, N_s, n)
                T.copy(n, out_s)
                T.copy(out_s, N[slot, head, :, :])
                T.tma_store_wait(0)

    return prepare
