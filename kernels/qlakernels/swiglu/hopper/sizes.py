"""Sizes that kernels and the operator agree on."""

THREADS = 128  # of a block
PIECE = 8  # elements that a thread takes of a token, 16 bytes
ROWS = 4  # tokens of a thread, all loaded before the first is used
