"""What the kernels of the short convolution share: a thread marches over a stretch of tokens with a few channels.

    p_t = Σ_s w_s ∘ x_{t−s},  s = 0 … min(W − 1, reach_t)

w_s is column W − 1 − s of the weight, reach_t the tokens in front of t that belong to its document: no more than its
place in its row, and than its position where positions are given. Neighbouring threads take neighbouring channels, C
each, so a warp moves 64 C bytes of a token. Nothing is shared among threads: the last W − 1 tokens stay in registers as
float32, `window`, and only where a stretch begins are they read a second time.

Loads are issued for a batch of tokens before the first of them is used. That is what hides the memory: up to 48 KB
a multiprocessor are on their way.

x comes as one row of numbers with the step between its tokens in units of C, so that the compiler knows every address
for a multiple of what a load takes, and any slice of a projection is read where it lies. Places are carried from token
to token: worked out from the token they cost a register pair for each of a batch.
"""

import tilelang.language as T


@T.macro
def load_weights(weight, group, raw, weights):
    """weights [W, C] ← w_s in float32; weight [groups, C W], raw a local [C W] of its dtype."""
    for i in T.unroll(weights.shape[0]):
        for j in T.vectorized(weights.shape[1]):
            raw[i * weights.shape[1] + j] = weight[group, i * weights.shape[1] + j]
    for s in T.unroll(weights.shape[0]):
        for j in T.unroll(weights.shape[1]):
            weights[s, j] = T.cast(raw[j * weights.shape[0] + weights.shape[0] - 1 - s], "float32")


@T.macro
def load(x, at, row):
    """row [C] ← the channels that begin at `at`, counted in C"""
    for j in T.vectorized(row.shape[0]):
        row[j] = x[at * row.shape[0] + j]


@T.macro
def load_ahead(x, at, rows, i):
    """rows [batch, C]: row i ← the channels that begin at at[0]"""
    for j in T.vectorized(rows.shape[1]):
        rows[i, j] = x[at[0] * rows.shape[1] + j]


@T.macro
def open_window(x, at, step, first, row, window):
    """window [W, C] ← as if the token in front of `first`, which lies at at[0], had just been taken. row: local [C]."""
    for s in T.unroll(window.shape[0] - 1):
        if first > s:
            load(x, at[0] - (s + 1) * step, row)
            for j in T.unroll(window.shape[1]):
                window[s, j] = T.cast(row[j], "float32")


@T.macro
def load_reach(positions, positioned, token, place, row_length, reach, i):
    """reach [batch]: i ← how many tokens in front of this one are its document's; `positioned`: positions are given.
    place is a local [1]: the token's place in its row, and then that of the next."""
    reach[i] = place[0]
    if positioned > 0:
        reach[i] = T.min(reach[i], T.cast(positions[token], "int32"))
    place[0] = T.if_then_else(place[0] + 1 == row_length, 0, place[0] + 1)


@T.macro
def take(rows, i, window):
    """window[0] ← row i, behind those that were there"""
    push(window)
    for j in T.unroll(window.shape[1]):
        window[0, j] = T.cast(rows[i, j], "float32")


@T.macro
def push(window):
    """window[s] ← window[s − 1] for s = 1, 2, …"""
    for s in T.unroll(window.shape[0] - 1):
        for j in T.unroll(window.shape[1]):
            window[window.shape[0] - 1 - s, j] = window[window.shape[0] - 2 - s, j]


@T.macro
def convolve(window, weights, reach, i, p):
    """p [C] ← p_t of the token that was taken last"""
    for j in T.unroll(window.shape[1]):
        p[j] = weights[0, j] * window[0, j]
    for s in T.unroll(1, window.shape[0]):
        if reach[i] >= s:
            for j in T.unroll(window.shape[1]):
                p[j] += weights[s, j] * window[s, j]


def sigmoid(x):
    return 1.0 / (1.0 + T.exp(-x))
