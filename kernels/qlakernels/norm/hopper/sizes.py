"""Sizes that kernels and the operator agree on."""

THREADS = 128  # of a block
PIECE = 8  # elements of a row that a thread has, 16 bytes: what an access moves
LANES = {64: 8, 96: 16, 128: 16, 192: 32, 256: 32}  # neighbouring threads that share a row of D elements
BATCH = {"forward": 4, "backward": 2}  # tokens that are loaded ahead
BLOCKS = {"forward": 7, "backward": 4}  # of a multiprocessor
