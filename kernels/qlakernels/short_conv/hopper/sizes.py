"""Sizes that kernels and the operator agree on."""

THREADS = 128  # of a block
CHANNELS = {"forward": 8, "backward": 4}  # of a thread, 16 and 8 bytes; eight would take the backward 128 registers
UPDATED = 4  # channels of a thread that takes one token
BLOCKS = {"forward": 4, "backward": 3}  # of a multiprocessor: 128 and 168 registers a thread
