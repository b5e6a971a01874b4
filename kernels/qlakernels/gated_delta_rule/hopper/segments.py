"""What long documents with few heads are cut into: segments, whose scans run side by side, stitched exactly.

The state that leaves a piece of a document is affine in the one that enters it: S' = M S + N, in the forward scan as in
the reverse one. A segment is as long as fills the chip with scans; what it does to a state is found in shorter pieces,
sections, for a shorter chain. `segments` finds their N, by a scan that begins at zero, and M, by one of the columns of
the identity with no values; `stitch` goes from section to section and leaves the state that enters each segment, where
`forward` and `reverse` begin. Of a segment they see what `reach` found to be wanted, which for most heads is a small
part and no M.

A block of `segments` takes 64 columns of N or of M, [64, K] in the registers of its one consumer warpgroup; a warp of
the other brings the tiles and what `prepare` has made. M is handed on as the sum of two bfloat16 matrices, [column, K].
Shared memory (K = 128, 64 columns): k, v, N and vectors 35 KB a stage, 105 KB; in reverse, with q and P, two stages and
one of dO, 110 KB: two blocks a multiprocessor.
"""

import tilelang.language as T
from tilelang.layout import make_full_bank_swizzled_layout

from qlakernels.gated_delta_rule.hopper.chunk import BAR, FAR, FROM_P, GAMMA, INTO_STATE, LOG2, OUTPUT, STATE_KAPPA
from qlakernels.gated_delta_rule.hopper.common import (
    BASE,
    FIRST,
    LENGTH,
    PRELUDE,
    arrive,
    folds_decay,
    load_tail,
    release_tiles,
    take_segment,
    transposed_accumulator,
    wait,
)
from qlakernels.gated_delta_rule.hopper.sizes import CHUNK, VECTORS

REGISTERS = (208, 40)  # of a thread of the consumers, of the producer
BLOCKS = 2  # of a multiprocessor


