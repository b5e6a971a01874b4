"""From the gradients of the decay g and of the step size β to those of what they are made of, in one pass.

With y = a + dt_bias and x the logit of β, as `chunk` reads them,

    g = −exp(A_log) softplus(y)     da = dg · −exp(A_log) σ(y)           dA_log = Σ dg · g     ddt_bias = Σ da
    β = m σ(x)                      dx = dβ · m σ(x) (1 − σ(x))          m: 1, or 2 with doubling

Both σ and 1 − σ are made from exp of a negative number: neither overflows, and 1 − σ(x) keeps its digits at large x.

A block takes `TOKENS` tokens of `WIDTH` heads, 32 bytes of bfloat16 to a row, and adds up its tokens in a fixed order:
`sums` holds dA_log and ddt_bias by blocks of tokens.
"""

import tilelang.language as T

from qlakernels.gated_delta_rule.hopper.sizes import GATE_TOKENS as TOKENS

WIDTH = 16
PARTS = 8  # of a block's sum over tokens, added up side by side


def gate_gradients_kernel(gate, sigmoid, raw_dtype, beta_dtype):
    tokens, heads, blocks = T.dynamic("tokens"), T.dynamic("heads"), T.dynamic("blocks")
    g_token, b_token = T.dynamic("g_token"), T.dynamic("b_token")
    dg_token, db_token = T.dynamic("dg_token"), T.dynamic("db_token")

    @T.prim_func
    def gate_gradients(
        dg: T.Tensor((tokens, heads), "float32"),
        dbeta: T.Tensor((tokens, heads), "float32"),
        g: T.StridedTensor((tokens, heads), (g_token, 1), raw_dtype),
        beta: T.StridedTensor((tokens, heads), (b_token, 1), beta_dtype),
        A_log: T.Tensor((heads,), "float32"),
        dt_bias: T.Tensor((heads,), "float32"),
        dg_raw: T.StridedTensor((tokens, heads), (dg_token, 1), raw_dtype),
        dbeta_raw: T.StridedTensor((tokens, heads), (db_token, 1), beta_dtype),
        sums: T.Tensor((2, blocks, heads), "float32"),
        beta_factor: T.float32,
    ):
        with T.Kernel(T.ceildiv(heads, WIDTH), blocks, threads=256) as (part, block):
            x = T.alloc_fragment((TOKENS, WIDTH), "float32")
            tail = T.alloc_fragment((TOKENS, WIDTH), "float32")  # exp(−|x|)
            dx = T.alloc_fragment((TOKENS, WIDTH), "float32")
            dA_s = T.alloc_shared((TOKENS, WIDTH), "float32")
            dt_s = T.alloc_shared((TOKENS, WIDTH), "float32")
            dA_part = T.alloc_fragment((PARTS, WIDTH), "float32")
            dt_part = T.alloc_fragment((PARTS, WIDTH), "float32")
            token, head = block * TOKENS, part * WIDTH
            for i, j in T.Parallel(TOKENS, WIDTH):
                dx[i, j] = T.if_then_else(token + i < tokens and head + j < heads, dg[token + i, head + j], 0.0)
            if gate:
                for i, j in T.Parallel(TOKENS, WIDTH):
                    x[i, j] = T.if_then_else(
                        token + i < tokens and head + j < heads,
                        T.cast(g[token + i, head + j], "float32") + dt_bias[head + j],
                        0.0,
                    )
                for i, j in T.Parallel(TOKENS, WIDTH):
                    tail[i, j] = T.exp(-T.abs(x[i, j]))
                for i, j in T.Parallel(TOKENS, WIDTH):
                    dx[i, j] *= T.if_then_else(head + j < heads, -T.exp(A_log[head + j]), 0.0)
                for i, j in T.Parallel(TOKENS, WIDTH):
                    dA_s[i, j] = dx[i, j] * (T.max(x[i, j], 0.0) + T.log1p(tail[i, j]))
                for i, j in T.Parallel(TOKENS, WIDTH):
                    dx[i, j] *= T.if_then_else(x[i, j] < 0.0, tail[i, j], 1.0) / (1.0 + tail[i, j])
                for i, j in T.Parallel(TOKENS, WIDTH):
                    dt_s[i, j] = dx[i, j]
            for i, j in T.Parallel(TOKENS, WIDTH):
                if token + i < tokens and head + j < heads:
                    dg_raw[token + i, head + j] = dx[i, j]
            for i, j in T.Parallel(TOKENS, WIDTH):
                dx[i, j] = T.if_then_else(token + i < tokens and head + j < heads, dbeta[token + i, head + j], 0.0)
            if sigmoid:
                for i, j in T.Parallel(TOKENS, WIDTH):
                    x[i, j] = T.if_then_else(
                        token + i < tokens and head + j < heads, T.cast(beta[token + i, head + j], "float32"), 0.0
                    )
                for i, j in T.Parallel(TOKENS, WIDTH):
                    tail[i, j] = T.exp(-T.abs(x[i, j]))
                for i, j in T.Parallel(TOKENS, WIDTH):
                    dx[i, j] *= beta_factor * tail[i, j] / ((1.0 + tail[i, j]) * (1.0 + tail[i, j]))
            for i, j in T.Parallel(TOKENS, WIDTH):
                if token + i < tokens and head + j < heads:
                    dbeta_raw[token + i, head + j] = dx[i, j]
            if gate:
                for i, j in T.Parallel(PARTS, WIDTH):
                    dA_part[i, j] = 0.0
                for i, j in T.Parallel(PARTS, WIDTH):
                    dt_part[i, j] = 0.0
                for step in T.serial(TOKENS // PARTS):
                    for i, j in T.Parallel(PARTS, WIDTH):
                        dA_part[i, j] += dA_s[step * PARTS + i, j]
                    for i, j in T.Parallel(PARTS, WIDTH):
                        dt_part[i, j] += dt_s[step * PARTS + i, j]
                for i, j in T.Parallel(PARTS, WIDTH):
                    dA_s[i, j] = dA_part[i, j]
                for i, j in T.Parallel(PARTS, WIDTH):
                    dt_s[i, j] = dt_part[i, j]
                for j in T.Parallel(WIDTH):
                    if head + j < heads:
                        sums[0, block, head + j] = sum_of_parts(dA_s, j)
                        sums[1, block, head + j] = sum_of_parts(dt_s, j)

    return gate_gradients


def sum_of_parts(parts, j):
    total = parts[0, j]
    for i in range(1, PARTS):
        total = total + parts[i, j]
    return total
