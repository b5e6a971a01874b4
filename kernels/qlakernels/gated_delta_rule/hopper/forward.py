"""F: the forward scan.

Per document and value head, over its chunks in order, with the state S [K, V] in float32 registers (γ = exp(G),
ρ = exp(G_C − G), and P, N, κ, χ, β from `chunk`):

    X = V − γκ ∘ (K S)                 E = X + N (β ∘ X)              the prediction errors, solved within the chunk
    W = round(β̄ ∘ E)                   O = scale γχ ∘ (Q S) + P (β ∘ E)
    S ← γ_C S + Kᵀ (ρκβ/β̄ ∘ W)         β̄ = max(β, BETA_MIN)

The backward keeps W instead of V. W is what enters the state, so a replay from W repeats the state's own rounding, and
with β̄ in place of β it also holds E where β is zero.

Everything is held transposed, [V, C] and [V, K], so that the state and what is made of it are left operands from
registers. A block takes `part` rows of V, 64 to each of its one or two consumer warpgroups, which need nothing of each
other. Its other warpgroups:

    auxiliary    makes N of the next chunk, and the vectors of its keys, while the consumers work on this one; beside
                 one consumer there are two, which take turns, as one of them takes longer than the consumer
    producer     one warp brings tiles (TMA), three make the other vectors

k and the vectors have three stages: one being loaded, one with the auxiliary, one with the consumers. q, N and P have
two. v has one, which is free again early in the chunk.

Registers of a consumer: S 64, its rounded copy 32, X 32, O 32, v 16: 184 of what two consumers leave, see REGISTERS.
Shared memory (K = V = 128): q and k 80, v 16, N and P 32, O and W 32, S 32, the solve 24, vectors 9: 225 KB. With one
consumer v, O, W and S are half of that, and the solve is 47.
"""

import tilelang.language as T
from tilelang.layout import make_full_bank_swizzled_layout

from qlakernels.gated_delta_rule.hopper.chunk import (
    AUXILIARIES,
    BAR,
    BLOCKS_OF_8,
    FAR,
    GAMMA,
    INTO_STATE,
    LOG2,
    OUTPUT,
    PLACES,
    Q_STAGES,
    RIGHT_P,
    ROW_P,
    STAGES,
    STATE_KAPPA,
    cut,
    serve_gates,
    serve_keys,
    serve_queries,
    weigh,
)
from qlakernels.gated_delta_rule.hopper.common import (
    CLOSES,
    FIRST,
    LENGTH,
    OPENS,
    PRELUDE,
    arrive,
    bring,
    folds_decay,
    load_tail,
    release_tiles,
    section_of,
    state_layout,
    take_turn,
    transposed_accumulator,
    wait,
)
from qlakernels.gated_delta_rule.hopper.sizes import CHUNK, STATE_STRIDE, VECTORS

# consumers → registers of a thread of theirs, of an auxiliary, of the producer
REGISTERS = {1: (216, 104, 88), 2: (192, 96, 32)}


