"""Sizes that kernels and the operator agree on."""

CHUNK = 64  # tokens
STATE_STRIDE = 256  # tokens between the states that the forward keeps for the backward
VECTORS = 12  # of a chunk, in what is prepared ahead of a scan
PART = 64  # columns of V that the gradients' kernel takes at once
PIECE = 8  # elements of 16 bits in what is copied at once; steps of what is written are multiples of it
GATE_TOKENS = 64  # that a block of the gates' gradients sums up


def value_parts(value_dim: int) -> int:
    """Parts of V in the gradients' kernel."""
    return -(-value_dim // PART)


def padded_values(value_dim: int) -> int:
    """Columns of V in its tiles: a whole number of parts, 1, 2 or, in the kernel for many values, more."""
    return PART * value_parts(value_dim)
