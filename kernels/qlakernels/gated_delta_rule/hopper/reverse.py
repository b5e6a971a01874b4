"""R: the reverse scan.

Per document and value head, over its chunks from the last to the first, with the gradient of the state dS [K, V] in
float32 registers; it needs neither S nor V (symbols as in `forward`; dO the gradient of O):

    D = ρκ ∘ (K dS) + Pᵀ dO            the gradient of β ∘ E
    Y = D + Nᵀ D                       dV = β ∘ Y, written as round(β̄ ∘ Y)
    dS ← γ_C dS + Qᵀ (scale γχ ∘ dO) − Kᵀ (γκβ/β̄ ∘ round(β̄ ∘ Y))

with N of the transposed solve (`chunk`). Where the decay over the chunk can be taken apart (FAR), with ρ_j = γ_C / γ_j,

    D = κ/γ ∘ [γ_C (K dS) + (Q Kᵀ below and on the diagonal)ᵀ (scale γχ ∘ dO)]

where the last factor is needed anyway, and P takes no weights. dS is written at the end of each chunk, before that
chunk is taken back: `gradients` needs it there, with the gates and the lengths of q and k, which are written too.

Held transposed and shared out between warpgroups as in `forward`: consumers, auxiliaries that make N ahead of them, a
producer. Registers of a consumer: dS 64, its rounded copy 32, D 32, P 16 or 32, dO 16, two operands 16 each.
Shared memory (K = V = 128): q and k 80, dO 16, N and P 32, dS 32, dV 16, the solve 24, vectors 9: 209 KB.
"""

import tilelang.language as T
from tilelang.layout import make_full_bank_swizzled_layout