def forward_kernel(key_dim, value_dim, dtype, part, l2norm, gate, sigmoid, raw_dtype, beta_dtype, keep):
    """`part`: rows of V a block takes, 64 or 128. `keep`: write W and the states that the backward needs."""
    C = CHUNK
    K, V = key_dim, value_dim
    warpgroups = part // 64
    consumers = 128 * warpgroups
    folded = folds_decay(dtype)
    rows_first = T.GemmWarpPolicy.FullRow
    columns_first = T.GemmWarpPolicy.FullCol
    auxiliaries = AUXILIARIES[part // 64]
    base = consumers + 128 * auxiliaries  # the producer's first thread
    threads = base + 128
    registers, auxiliary_registers, producer_registers = REGISTERS[warpgroups]
    tokens, heads, groups = T.dynamic("tokens"), T.dynamic("heads"), T.dynamic("groups")
    documents, starts, ends = (T.dynamic(x) for x in ("documents", "starts", "ends"))
    kept, firsts = T.dynamic("kept"), T.dynamic("firsts")
    q_token, q_head = T.dynamic("q_token"), T.dynamic("q_head")
    k_token, k_head = T.dynamic("k_token"), T.dynamic("k_head")
    v_token, v_head = T.dynamic("v_token"), T.dynamic("v_head")
    g_token, b_token = T.dynamic("g_token"), T.dynamic("b_token")
    written, cuts = T.dynamic("written"), T.dynamic("cuts")

    @T.prim_func
    def forward(
        q: T.StridedTensor((tokens, groups, K), (q_token, q_head, 1), dtype),
        k: T.StridedTensor((tokens, groups, K), (k_token, k_head, 1), dtype),
        v: T.StridedTensor((tokens, heads, V), (v_token, v_head, 1), dtype),
        g: T.StridedTensor((tokens, heads), (g_token, 1), raw_dtype),
        beta: T.StridedTensor((tokens, heads), (b_token, 1), beta_dtype),
        A_log: T.Tensor((heads,), "float32"),
        dt_bias: T.Tensor((heads,), "float32"),
        cu_seqlens: T.Tensor((documents + 1,), "int32"),
        order: T.Tensor((documents,), "int32"),
        initial_state: T.Tensor((starts, heads, K, V), "float32"),
        o: T.Tensor((tokens, heads, V), dtype),
        W: T.Tensor((written, heads, V), dtype),
        states: T.Tensor((kept, heads, V, K), dtype),
        first_states: T.Tensor((firsts, heads, V, K), dtype),
        final_state: T.Tensor((ends, heads, K, V), "float32"),
        section_states: T.Tensor((cuts, heads, V, K), "float32"),
        scale: T.float32,
        beta_factor: T.float32,
        ratio: T.int32,
        turns: T.int32,
        segment: T.int32,
        section: T.int32,
        steps: T.int32,
    ):
        with T.Kernel(T.ceildiv(V, part), heads, turns, threads=threads) as (p, head, turn):
            T.import_source(PRELUDE)
            q_s = T.alloc_shared((Q_STAGES, C, K), dtype)
            k_s = T.alloc_shared((STAGES, C, K), dtype)
            N_s = T.alloc_shared((PLACES, C, C), dtype)
            P_s = T.alloc_shared((PLACES, C, C), dtype)
            v_s = T.alloc_shared((C, part), dtype)
            o_s = T.alloc_shared((C, part), dtype)
            W_s = T.alloc_shared((C, part), dtype)
            S_s = T.alloc_shared((part, K), dtype)
            vec = T.alloc_shared((STAGES, VECTORS, C), "float32")
            A_s = T.alloc_shared((2 * auxiliaries, C, C + 8), "float16")
            Mt_s = T.alloc_shared((auxiliaries, C // 2, C // 2 + 8), "float16")
            block_s = T.alloc_shared((auxiliaries * BLOCKS_OF_8 + 1, 8, 12), "float32")

            S = T.alloc_fragment((part, K), "float32")
            S_r = T.alloc_fragment((part, K), dtype)
            X = T.alloc_fragment((part, C), "float32")
            O = T.alloc_fragment((part, C), "float32")
            left = T.alloc_fragment((part, C), dtype)
            into = T.alloc_fragment((part, C), dtype)
            v_f = T.alloc_fragment((C, part), dtype)
            W_f = T.alloc_fragment((C, part), dtype)
            o_f = T.alloc_fragment((C, part), dtype)
            Pf = T.alloc_fragment((C, C), "float32")
            a, b, c_ = (T.alloc_local((8,), "float16") for _ in range(3))
            out, column = T.alloc_local((16,), "float32"), T.alloc_local((8,), "float32")
            diagonal = T.alloc_local((2,), "float32")
            loaded_g, loaded_beta = T.alloc_local((2,), raw_dtype), T.alloc_local((2,), beta_dtype)
            g_now, beta_now = T.alloc_local((2,), raw_dtype), T.alloc_local((2,), beta_dtype)
            gate_x = T.alloc_local((3,), "float32")
            a_, b_ = T.alloc_local((8,), dtype), T.alloc_local((8,), dtype)

            k_full, k_empty = T.alloc_barrier([32] * STAGES), T.alloc_barrier([consumers] * STAGES)
            q_full, q_empty = T.alloc_barrier([32] * Q_STAGES), T.alloc_barrier([consumers] * Q_STAGES)
            v_full, v_empty = T.alloc_barrier([32]), T.alloc_barrier([consumers])
            gates_full, query_full = T.alloc_barrier([32] * STAGES), T.alloc_barrier([64] * STAGES)
            key_full = T.alloc_barrier([128] * STAGES)
            made_full = T.alloc_barrier([128] * PLACES)
            made_empty = T.alloc_barrier([consumers] * PLACES)
            P_full = T.alloc_barrier([consumers] * PLACES)
            T.annotate_layout(
                {f: transposed_accumulator(part) for f in (v_f, W_f, o_f)}
                | {x: make_full_bank_swizzled_layout(x) for x in (v_s, o_s, W_s)}
                | {S_s: state_layout(S_s)}
            )
            thread = T.get_thread_binding()
            place = T.alloc_local((7,), "int32")
            take_turn(cu_seqlens, order, documents, turn, cuts > 0, segment, steps, place)
            document = T.alloc_var("int32")
            document = place[0]
            group = T.alloc_var("int32")
            group = head // ratio
            start = T.alloc_var("int32")
            length = T.alloc_var("int32")
            start = place[FIRST]
            length = place[LENGTH]
            chunks = T.alloc_var("int32")
            chunks = T.ceildiv(length, C)
            closes = T.alloc_var("int32")
            closes = place[CLOSES]
            opens = T.alloc_var("int32")
            opens = place[OPENS]
            kept_slot = T.alloc_var("int32")  # of the state at the segment's start, which is kept unless it `opens`
            kept_slot = cu_seqlens[document] // STATE_STRIDE + (start - cu_seqlens[document]) // STATE_STRIDE - 1

            if thread < consumers:
                T.set_max_nreg(registers, 1)
                columns = p * part
                if cuts > 0:
                    entered = T.alloc_var("int32")
                    entered = T.min(section_of(cu_seqlens, document, start, section), cuts - 1)
                    for i, j in T.Parallel(part, K):
                        S[i, j] = T.if_then_else(columns + i < V, section_states[entered, head, columns + i, j], 0.0)
                elif starts > 0:
                    for i, j in T.Parallel(part, K):
                        S[i, j] = T.if_then_else(columns + i < V, initial_state[document, head, j, columns + i], 0.0)
                else:
                    T.clear(S)
                for c in T.serial(chunks):
                    stage = c % STAGES
                    T.copy(S, S_r)
                    if keep:
                        if c % (STATE_STRIDE // C) == 0:
                            T.copy(S_r, S_s)
                    wait(k_full, stage, c // STAGES % 2)
                    T.wgmma_gemm(S_r, k_s[stage, :, :], X, transpose_B=True, clear_accum=True, policy=rows_first)
                    wait(q_full, c % Q_STAGES, c // Q_STAGES % 2)
                    T.wgmma_gemm(S_r, q_s[c % Q_STAGES, :, :], O, transpose_B=True, clear_accum=True, policy=rows_first)
                    T.wait_wgmma(0)
                    T.warpgroup_fence_operand(X, num_regs=32)
                    T.warpgroup_fence_operand(O, num_regs=32)
                    wait(query_full, stage, c // STAGES % 2)
                    T.wgmma_gemm(
                        q_s[c % Q_STAGES, :, :],
                        k_s[stage, :, :],
                        Pf,
                        transpose_B=True,
                        clear_accum=True,
                        policy=columns_first,
                    )
                    wait(v_full, 0, c % 2)
                    T.copy(v_s, v_f)
                    wait(key_full, stage, c // STAGES % 2)
                    for i, j in T.Parallel(part, C):
                        X[i, j] = T.cast(v_f[j, i], "float32") - vec[stage, STATE_KAPPA, j] * X[i, j]
                    release_tiles()  # v has been read when its place is given back: see common
                    arrive(v_empty, 0)
                    wait(made_full, c % PLACES, c // PLACES % 2)
                    T.copy(X, left)
                    T.wgmma_gemm(left, N_s[c % PLACES, :, :], X, transpose_B=True, policy=rows_first)
                    T.wait_wgmma(1)
                    T.warpgroup_fence_operand(Pf, num_regs=C * C // consumers)
                    arrive(q_empty, c % Q_STAGES)
                    for i, j in T.Parallel(C, C):
                        Pf[i, j] *= vec[stage, ROW_P, i]
                    if not folded or vec[stage, LOG2, C - 1] <= -FAR:
                        weigh(Pf, vec, stage, LOG2, RIGHT_P)
                    cut(Pf, C * C // consumers, False)
                    T.copy(Pf, P_s[c % PLACES, :, :])
                    release_tiles()
                    arrive(P_full, c % PLACES)
                    for i, j in T.Parallel(part, C):
                        O[i, j] *= vec[stage, OUTPUT, j]
                    for i, j in T.Parallel(part, K):
                        S[i, j] *= vec[stage, GAMMA, C - 1]
                    T.wait_wgmma(0)
                    T.warpgroup_fence_operand(X, num_regs=32)
                    for i, j in T.Parallel(part, C):
                        W_f[j, i] = X[i, j] * vec[stage, BAR, j]
                    for i, j in T.Parallel(part, C):
                        left[i, j] = W_f[j, i]
                    wait(P_full, c % PLACES, c // PLACES % 2)
                    T.wgmma_gemm(left, P_s[c % PLACES, :, :], O, transpose_B=True, policy=rows_first)
                    if not folded:
                        for i, j in T.Parallel(part, C):
                            into[i, j] = T.cast(W_f[j, i], "float32") * vec[stage, INTO_STATE, j]
                    T.wgmma_gemm(left if folded else into, k_s[stage, :, :], S, policy=rows_first)
                    T.tma_store_wait(0)
                    T.sync_threads(1, consumers)  # the outputs of the chunk before have left o_s and W_s
                    if keep:
                        T.copy(W_f, W_s)
                    T.wait_wgmma(1)
                    T.warpgroup_fence_operand(O, num_regs=32)
                    arrive(made_empty, c % PLACES)
                    for i, j in T.Parallel(part, C):
                        o_f[j, i] = O[i, j]
                    T.copy(o_f, o_s)
                    release_tiles()
                    T.sync_threads(1, consumers)
                    if keep:
                        if c % (STATE_STRIDE // C) == 0:
                            if c > 0 or opens == 0:
                                T.tma_copy(
                                    S_s, states[kept_slot + c // (STATE_STRIDE // C), head, columns : columns + part, :]
                                )
                            elif starts > 0:
                                T.tma_copy(S_s, first_states[document, head, columns : columns + part, :])
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
                    T.wait_wgmma(0)
                    T.warpgroup_fence_operand(S, num_regs=K // 2)
                    arrive(k_empty, stage)
                if ends > 0 and closes > 0:
                    for i, j in T.Parallel(part, K):
                        if columns + i < V:
                            final_state[document, head, j, columns + i] = S[i, j]
                T.tma_store_wait(0)
            elif thread < base:
                T.set_max_nreg(auxiliary_registers, 0)
                serve_keys(
                    thread - consumers, auxiliaries, k_s, vec, N_s, A_s, Mt_s, block_s, a_, b_, a, b, c_, out, column,
                    diagonal, k_full, gates_full, key_full, made_full, made_empty, chunks, K, dtype, l2norm, False,
                    None, 0, group, False,
                )  # fmt: skip
            else:
                T.set_max_nreg(producer_registers, 0)
                if thread < base + 32:
                    for c in T.serial(chunks):
                        stage = c % STAGES
                        wait(k_empty, stage, (c // STAGES + 1) % 2)
                        first = start + c * C
                        left_rows = length - c * C
                        bring(k_s, stage, k, first, group, left_rows, K, k_full)
                        wait(q_empty, c % Q_STAGES, (c // Q_STAGES + 1) % 2)
                        bring(q_s, c % Q_STAGES, q, first, group, left_rows, K, q_full)
                        wait(v_empty, 0, (c + 1) % 2)
                        columns = p * part
                        if left_rows >= C:
                            T.tma_copy(v[first : first + C, head, columns : columns + part], v_s, barrier=v_full[0])
                        else:
                            load_tail(v_s, None, v, first, head, columns, left_rows, part)
                        arrive(v_full, 0)
                elif thread < base + 64:
                    if keep and closes > 0:  # the place that no state of this document takes, if there is one
                        end = start + length
                        used = cu_seqlens[document] // STATE_STRIDE + T.max(
                            T.ceildiv(end - cu_seqlens[document], STATE_STRIDE) - 1, 0
                        )
                        if used < end // STATE_STRIDE:
                            for block in T.serial(T.ceildiv(part * K, 32 * 8)):
                                row = (block * 32 + thread % 32) // (K // 8)
                                if row < part and p * part + row < V:
                                    for x in T.vectorized(8):
                                        states[
                                            used,
                                            head,
                                            p * part + row,
                                            (block * 32 + thread % 32) % (K // 8) * 8 + x,
                                        ] = 0
                    serve_gates(
                        vec, thread % 32, g_now, beta_now, loaded_g, loaded_beta, gate_x, g, beta, A_log, dt_bias,
                        start, length, chunks, head, beta_factor, k_empty, gates_full, gate, sigmoid, False, None, 0,
                    )  # fmt: skip
                else:
                    serve_queries(
                        vec, thread - base - 64, q_s, q_full, k_empty, gates_full, query_full, chunks, scale, a_,
                        b_, out, K, dtype, l2norm, folded, False, None, 0, group,
                        False,
                    )  # fmt: skip

    return forward
