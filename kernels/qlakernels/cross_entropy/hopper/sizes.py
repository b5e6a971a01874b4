"""What the kernel and its callers agree on."""

THREADS = 512  # of a block, which has a row
PIECE = 8  # neighbouring elements that an access moves, 16 bytes
AHEAD = 8  # pieces of a thread, loaded before the first of them is used
BLOCKS = 2  # of a multiprocessor
IGNORED = -100  # the label of a row that has none