from qlakernels.gated_delta_rule.hopper.chunk import (
    AUXILIARIES,
    BAR,
    BLOCKS_OF_8,
    FAR,
    FROM_P,
    GAMMA,
    INTO_STATE,
    LOG2,
    OUTPUT,
    PLACES,
    Q_STAGES,
    STAGES,
    STATE_KAPPA,
    cut,
    serve_gates,
    serve_keys,
    serve_queries,
    weigh_P,
)
from qlakernels.gated_delta_rule.hopper.common import (
    BASE,
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
from qlakernels.gated_delta_rule.hopper.sizes import CHUNK, PIECE, VECTORS

# as in `forward`
REGISTERS = {1: (216, 104, 88), 2: (184, 104, 40)}


def reverse_kernel(key_dim, value_dim, dtype, part, l2norm, gate, sigmoid, raw_dtype, beta_dtype):
    """`part`: rows of V a block takes, 64 or 128."""
    C = CHUNK
    K, V = key_dim, value_dim
    folded = folds_decay(dtype)
    consumers = 2 * part
    auxiliaries = AUXILIARIES[part // 64]
    base = consumers + 128 * auxiliaries  # the producer's first thread
    threads = base + 128
    registers, auxiliary_registers, producer_registers = REGISTERS[part // 64]
    rows_first = T.GemmWarpPolicy.FullRow
    columns_first = T.GemmWarpPolicy.FullCol
    tokens, heads, groups = T.dynamic("tokens"), T.dynamic("heads"), T.dynamic("groups")
    slots, documents, starts, ends = (T.dynamic(x) for x in ("slots", "documents", "starts", "ends"))
    q_token, q_head = T.dynamic("q_token"), T.dynamic("q_head")
    k_token, k_head = T.dynamic("k_token"), T.dynamic("k_head")
    o_token, o_head = T.dynamic("o_token"), T.dynamic("o_head")
    v_token, v_head, dv_pieces = T.dynamic("v_token"), T.dynamic("v_head"), T.dynamic("dv_pieces")
    g_token, b_token = T.dynamic("g_token"), T.dynamic("b_token")
    cuts = T.dynamic("cuts")

    @T.prim_func
    def reverse(
        q: T.StridedTensor((tokens, groups, K), (q_token, q_head, 1), dtype),
        k: T.StridedTensor((tokens, groups, K), (k_token, k_head, 1), dtype),
        do: T.StridedTensor((tokens, heads, V), (o_token, o_head, 1), dtype),
        g: T.StridedTensor((tokens, heads), (g_token, 1), raw_dtype),
        beta: T.StridedTensor((tokens, heads), (b_token, 1), beta_dtype),
        A_log: T.Tensor((heads,), "float32"),
        dt_bias: T.Tensor((heads,), "float32"),
        cu_seqlens: T.Tensor((documents + 1,), "int32"),
        order: T.Tensor((documents,), "int32"),
        d_final_state: T.Tensor((ends, heads, K, V), "float32"),
        dv: T.StridedTensor((tokens, heads, V), (v_token, v_head, 1), dtype),
        dv_again: T.Tensor((dv_pieces, PIECE), dtype),  # for stores of whole pieces
        d_states: T.Tensor((slots, heads, V, K), dtype),
        d_initial_state: T.Tensor((starts, heads, K, V), "float32"),
        gates: T.Tensor((slots, heads, 2, C), "float32"),
        norms: T.Tensor((slots, groups, 2, C), "float32"),
        section_states: T.Tensor((cuts, heads, V, K), "float32"),
        dv_token: T.int32,  # steps between tokens and heads, in pieces
        dv_head: T.int32,
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
            do_s = T.alloc_shared((C, part), dtype)
            dv_s = T.alloc_shared((C, part), dtype)
            dS_s = T.alloc_shared((part, K), dtype)
            vec = T.alloc_shared((STAGES, VECTORS, C), "float32")
            A_s = T.alloc_shared((2 * auxiliaries, C, C + 8), "float16")
            Mt_s = T.alloc_shared((auxiliaries, C // 2, C // 2 + 8), "float16")
            block_s = T.alloc_shared((auxiliaries * BLOCKS_OF_8 + 1, 8, 12), "float32")

            dS = T.alloc_fragment((part, K), "float32")
            dS_r = T.alloc_fragment((part, K), dtype)
            D = T.alloc_fragment((part, C), "float32")
            left = T.alloc_fragment((part, C), dtype)
            from_q = T.alloc_fragment((part, C), dtype)
            do_f = T.alloc_fragment((C, part), dtype)
            dv_f = T.alloc_fragment((C, part), dtype)
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
            do_full, do_empty = T.alloc_barrier([32]), T.alloc_barrier([consumers])
            gates_full, query_full = T.alloc_barrier([32] * STAGES), T.alloc_barrier([64] * STAGES)
            key_full = T.alloc_barrier([128] * STAGES)
            made_full = T.alloc_barrier([128] * PLACES)
            made_empty = T.alloc_barrier([consumers] * PLACES)
            P_full = T.alloc_barrier([consumers] * PLACES)
            T.annotate_layout(
                {f: transposed_accumulator(part) for f in (do_f, dv_f)}
                | {x: make_full_bank_swizzled_layout(x) for x in (do_s, dv_s)}
                | {dS_s: state_layout(dS_s)}
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
            slot = T.alloc_var("int32")
            slot = place[BASE]
            opens = T.alloc_var("int32")
            opens = place[OPENS]

            if thread < consumers:
                T.set_max_nreg(registers, 1)
                columns = p * part
                if cuts > 0:
                    entered = T.alloc_var("int32")
                    entered = T.min(section_of(cu_seqlens, document, start + T.max(length - 1, 0), section), cuts - 1)
                    for i, j in T.Parallel(part, K):
                        dS[i, j] = T.if_then_else(columns + i < V, section_states[entered, head, columns + i, j], 0.0)
                elif ends > 0:
                    for i, j in T.Parallel(part, K):
                        dS[i, j] = T.if_then_else(columns + i < V, d_final_state[document, head, j, columns + i], 0.0)
                else:
                    T.clear(dS)
                for step in T.serial(chunks):
                    stage = step % STAGES
                    c = chunks - 1 - step
                    T.copy(dS, dS_r)
                    T.tma_store_wait(1)
                    T.sync_threads(1, consumers)  # dS of the chunk before has left dS_s, dV perhaps not yet dv_s
                    T.copy(dS_r, dS_s)
                    wait(k_full, stage, step // STAGES % 2)
                    wait(q_full, step % Q_STAGES, step // Q_STAGES % 2)
                    T.wgmma_gemm(
                        q_s[step % Q_STAGES, :, :],
                        k_s[stage, :, :],
                        Pf,
                        transpose_B=True,
                        clear_accum=True,
                        policy=columns_first,
                    )
                    T.wgmma_gemm(dS_r, k_s[stage, :, :], D, transpose_B=True, clear_accum=True, policy=rows_first)
                    wait(query_full, stage, step // STAGES % 2)
                    wait(key_full, stage, step // STAGES % 2)
                    T.wait_wgmma(1)
                    T.warpgroup_fence_operand(Pf, num_regs=C * C // consumers)
                    weigh_P(Pf, vec, stage, folded)
                    cut(Pf, C * C // consumers, False)
                    T.copy(Pf, P_s[step % PLACES, :, :])
                    T.tma_store_wait(0)  # dV of the chunk before has left dv_s
                    release_tiles()
                    arrive(P_full, step % PLACES)
                    wait(do_full, 0, step % 2)
                    T.copy(do_s, do_f)
                    for i, j in T.Parallel(part, C):
                        from_q[i, j] = T.cast(do_f[j, i], "float32") * vec[stage, OUTPUT, j]
                    if folded and vec[stage, LOG2, C - 1] > -FAR:
                        T.copy(from_q, left)
                    else:
                        for i, j in T.Parallel(part, C):
                            left[i, j] = do_f[j, i]
                    release_tiles()
                    arrive(do_empty, 0)
                    T.wait_wgmma(0)
                    T.warpgroup_fence_operand(D, num_regs=32)
                    for i, j in T.Parallel(part, C):
                        D[i, j] *= vec[stage, STATE_KAPPA, j]
                    for i, j in T.Parallel(part, K):
                        dS[i, j] *= vec[stage, GAMMA, C - 1]
                    wait(P_full, step % PLACES, step // PLACES % 2)
                    T.tma_copy(dS_s, d_states[slot + c, head, columns : columns + part, :])
                    T.wgmma_gemm(left, P_s[step % PLACES, :, :], D, policy=rows_first)
                    T.wgmma_gemm(from_q, q_s[step % Q_STAGES, :, :], dS, policy=rows_first)
                    wait(made_full, step % PLACES, step // PLACES % 2)
                    T.wait_wgmma(1)
                    T.warpgroup_fence_operand(D, num_regs=32)
                    for i, j in T.Parallel(part, C):
                        D[i, j] *= vec[stage, FROM_P, j]
                    T.copy(D, left)
                    T.wgmma_gemm(left, N_s[step % PLACES, :, :], D, policy=rows_first)
                    T.wait_wgmma(0)
                    T.warpgroup_fence_operand(D, num_regs=32)
                    arrive(made_empty, step % PLACES)
                    arrive(q_empty, step % Q_STAGES)
                    for i, j in T.Parallel(part, C):
                        dv_f[j, i] = D[i, j] * vec[stage, BAR, j]
                    for i, j in T.Parallel(part, C):
                        left[i, j] = T.cast(dv_f[j, i], "float32") * vec[stage, INTO_STATE, j]
                    T.wgmma_gemm(left, k_s[stage, :, :], dS, policy=rows_first)
                    T.copy(dv_f, dv_s)
                    release_tiles()
                    T.sync_threads(1, consumers)
                    first = start + c * C
                    if c * C + C <= length:
                        T.tma_copy(dv_s, dv[first : first + C, head, columns : columns + part])
                    else:
                        for i, j in T.Parallel(C, part):
                            if c * C + i < length and columns + j < V:
                                dv_again[
                                    (first + i) * dv_token + head * dv_head + (columns + j) // PIECE,
                                    (columns + j) % PIECE,
                                ] = dv_s[i, j]
                    T.wait_wgmma(0)
                    T.warpgroup_fence_operand(dS, num_regs=K // 2)
                    arrive(k_empty, stage)
                if starts > 0 and opens > 0:
                    for i, j in T.Parallel(part, K):
                        if columns + i < V:
                            d_initial_state[document, head, j, columns + i] = dS[i, j]
                T.tma_store_wait(0)
            elif thread < base:
                T.set_max_nreg(auxiliary_registers, 0)
                serve_keys(
                    thread - consumers, auxiliaries, k_s, vec, N_s, A_s, Mt_s, block_s, a_, b_, a, b, c_, out, column,
                    diagonal, k_full, gates_full, key_full, made_full, made_empty, chunks, K, dtype, l2norm, True,
                    norms, slot, group, p == 0 and head % ratio == 0,
                )  # fmt: skip
            else:
                T.set_max_nreg(producer_registers, 0)
                if thread < base + 32:
                    for step in T.serial(chunks):
                        stage = step % STAGES
                        c = chunks - 1 - step
                        wait(k_empty, stage, (step // STAGES + 1) % 2)
                        first = start + c * C
                        left_rows = length - c * C
                        bring(k_s, stage, k, first, group, left_rows, K, k_full)
                        wait(q_empty, step % Q_STAGES, (step // Q_STAGES + 1) % 2)
                        bring(q_s, step % Q_STAGES, q, first, group, left_rows, K, q_full)
                        wait(do_empty, 0, (step + 1) % 2)
                        columns = p * part
                        if left_rows >= C:
                            T.tma_copy(do[first : first + C, head, columns : columns + part], do_s, barrier=do_full[0])
                        else:
                            load_tail(do_s, None, do, first, head, columns, left_rows, part)
                        arrive(do_full, 0)
                elif thread < base + 64:
                    serve_gates(
                        vec, thread % 32, g_now, beta_now, loaded_g, loaded_beta, gate_x, g, beta, A_log, dt_bias,
                        start, length, chunks, head, beta_factor, k_empty, gates_full, gate, sigmoid, True, gates, slot,
                    )  # fmt: skip
                else:
                    serve_queries(
                        vec, thread - base - 64, q_s, q_full, k_empty, gates_full, query_full, chunks, scale, a_,
                        b_, out, K, dtype, l2norm, False, True, norms, slot, group,
                        p == 0 and head % ratio == 0,
                    )  # fmt: skip

    return reverse
