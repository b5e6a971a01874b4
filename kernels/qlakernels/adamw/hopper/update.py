"""The AdamW update (Loshchilov and Hutter 2019, algorithm 2), in float32, one element like the other.

    g' = f g        m ← β₁ m + (1 − β₁) g'        v ← β₂ v + (1 − β₂) g'²
    p ← (1 − λ α) p − α / (1 − β₁^t) · m / (√v / √(1 − β₂^t) + ε)        cast ← round(p)

α is the learning rate, λ the weight decay, f the factor. t, f and whether to skip are read on the device: nobody waits
for them on the host. A skipped update reads all and writes nothing.

A thread has a few pieces of 4 elements, as far from each other as a block is wide, and loads all of them before it
uses the first, and before it looks at t: the two powers are taken while the memory is busy. What is left behind the
last whole piece, up to 3 elements, is the first thread's, one by one.

Square root and reciprocal are those of IEEE 754, and numbers below 2⁻¹²⁶ are kept: without fast math the update is
torch's to a few roundings. The powers are torch's own: where β₂ is close to 1, 1 − β₂^t has few digits, the same ones.

A gradient in half precision is taken to float32 on its way in.

Bytes: p, m, v, g read, p, m, v written, 28 an element, 30 with a cast, 2 less with a gradient in half precision. At 3.0
TB/s, 1.667 · 10⁹ take 16.7 ms with a cast.
On their way are up to 128 KB a multiprocessor.
"""

import tilelang.language as T

from qlakernels.adamw.hopper.sizes import AHEAD, BLOCKS, PIECE, THREADS


def update_kernel(cast, gradient):
    """cast: the dtype of `casts`, or "none", where it is float32 and left alone; gradient: that of g."""
    with_cast, cast_dtype = cast != "none", "float32" if cast == "none" else cast
    size = T.dynamic("size", "int64")

    @T.prim_func
    def adamw_update(
        p: T.Tensor((size,), "float32"),
        m: T.Tensor((size,), "float32"),
        v: T.Tensor((size,), "float32"),
        g: T.Tensor((size,), gradient),
        casts: T.Tensor((size,), cast_dtype),
        step: T.Tensor((1,), "float32"),
        factor: T.Tensor((1,), "float32"),
        skip: T.Tensor((1,), "float32"),
        blocks: T.int32,
        lr: T.float32,
        beta1: T.float32,
        beta2: T.float32,
        eps: T.float32,
        weight_decay: T.float32,
    ):
        with T.Kernel(blocks, threads=THREADS) as block:
            T.annotate_min_blocks_per_sm(BLOCKS)
            ps, ms, vs = (T.alloc_local((AHEAD, PIECE), "float32") for _ in range(3))
            gs = T.alloc_local((AHEAD, PIECE), gradient)
            out = T.alloc_local((PIECE,), cast_dtype)
            rate, root, scale = (T.alloc_local((1,), "float32") for _ in range(3))
            first = T.alloc_var("int64")
            whole = T.alloc_var("int64")  # pieces
            thread = T.get_thread_binding()
            first = T.cast(block, "int64") * (AHEAD * THREADS) + thread
            whole = T.truncdiv(size, T.int64(PIECE))
            for i in T.unroll(AHEAD):
                if first + i * THREADS < whole:
                    load_piece(p, first + i * THREADS, ps, i)
                    load_piece(m, first + i * THREADS, ms, i)
                    load_piece(v, first + i * THREADS, vs, i)
                    load_piece(g, first + i * THREADS, gs, i)
            scale[0] = factor[0]
            rate[0] = lr / (1.0 - T.pow(beta1, step[0]))
            root[0] = 1.0 / T.sqrt(1.0 - T.pow(beta2, step[0]))
            if skip[0] == 0.0:
                for i in T.unroll(AHEAD):
                    if first + i * THREADS < whole:
                        for j in T.unroll(PIECE):
                            advance(ps, ms, vs, gs, i, j, scale, rate, root, lr, beta1, beta2, eps, weight_decay)
                        store_piece(ps, i, p, first + i * THREADS)
                        store_piece(ms, i, m, first + i * THREADS)
                        store_piece(vs, i, v, first + i * THREADS)
                        if with_cast:
                            for j in T.vectorized(PIECE):
                                out[j] = T.cast(ps[i, j], cast_dtype)
                            for j in T.vectorized(PIECE):
                                casts[(first + i * THREADS) * PIECE + j] = out[j]
                if first == 0:
                    for k in T.serial(T.cast(size - whole * PIECE, "int32")):
                        ps[0, 0] = p[whole * PIECE + k]
                        ms[0, 0] = m[whole * PIECE + k]
                        vs[0, 0] = v[whole * PIECE + k]
                        gs[0, 0] = g[whole * PIECE + k]
                        advance(ps, ms, vs, gs, 0, 0, scale, rate, root, lr, beta1, beta2, eps, weight_decay)
                        p[whole * PIECE + k] = ps[0, 0]
                        m[whole * PIECE + k] = ms[0, 0]
                        v[whole * PIECE + k] = vs[0, 0]
                        if with_cast:
                            casts[whole * PIECE + k] = T.cast(ps[0, 0], cast_dtype)

    return adamw_update


@T.macro
def load_piece(x, place, rows, i):
    """row i of rows [AHEAD, PIECE] ← piece number `place` of x"""
    for j in T.vectorized(PIECE):
        rows[i, j] = x[place * PIECE + j]


@T.macro
def store_piece(rows, i, x, place):
    """piece number `place` of x ← row i of rows [AHEAD, PIECE]"""
    for j in T.vectorized(PIECE):
        x[place * PIECE + j] = rows[i, j]


@T.macro
def advance(ps, ms, vs, gs, i, j, scale, rate, root, lr, beta1, beta2, eps, weight_decay):
    """element j of piece i of p, m and v ← the new ones.
    scale, rate, root: locals [1] with f, α / (1 − β₁^t) and 1 / √(1 − β₂^t)"""
    gradient = T.alloc_var("float32")
    gradient = T.cast(gs[i, j], "float32") * scale[0]
    ms[i, j] = beta1 * ms[i, j] + (1.0 - beta1) * gradient
    vs[i, j] = beta2 * vs[i, j] + (1.0 - beta2) * (gradient * gradient)
    ps[i, j] -= lr * weight_decay * ps[i, j]
    ps[i, j] -= rate[0] * ms[i, j] * (1.0 / (T.sqrt(vs[i, j]) * root[0] + eps))
