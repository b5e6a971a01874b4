"""P: what the scans need of each chunk, all chunks at once.

For a chunk of C tokens and one value head, with G = cumsum(g), Γ_ij = exp(G_i − G_j) (i ≥ j), and χ, κ the reciprocal
lengths of q and k (1 without L2 normalisation):

    L_ij = κ_i κ_j Γ_ij k_i·k_j   (i > j)          P_ij = scale χ_i κ_j Γ_ij q_i·k_j   (i ≥ j)
    N = −L (I + diag(β) L)⁻¹                        so that (I + L diag(β))⁻¹ = I + N diag(β)

N is strictly lower triangular and regular at β = 0. It is solved in float32 on the CUDA cores: 16×16 diagonal blocks
row by row, then pairs of blocks by N₂₁ = −(L₂₁ + N₂₂ β₂ L₂₁)(I + β₁ N₁₁), at 16 and at 32 rows.

One block of 128 threads a chunk and key head; the value heads of its group share k·k and q·k.
"""

import tilelang.language as T

from qlakernels.gated_delta_rule.hopper.common import CHUNK, L2_EPS, LOG2E, find_document

PAD = 4  # floats behind each row of the matrices that are solved: rows then begin in different banks


@T.macro
def solve(l, n, beta, thread):
    """n ← −l (I + diag(beta) l)⁻¹ in shared memory, [CHUNK, CHUNK + PAD] float32, by 128 threads."""
    column = T.alloc_local((16,), "float32")
    if thread < 64:  # one thread a column of each 16×16 block on the diagonal
        first = thread // 16 * 16
        j = thread % 16
        for i in T.unroll(16):
            column[i] = T.if_then_else(i > j, l[first + i, first + j], 0.0)
            for m in T.unroll(i):
                column[i] += l[first + i, first + m] * beta[first + m] * column[m]
            column[i] = -column[i]
            n[first + i, first + j] = column[i]
    T.sync_threads()


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
        with T.Kernel(slots, groups, threads=128) as (slot, group):
            thread = T.get_thread_binding()
            q_s = T.alloc_shared((C, key_dim), dtype)
            k_s = T.alloc_shared((C, key_dim), dtype)
            l_s = T.alloc_shared((C, C + PAD), "float32")
            n_s = T.alloc_shared((C, C + PAD), "float32")
            g_s = T.alloc_shared((C,), "float32")
            sum_s = T.alloc_shared((C,), "float32")
            beta_s = T.alloc_shared((C,), "float32")
            kappa_s = T.alloc_shared((C,), "float32")
            chi_s = T.alloc_shared((C,), "float32")
            kk = T.alloc_fragment((C, C), "float32")
            qk = T.alloc_fragment((C, C), "float32")
            decay = T.alloc_fragment((C, C), "float32")
            rows = T.alloc_fragment((C, key_dim), "float32")
            lengths = T.alloc_fragment((C,), "float32")
            half = T.alloc_fragment((2, 16, 16), "float32")
            whole = T.alloc_fragment((32, 32), "float32")

            place = T.alloc_local((3,), "int32")
            find_document(cu_seqlens, documents, slot, steps, C, place)
            document = T.alloc_var("int32")
            document = place[0]
            first = T.alloc_var("int32")
            size = T.alloc_var("int32")
            first = cu_seqlens[document] + (slot - cu_seqlens[document] // C - document) * C
            size = cu_seqlens[document + 1] - first
            if size > 0:
                for i, d in T.Parallel(C, key_dim):
                    q_s[i, d] = T.if_then_else(i < size, q[first + i, group, d], 0)
                for i, d in T.Parallel(C, key_dim):
                    k_s[i, d] = T.if_then_else(i < size, k[first + i, group, d], 0)
                for tile, factor in ((q_s, chi_s), (k_s, kappa_s)):
                    if l2norm:
                        T.copy(tile, rows)
                        for i, d in T.Parallel(C, key_dim):
                            rows[i, d] *= rows[i, d]
                        T.reduce_sum(rows, lengths, dim=1)
                        for i in T.Parallel(C):
                            factor[i] = T.if_then_else(i < size, T.rsqrt(lengths[i] + L2_EPS), 0.0)
                    else:
                        for i in T.Parallel(C):
                            factor[i] = T.if_then_else(i < size, 1.0, 0.0)
                for i in T.Parallel(C):
                    norms[slot, group, 0, i] = chi_s[i]
                for i in T.Parallel(C):
                    norms[slot, group, 1, i] = kappa_s[i]
                T.gemm(k_s, k_s, kk, transpose_B=True, clear_accum=True)
                T.gemm(q_s, k_s, qk, transpose_B=True, clear_accum=True)
                for i, j in T.Parallel(C, C):
                    kk[i, j] *= kappa_s[i] * kappa_s[j]
                for i, j in T.Parallel(C, C):
                    qk[i, j] *= scale * chi_s[i] * kappa_s[j]

                for member in T.serial(ratio):
                    head = group * ratio + member
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
                        gates[slot, head, 0, i] = sum_s[i]
                    for i in T.Parallel(C):
                        gates[slot, head, 1, i] = beta_s[i]
                    for i, j in T.Parallel(C, C):
                        decay[i, j] = T.if_then_else(i >= j, T.exp2((sum_s[i] - sum_s[j]) * LOG2E), 0.0)
                    for i, j in T.Parallel(C, C):
                        P[slot, head, i, j] = decay[i, j] * qk[i, j]
                    for i, j in T.Parallel(C, C):
                        l_s[i, j] = T.if_then_else(i > j, decay[i, j] * kk[i, j], 0.0)
                    T.clear(n_s)
                    solve(l_s, n_s, beta_s, thread)
                    # blocks of 16: rows 16 to 31 and 48 to 63
                    T.clear(half)
                    for m in T.serial(16):
                        for p, i, j in T.Parallel(2, 16, 16):
                            half[p, i, j] += (
                                n_s[p * 32 + 16 + i, p * 32 + 16 + m]
                                * beta_s[p * 32 + 16 + m]
                                * l_s[p * 32 + 16 + m, p * 32 + j]
                            )
                    for p, i, j in T.Parallel(2, 16, 16):
                        half[p, i, j] += l_s[p * 32 + 16 + i, p * 32 + j]
                    for p, i, j in T.Parallel(2, 16, 16):
                        n_s[p * 32 + i, p * 32 + 16 + j] = half[p, i, j]
                    for m in T.serial(16):
                        for p, i, j in T.Parallel(2, 16, 16):
                            half[p, i, j] += (
                                n_s[p * 32 + i, p * 32 + 16 + m] * beta_s[p * 32 + m] * n_s[p * 32 + m, p * 32 + j]
                            )
                    for p, i, j in T.Parallel(2, 16, 16):
                        n_s[p * 32 + 16 + i, p * 32 + j] = -half[p, i, j]
                    for p, i, j in T.Parallel(2, 16, 16):
                        n_s[p * 32 + i, p * 32 + 16 + j] = 0.0
                    # blocks of 32
                    T.clear(whole)
                    for m in T.serial(32):
                        for i, j in T.Parallel(32, 32):
                            whole[i, j] += n_s[32 + i, 32 + m] * beta_s[32 + m] * l_s[32 + m, j]
                    for i, j in T.Parallel(32, 32):
                        whole[i, j] += l_s[32 + i, j]
                    for i, j in T.Parallel(32, 32):
                        n_s[i, 32 + j] = whole[i, j]
                    for m in T.serial(32):
                        for i, j in T.Parallel(32, 32):
                            whole[i, j] += n_s[i, 32 + m] * beta_s[m] * n_s[m, j]
                    for i, j in T.Parallel(32, 32):
                        n_s[32 + i, j] = -whole[i, j]
                    for i, j in T.Parallel(32, 32):
                        n_s[i, 32 + j] = 0.0
                    for i, j in T.Parallel(C, C):
                        N[slot, head, i, j] = n_s[i, j]

    return prepare