def segments_kernel(key_dim, value_dim, dtype, reverse):
    """`reverse`: for the gradient of the state, from dO instead of v."""
    C = CHUNK
    K, V, part = key_dim, value_dim, 64
    stages, x_stages = (2, 1) if reverse else (3, 3)
    values = -(-V // part)  # blocks of N; those of M behind them
    consumers, threads = 128, 256
    registers, producer_registers = REGISTERS
    folded = folds_decay(dtype) and not reverse
    tokens, heads, groups = T.dynamic("tokens"), T.dynamic("heads"), T.dynamic("groups")
    documents, prepared, cuts = T.dynamic("documents"), T.dynamic("prepared"), T.dynamic("cuts")
    prepared_of_P = T.dynamic("prepared_of_P")  # none in the forward direction
    q_token, q_head = T.dynamic("q_token"), T.dynamic("q_head")
    k_token, k_head = T.dynamic("k_token"), T.dynamic("k_head")
    x_token, x_head = T.dynamic("x_token"), T.dynamic("x_head")

    @T.prim_func
    def segments(
        q: T.StridedTensor((tokens, groups, K), (q_token, q_head, 1), dtype),
        k: T.StridedTensor((tokens, groups, K), (k_token, k_head, 1), dtype),
        x: T.StridedTensor((tokens, heads, V), (x_token, x_head, 1), dtype),
        cu_seqlens: T.Tensor((documents + 1,), "int32"),
        reaches: T.Tensor((cuts, heads), "int32"),
        N: T.Tensor((prepared, heads, C, C), dtype),
        P: T.Tensor((prepared_of_P, heads, C, C), dtype),
        vectors: T.Tensor((prepared, heads, VECTORS, C), "float32"),
        section_states: T.Tensor((cuts, heads, V, K), "float32"),
        maps: T.Tensor((cuts, heads, 2, K, K), "bfloat16"),
        ratio: T.int32,
        section: T.int32,
        steps: T.int32,
    ):
        with T.Kernel(values + T.ceildiv(K, part), heads, cuts, threads=threads) as (p, head, turn):
            T.import_source(PRELUDE)
            T.annotate_min_blocks_per_sm(BLOCKS)
            k_s = T.alloc_shared((stages, C, K), dtype)
            x_s = T.alloc_shared((x_stages, C, part), dtype)
            N_s = T.alloc_shared((stages, C, C), dtype)
            vec = T.alloc_shared((stages, VECTORS, C), "float32")
            S = T.alloc_fragment((part, K), "float32")
            S_r = T.alloc_fragment((part, K), dtype)
            X = T.alloc_fragment((part, C), "float32")
            left = T.alloc_fragment((part, C), dtype)
            x_f = T.alloc_fragment((C, part), dtype)
            full, empty = T.alloc_barrier([32] * stages), T.alloc_barrier([consumers] * stages)
            x_full, x_empty = T.alloc_barrier([32] * x_stages), T.alloc_barrier([consumers] * x_stages)
            if reverse:
                q_s = T.alloc_shared((stages, C, K), dtype)
                P_s = T.alloc_shared((stages, C, C), dtype)
                from_q = T.alloc_fragment((part, C), dtype)
            T.annotate_layout({x_f: transposed_accumulator(part), x_s: make_full_bank_swizzled_layout(x_s)})
            thread = T.get_thread_binding()
            reached = T.alloc_var("int32")
            reached = reaches[turn, head]
            if reached > 0:
                place = T.alloc_local((7,), "int32")
                take_segment(cu_seqlens, documents, turn, section, steps, place)
                group = T.alloc_var("int32")
                group = head // ratio
                start = T.alloc_var("int32")
                length = T.alloc_var("int32")
                chunks = T.alloc_var("int32")
                count = T.alloc_var("int32")
                slot = T.alloc_var("int32")
                start = place[FIRST]
                length = place[LENGTH]
                slot = place[BASE]
                chunks = T.ceildiv(length, C)
                count = T.min(reached, chunks)
                if p >= values and reached <= chunks:
                    count = 0
                if thread < consumers:
                    T.set_max_nreg(registers, 1)
                    columns = p * part
                    if p < values:
                        T.clear(S)
                    else:
                        for i, j in T.Parallel(part, K):
                            S[i, j] = T.Select(columns - values * part + i == j, T.float32(1.0), T.float32(0.0))
                        for stage in T.unroll(x_stages):
                            for i, j in T.Parallel(C, part):
                                x_s[stage, i, j] = 0.0
                        T.sync_threads(1, consumers)
                    for step in T.serial(count):
                        stage = step % stages
                        T.copy(S, S_r)
                        wait(full, stage, step // stages % 2)
                        T.wgmma_gemm(S_r, k_s[stage, :, :], X, transpose_B=True, clear_accum=True)
                        wait(x_full, step % x_stages, step // x_stages % 2)
                        T.copy(x_s[step % x_stages, :, :], x_f)
                        if reverse:
                            for i, j in T.Parallel(part, C):
                                from_q[i, j] = T.cast(x_f[j, i], "float32") * vec[stage, OUTPUT, j]
                            if folds_decay(dtype) and vec[stage, LOG2, C - 1] > -FAR:
                                T.copy(from_q, left)
                            else:
                                for i, j in T.Parallel(part, C):
                                    left[i, j] = x_f[j, i]
                        release_tiles()
                        arrive(x_empty, step % x_stages)
                        for i, j in T.Parallel(part, K):
                            S[i, j] *= vec[stage, GAMMA, C - 1]
                        T.wait_wgmma(0)
                        T.warpgroup_fence_operand(X, num_regs=32)
                        if reverse:
                            for i, j in T.Parallel(part, C):
                                X[i, j] *= vec[stage, STATE_KAPPA, j]
                            T.wgmma_gemm(left, P_s[stage, :, :], X)
                            T.wgmma_gemm(from_q, q_s[stage, :, :], S)
                            T.wait_wgmma(1)
                            T.warpgroup_fence_operand(X, num_regs=32)
                            for i, j in T.Parallel(part, C):
                                X[i, j] *= vec[stage, FROM_P, j]
                            T.copy(X, left)
                            T.wgmma_gemm(left, N_s[stage, :, :], X)
                        else:
                            for i, j in T.Parallel(part, C):
                                X[i, j] = T.cast(x_f[j, i], "float32") - vec[stage, STATE_KAPPA, j] * X[i, j]
                            T.copy(X, left)
                            T.wgmma_gemm(left, N_s[stage, :, :], X, transpose_B=True)
                        T.wait_wgmma(0)
                        T.warpgroup_fence_operand(X, num_regs=32)
                        for i, j in T.Parallel(part, C):
                            left[i, j] = X[i, j] * vec[stage, BAR, j]
                        if not folded:
                            for i, j in T.Parallel(part, C):
                                left[i, j] = T.cast(left[i, j], "float32") * vec[stage, INTO_STATE, j]
                        T.wgmma_gemm(left, k_s[stage, :, :], S)
                        T.wait_wgmma(0)
                        T.warpgroup_fence_operand(S, num_regs=K // 2)
                        arrive(empty, stage)
                    if p < values:
                        for i, j in T.Parallel(part, K):
                            section_states[turn + (-1 if reverse else 1), head, columns + i, j] = S[i, j]
                    elif reached > chunks:
                        for i, j in T.Parallel(part, K):
                            maps[turn, head, 0, columns - values * part + i, j] = T.cast(S[i, j], "bfloat16")
                        for i, j in T.Parallel(part, K):
                            maps[turn, head, 1, columns - values * part + i, j] = T.cast(
                                S[i, j] - T.cast(T.cast(S[i, j], "bfloat16"), "float32"), "bfloat16"
                            )
                else:
                    T.set_max_nreg(producer_registers, 0)
                    if thread < consumers + 32:
                        columns = p * part
                        for step in T.serial(count):
                            stage = step % stages
                            c = count - 1 - step if reverse else chunks - count + step
                            first = start + c * C
                            left_rows = length - c * C
                            wait(empty, stage, (step // stages + 1) % 2)
                            if reverse and left_rows < C:
                                load_tail(k_s, stage, k, first, group, 0, left_rows, K)
                                load_tail(q_s, stage, q, first, group, 0, left_rows, K)
                            else:
                                T.tma_copy(k[first : first + C, group, :], k_s[stage, :, :], barrier=full[stage])
                                if reverse:
                                    T.tma_copy(q[first : first + C, group, :], q_s[stage, :, :], barrier=full[stage])
                            T.tma_copy(N[slot + c, head, :, :], N_s[stage, :, :], barrier=full[stage])
                            if reverse:
                                T.tma_copy(P[slot + c, head, :, :], P_s[stage, :, :], barrier=full[stage])
                            T.tma_copy(vectors[slot + c, head, :, :], vec[stage, :, :], barrier=full[stage])
                            arrive(full, stage)
                            wait(x_empty, step % x_stages, (step // x_stages + 1) % 2)
                            if p < values:
                                if reverse and left_rows < C:
                                    load_tail(x_s, step % x_stages, x, first, head, columns, left_rows, part)
                                else:
                                    T.tma_copy(
                                        x[first : first + C, head, columns : columns + part],
                                        x_s[step % x_stages, :, :],
                                        barrier=x_full[step % x_stages],
                                    )
                            arrive(x_full, step % x_stages)

    return segments


def stitch_kernel(key_dim, value_dim, reverse):
    """The state that enters each section, in place of the N of the one before, by S' = M S + N in three products of
    bfloat16, S = S₁ + S₂ and M = M₁ + M₂; where no M is wanted N is that state already, and inside of a segment it is
    not written. A block takes 64 columns of V of a document's head through its sections up to the last segment; a warp
    of its second warpgroup brings M and N, two stages of 96 KB."""
    C, K, V = CHUNK, key_dim, value_dim
    part, stages = 64, 2
    heads, documents, cuts, starts = (T.dynamic(x) for x in ("heads", "documents", "cuts", "starts"))

    @T.prim_func
    def stitch(
        cu_seqlens: T.Tensor((documents + 1,), "int32"),
        first_state: T.Tensor((starts, heads, K, V), "float32"),
        reaches: T.Tensor((cuts, heads), "int32"),
        maps: T.Tensor((cuts, heads, 2, K, K), "bfloat16"),
        section_states: T.Tensor((cuts, heads, V, K), "float32"),
        segment: T.int32,
        section: T.int32,
    ):
        with T.Kernel(T.ceildiv(V, part), heads, documents, threads=256) as (p, head, document):
            T.import_source(PRELUDE)
            M_s = T.alloc_shared((stages, 2, K, K), "bfloat16")
            N_s = T.alloc_shared((stages, part, K), "float32")
            S = T.alloc_fragment((part, K), "float32")
            S1 = T.alloc_fragment((part, K), "bfloat16")
            S2 = T.alloc_fragment((part, K), "bfloat16")
            full, empty = T.alloc_barrier([32] * stages), T.alloc_barrier([128] * stages)
            T.annotate_layout({N_s: make_full_bank_swizzled_layout(N_s)})
            thread = T.get_thread_binding()
            length = cu_seqlens[document + 1] - cu_seqlens[document]
            low = T.alloc_var("int32")
            count = T.alloc_var("int32")
            sections = T.alloc_var("int32")
            chunks = T.alloc_var("int32")  # of the section that is passed
            reached = T.alloc_var("int32")
            low = cu_seqlens[document] // section + document
            sections = T.max(1, T.ceildiv(length, section))
            # the sections that are passed: all of the segments before the last
            count = (T.ceildiv(length, segment) - 1) * (segment // section)
            if reverse:
                count = T.max(0, sections - segment // section)
            if thread < 128:
                columns = p * part
                if starts > 0:
                    for i, j in T.Parallel(part, K):
                        S[i, j] = first_state[document, head, j, columns + i]
                else:
                    T.clear(S)
                for i, j in T.Parallel(part, K):
                    section_states[low + (sections - 1 if reverse else 0), head, columns + i, j] = S[i, j]
                for step in T.serial(count):
                    passed = sections - 1 - step if reverse else step
                    reached = reaches[low + passed, head]
                    chunks = T.ceildiv(T.min(section, length - passed * section), C)
                    for i, j in T.Parallel(part, K):
                        S1[i, j] = S[i, j]
                    for i, j in T.Parallel(part, K):
                        S2[i, j] = S[i, j] - T.cast(S1[i, j], "float32")
                    wait(full, step % stages, step // stages % 2)
                    T.copy(N_s[step % stages, :, :], S)
                    if reached > chunks:
                        T.wgmma_gemm(S1, M_s[step % stages, 0, :, :], S)
                        T.wgmma_gemm(S1, M_s[step % stages, 1, :, :], S)
                        T.wgmma_gemm(S2, M_s[step % stages, 0, :, :], S)
                        T.wait_wgmma(0)
                        T.warpgroup_fence_operand(S, num_regs=K // 2)
                        if (passed if reverse else passed + 1) % (segment // section) == 0:
                            for i, j in T.Parallel(part, K):
                                section_states[low + passed + (-1 if reverse else 1), head, columns + i, j] = S[i, j]
                    release_tiles()
                    arrive(empty, step % stages)
            elif thread < 160:
                for step in T.serial(count):
                    passed = sections - 1 - step if reverse else step
                    reached = reaches[low + passed, head]
                    chunks = T.ceildiv(T.min(section, length - passed * section), C)
                    wait(empty, step % stages, (step // stages + 1) % 2)
                    if reached > 0:
                        T.tma_copy(
                            section_states[low + passed + (-1 if reverse else 1), head, p * part : p * part + part, :],
                            N_s[step % stages, :, :],
                            barrier=full[step % stages],
                        )
                    if reached > chunks:
                        for half in T.unroll(2):
                            T.tma_copy(
                                maps[low + passed, head, half, :, :],
                                M_s[step % stages, half, :, :],
                                barrier=full[step % stages],
                            )
                    arrive(full, step % stages)

    return stitch
