"""Sizes that the kernel and the operator agree on."""

THREADS = 128  # of a block
PIECE = 4  # neighbouring elements that an access moves: 16 bytes of float32, 8 of the cast
AHEAD = 2  # pieces of a thread, loaded before the first of them is used
BLOCKS = 8  # of a multiprocessor
