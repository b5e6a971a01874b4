"""Sizes that kernels and the operator agree on."""

CHUNK = 64  # tokens
STATE_STRIDE = 256  # tokens between the states that the forward keeps for the backward
VECTORS = 12  # of a chunk, in what is prepared ahead of a scan
PART = 64  # columns of V in the gradients' kernel
PIECE = 8  # elements of 16 bits in what is copied at once; steps of what is written are multiples of it
GATE_TOKENS = 64  # that a block of the gates' gradients sums up


def padded_values(value_dim: int) -> int:
    """Columns of V in the gradients' tiles, taken together."""
    return -(-value_dim // PART) * PART


def values_at_once(value_dim: int) -> int:
    """Columns of V that the gradients' kernel takes at once: all of up to 128, parts of more."""
    return padded_values(value_dim) if value_dim <= 2 * PART else PART
