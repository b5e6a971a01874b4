"""P: what the scans of segments (`segments`) need of each chunk that they look at, all of these at once.

Vectors, N, and for the reverse scan P, of `chunk`. LANES blocks share the chunks of a section's head that are wanted
(`reach`). The first warpgroup makes N and the vectors of the keys. Of the second, one warp brings k and q and one makes
the gates; for the reverse scan two make the vectors of the queries, and all of them P.
Shared memory (K = 128): q and k 32, N and P 16, the solve 24, vectors 3: 75 KB; 51 KB without q and P.
"""

import tilelang.language as T

from qlakernels.gated_delta_rule.hopper.chunk import (
    BLOCKS_OF_8,
    clear_solve,
    cut,
    load_gates,
    make_gates,
    make_N,
    make_query_vectors,
    weigh_P,
)
from qlakernels.gated_delta_rule.hopper.common import (
    BASE,
    FIRST,
    LENGTH,
    PRELUDE,
    arrive,
    bring,
    folds_decay,
    release_tiles,
    state_layout,
    take_segment,
    wait,
)
from qlakernels.gated_delta_rule.hopper.sizes import CHUNK, VECTORS

BLOCKS = 3  # of a multiprocessor
LANES = 32  # blocks that share the chunks of a section


def prepare_kernel(key_dim, dtype, l2norm, gate, sigmoid, raw_dtype, beta_dtype, reverse):
    """`reverse`: for the reverse scan."""
    C, K = CHUNK, key_dim
    tokens, heads, groups = T.dynamic("tokens"), T.dynamic("heads"), T.dynamic("groups")
    slots, documents, cuts = T.dynamic("slots"), T.dynamic("documents"), T.dynamic("cuts")
    slots_of_P = T.dynamic("slots_of_P")  # none in the forward direction
    q_token, q_head = T.dynamic("q_token"), T.dynamic("q_head")
    k_token, k_head = T.dynamic("k_token"), T.dynamic("k_head")
    g_token, b_token = T.dynamic("g_token"), T.dynamic("b_token")

    @T.prim_func
    def prepare(
        q: T.StridedTensor((tokens, groups, K), (q_token, q_head, 1), dtype),
        k: T.StridedTensor((tokens, groups, K), (k_token, k_head, 1), dtype),
        g: T.StridedTensor((tokens, heads), (g_token, 1), raw_dtype),
        beta: T.StridedTensor((tokens, heads), (b_token, 1), beta_dtype),
        A_log: T.Tensor((heads,), "float32"),
        dt_bias: T.Tensor((heads,), "float32"),
        cu_seqlens: T.Tensor((documents + 1,), "int32"),
        reaches: T.Tensor((cuts, heads), "int32"),
        N: T.Tensor((slots, heads, C, C), dtype),
        P: T.Tensor((slots_of_P, heads, C, C), dtype),
        vectors: T.Tensor((slots, heads, VECTORS, C), "float32"),
        scale: T.float32,
        beta_factor: T.float32,
        ratio: T.int32,
        section: T.int32,
        steps: T.int32,
    ):
        with T.Kernel(LANES, heads, cuts, threads=256) as (lane, head, turn):
            T.import_source(PRELUDE)
            T.annotate_min_blocks_per_sm(BLOCKS)
            k_s = T.alloc_shared((1, C, K), dtype)
            N_s = T.alloc_shared((1, C, C), dtype)
            vec = T.alloc_shared((1, VECTORS, C), "float32")
            A_s = T.alloc_shared((1, C, C + 8), "float16")
            Mt_s = T.alloc_shared((1, C // 2, C // 2 + 8), "float16")
            block_s = T.alloc_shared((BLOCKS_OF_8 + 1, 8, 12), "float32")
            a, b, c_ = (T.alloc_local((8,), "float16") for _ in range(3))
            out, column = T.alloc_local((16,), "float32"), T.alloc_local((8,), "float32")
            diagonal = T.alloc_local((2,), "float32")
            a_, b_ = T.alloc_local((8,), dtype), T.alloc_local((8,), dtype)
            gate_x = T.alloc_local((3,), "float32")
            loaded_g, loaded_beta = T.alloc_local((2,), raw_dtype), T.alloc_local((2,), beta_dtype)
            if reverse:
                q_s = T.alloc_shared((1, C, K), dtype)
                P_s = T.alloc_shared((C, C), dtype)
                Pf = T.alloc_fragment((C, C), "float32")
            k_full, q_full = T.alloc_barrier([32]), T.alloc_barrier([32])
            gates_full, query_full, key_full = T.alloc_barrier([32]), T.alloc_barrier([64]), T.alloc_barrier([128])
            free = T.alloc_barrier([1])
            T.annotate_layout({k_s: state_layout(k_s)})
            thread = T.get_thread_binding()
            reached = T.alloc_var("int32")
            reached = reaches[turn, head]
            if lane < reached:
                place = T.alloc_local((7,), "int32")
                take_segment(cu_seqlens, documents, turn, section, steps, place)
                group = T.alloc_var("int32")
                group = head // ratio
                chunks = T.alloc_var("int32")
                chunks = T.ceildiv(place[LENGTH], C)
                first = T.alloc_var("int32")
                size = T.alloc_var("int32")
                slot = T.alloc_var("int32")
                for step in T.serial(T.ceildiv(T.min(reached, chunks) - lane, LANES)):
                    parity = step % 2
                    near = step * LANES + lane
                    c = near if reverse else chunks - 1 - near
                    first = place[FIRST] + c * C
                    size = place[LENGTH] - c * C
                    slot = place[BASE] + c
                    if thread < 128:
                        if step == 0:
                            clear_solve(thread, 128, N_s, 1, A_s, 1, block_s, 1, diagonal)
                        wait(k_full, 0, parity)
                        make_N(
                            thread, 0, 1, vec, 0, k_s, N_s, 0, A_s, 0, Mt_s, block_s, a_, b_, a, b, c_, out, column,
                            diagonal, gates_full, parity, key_full, free, 1, K, dtype, l2norm, reverse, None, 0, group,
                            False,
                        )  # fmt: skip
                        T.sync_threads(7, 128)
                        T.tma_copy(N_s[0, :, :], N[slot, head, :, :])
                        T.tma_store_wait(0)
                    else:
                        if thread < 160:
                            bring(k_s, 0, k, first, group, size, K, k_full)
                            if reverse:
                                bring(q_s, 0, q, first, group, size, K, q_full)
                        elif thread < 192:
                            rate = T.alloc_var("float32", init=0.0)
                            bias = T.alloc_var("float32", init=0.0)
                            if gate:
                                rate = -T.exp(A_log[head])
                                bias = dt_bias[head]
                            load_gates(loaded_g, loaded_beta, g, beta, first, size, head, thread % 32)
                            make_gates(
                                vec, 0, thread % 32, loaded_g, loaded_beta, gate_x, rate, bias, size, beta_factor, gate,
                                sigmoid, None, 0, head, False,
                            )  # fmt: skip
                            arrive(gates_full, 0)
                        elif reverse:
                            wait(q_full, 0, parity)
                            make_query_vectors(
                                vec, 0, thread - 192, q_s, 0, gates_full, parity, scale, a_, b_, out, K, dtype, l2norm,
                                False, None, 0, group, False,
                            )  # fmt: skip
                            arrive(query_full, 0)
                        wait(key_full, 0, parity)
                        if reverse:
                            wait(k_full, 0, parity)
                            wait(q_full, 0, parity)
                            T.gemm(q_s[0, :, :], k_s[0, :, :], Pf, transpose_B=True, clear_accum=True)
                            wait(query_full, 0, parity)
                            weigh_P(Pf, vec, 0, folds_decay(dtype))
                            cut(Pf, C * C // 128, False)
                            T.copy(Pf, P_s)
                            release_tiles()
                            T.sync_threads(6, 128)
                            T.tma_copy(P_s, P[slot, head, :, :])
                        for x in T.unroll(VECTORS * C // 128):
                            row = (x * 128 + thread - 128) // C
                            column_of = (thread - 128) % C
                            vectors[slot, head, row, column_of] = vec[0, row, column_of]
                        T.tma_store_wait(0)
                    release_tiles()
                    T.sync_threads()

    return prepare
