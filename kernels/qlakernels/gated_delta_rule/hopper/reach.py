"""How much of a segment has to be seen for what leaves it: from a bound of what each chunk leaves of a state.

A token takes the state to γ (I − β k kᵀ) S and adds to it. With keys normalised in the operator no vector grows by more
than max(1, |1 − β|), so ‖S‖ shrinks over a chunk to 2^b of itself or less, b = Σ log₂ γ + Σ log₂ max(1, |1 − β|).
`decay` makes b of all chunks. `reach` adds them up from the side where a segment is left, until the sum is below
−BEYOND: what enters there, up to 2⁴³, leaves less than the smallest float32, and the scan begins there, from nothing.
A segment is looked at in sections (`segments`); each is told how much of it is wanted.
Keys that are not normalised have no such bound: all of the segment is wanted.
"""

import tilelang.language as T

from qlakernels.gated_delta_rule.hopper.chunk import LEAST_DECAY, sigmoid_of, softplus
from qlakernels.gated_delta_rule.hopper.common import (
    BASE,
    FIRST,
    LEFT,
    LENGTH,
    LOG2E,
    PRELUDE,
    locate,
    log2,
    take_segment,
)
from qlakernels.gated_delta_rule.hopper.sizes import CHUNK

BEYOND = 192.0  # powers of two
WIDTH = 16  # heads of a block


def decay_kernel(gate, sigmoid, raw_dtype, beta_dtype):
    C = CHUNK
    tokens, heads, slots, documents = (T.dynamic(x) for x in ("tokens", "heads", "slots", "documents"))
    g_token, b_token = T.dynamic("g_token"), T.dynamic("b_token")

    @T.prim_func
    def decay(
        g: T.StridedTensor((tokens, heads), (g_token, 1), raw_dtype),
        beta: T.StridedTensor((tokens, heads), (b_token, 1), beta_dtype),
        A_log: T.Tensor((heads,), "float32"),
        dt_bias: T.Tensor((heads,), "float32"),
        cu_seqlens: T.Tensor((documents + 1,), "int32"),
        bounds: T.Tensor((slots, heads), "float32"),
        beta_factor: T.float32,
        steps: T.int32,
    ):
        with T.Kernel(T.ceildiv(heads, WIDTH), slots, threads=128) as (part, slot):
            T.import_source(PRELUDE)
            x = T.alloc_fragment((C, WIDTH), "float32")
            y = T.alloc_fragment((C, WIDTH), "float32")
            sums = T.alloc_fragment((WIDTH,), "float32")
            place = T.alloc_local((6,), "int32")
            locate(cu_seqlens, documents, slot, steps, C, place)
            first = T.alloc_var("int32")
            size = T.alloc_var("int32")
            first = place[FIRST]
            size = place[LEFT]
            head = part * WIDTH
            for i, j in T.Parallel(C, WIDTH):  # without branches, so that all loads are on their way at once
                token = T.max(first + T.min(i, size - 1), 0)
                x[i, j] = T.cast(g[token, T.min(head + j, heads - 1)], "float32")
                y[i, j] = T.cast(beta[token, T.min(head + j, heads - 1)], "float32")
            for i, j in T.Parallel(C, WIDTH):
                there = i < size and head + j < heads
                x[i, j] = T.Select(there, x[i, j], T.float32(0.0))
                y[i, j] = T.Select(there, y[i, j], T.float32(0.0))
            if gate:
                for i, j in T.Parallel(C, WIDTH):
                    x[i, j] += T.if_then_else(head + j < heads, dt_bias[head + j], 0.0)
                for i, j in T.Parallel(C, WIDTH):
                    x[i, j] = softplus(x[i, j])
                for i, j in T.Parallel(C, WIDTH):
                    x[i, j] *= T.if_then_else(i < size and head + j < heads, -T.exp(A_log[head + j]), 0.0)
            if sigmoid:
                for i, j in T.Parallel(C, WIDTH):
                    y[i, j] = T.if_then_else(i < size, sigmoid_of(y[i, j], beta_factor), 0.0)
            for i, j in T.Parallel(C, WIDTH):
                x[i, j] = T.max(x[i, j], LEAST_DECAY) * LOG2E + log2(T.max(T.abs(1.0 - y[i, j]), 1.0))
            T.reduce_sum(x, sums, dim=0)
            for j in T.Parallel(WIDTH):
                if head + j < heads:
                    bounds[slot, head + j] = sums[j]

    return decay


def reach_kernel(known):
    """`known`: whether `bounds` holds; otherwise all of a segment is wanted."""
    heads, slots, documents, cuts = (T.dynamic(x) for x in ("heads", "slots", "documents", "cuts"))

    @T.prim_func
    def reach(
        cu_seqlens: T.Tensor((documents + 1,), "int32"),
        bounds: T.Tensor((slots, heads), "float32"),
        reaches: T.Tensor((cuts, heads), "int32"),
        segment: T.int32,
        section: T.int32,
        steps: T.int32,
        entered: T.int32,
        reverse: T.int32,
    ):
        """reaches ← the chunks wanted of a section, from the side where it is left; one more than there are where what
        enters it is wanted too; none where no other segment of the document follows. `entered`: a document is entered
        by a state; `reverse`: from its end."""
        with T.Kernel(heads, cuts, threads=32) as (head, turn):
            lane = T.get_thread_binding()
            place = T.alloc_local((7,), "int32")
            found = T.alloc_local((1,), "int32")
            x, total, other = (T.alloc_local((1,), "float32") for _ in range(3))
            take_segment(cu_seqlens, documents, turn, section, steps, place)
            first, end = cu_seqlens[place[0]], cu_seqlens[place[0] + 1]  # of the document
            before = (place[FIRST] - first) % segment  # tokens of the segment before the section
            behind = T.max(T.min(place[FIRST] - before + segment, end) - place[FIRST] - place[LENGTH], 0)
            mine = T.ceildiv(place[LENGTH], CHUNK)
            passed = T.ceildiv(T.if_then_else(reverse > 0, before, behind), CHUNK)
            chunks = before // CHUNK + mine + T.ceildiv(behind, CHUNK)  # of the segment
            low = place[BASE] - before // CHUNK
            found[0] = chunks + 1
            if known:
                total[0] = 0.0
                for step in T.serial(T.ceildiv(chunks, 32)):
                    if found[0] > chunks:
                        i = step * 32 + lane
                        x[0] = T.if_then_else(
                            i < chunks,
                            bounds[low + T.if_then_else(reverse > 0, i, chunks - 1 - i), head],
                            0.0,
                        )
                        for near in T.unroll(5):
                            other[0] = T.shfl_up(x[0], 1 << near)
                            if lane >= 1 << near:
                                x[0] += other[0]
                        x[0] += total[0]
                        found[0] = T.warp_reduce_min(T.if_then_else(x[0] < -BEYOND, i + 1, chunks + 1))
                        total[0] = T.shfl_sync(x[0], 31)
            opens = place[FIRST] - before == first
            closes = place[FIRST] - before + segment >= end
            if entered == 0 and T.if_then_else(reverse > 0, closes, opens):
                found[0] = T.min(found[0], chunks)
            if lane == 0:
                reaches[turn, head] = T.if_then_else(
                    place[LENGTH] > 0 and not T.if_then_else(reverse > 0, opens, closes),
                    T.max(0, T.min(found[0] - passed, mine + 1)),
                    0,
                )

    return reach
