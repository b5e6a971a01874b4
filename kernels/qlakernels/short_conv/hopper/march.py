"""What the kernels of the short convolution share: a thread marches over a stretch of tokens with a few channels.

    p_t = Σ_s w_s ∘ x_{t−s},  s = 0 … min(W − 1, reach_t)

w_s is column W − 1 − s of the weight, reach_t the tokens in front of t that belong to its document: no more than its
place in its row, and than its position where positions are given. Neighbouring threads take neighbouring channels, C
each, so a warp moves 64 C bytes of a token. Nothing is shared among threads: the last W − 1 tokens stay in registers as
float32, `window`, and only where a stretch begins are they read a second time.

Tokens come in batches. A turn widens the batch that has arrived, issues the loads of the next one into the registers
that this leaves, and computes while they are on their way: 32 KB a multiprocessor forward, 24 KB backward, in a turn of
4900 and 2800 cycles at 3.0 TB/s. What a stretch begins with, the tokens in front of it, its first batch and the
weights, is asked for at once. The loop holds one batch: of two, the compiler puts the loads of both behind what it
computes for the first, and nothing is on its way meanwhile.

x comes as one row of numbers with the step between its tokens in units of C, so that the compiler knows every address
for a multiple of what a load takes, and any slice of a projection is read where it lies. Places are carried from token
to token, past the end as well: worked out from the token they cost more instructions and registers.
"""

import tilelang.language as T

FAR = 2**31 - 1  # a position that leaves the reach to the place


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
def load_row(x, at, rows, i):
    """rows [batch, C]: row i ← the channels that begin at `at`, counted in C"""
    for j in T.vectorized(rows.shape[1]):
        rows[i, j] = x[at * rows.shape[1] + j]


@T.macro
def load_before(x, x_step, group, first, rows):
    """rows [W − 1, C]: row s ← the channels of token first − 1 − s, or of the first token, which nobody will look at"""
    for s in T.unroll(rows.shape[0]):
        load_row(x, T.cast(T.max(first - 1 - s, 0), "int64") * x_step + group, rows, s)


@T.macro
def load_given(positions, positioned, token, end, given):
    """given [batch] ← the positions of the tokens from this one on, in front of `end`, where positions are given"""
    if positioned > 0:
        for i in T.unroll(given.shape[0]):
            if token + i < end:
                given[i] = positions[token + i]


@T.macro
def take_reaches(given, place, row_length, reach):
    """reach [batch] ← how many tokens in front of each are its document's; given [batch]: their positions. place [1]:
    that of the first of them in its row, and then that of the token behind them."""
    for i in T.unroll(reach.shape[0]):
        reach[i] = T.min(place[0], T.cast(given[i], "int32"))
        place[0] = T.if_then_else(place[0] + 1 == row_length, 0, place[0] + 1)


@T.macro
def widen(rows, values):
    """The first rows of values ← rows [n, C] in float32: a batch; or, of a window, what `load_before` has loaded, as if
    it had just been taken."""
    for i in T.unroll(rows.shape[0]):
        for j in T.unroll(rows.shape[1]):
            values[i, j] = value_of(rows, i, j)


@T.macro
def take(values, i, window):
    """window[0] ← row i, behind those that were there"""
    push(window)
    for j in T.unroll(window.shape[1]):
        window[0, j] = values[i, j]


def value_of(rows, i, j):
    """rows[i, j] in float32. Two of bfloat16 are widened in an instruction each; the compiler's own way takes three."""
    if rows.dtype != "bfloat16":
        return T.cast(rows[i, j], "float32")
    pairs = T.view(rows, (rows.shape[0], rows.shape[1] // 2), "uint32")
    pair = pairs[i, j // 2]
    return T.reinterpret(T.if_then_else(j % 2 == 0, pair << 16, pair & T.uint32(0xFFFF0000)), "float32")


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
