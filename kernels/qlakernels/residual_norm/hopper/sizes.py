"""Sizes that kernels and the operator agree on; all follow from D, the elements of a row.

There are three passes: `add` and `norm` are the forward with and without a delta, `backward` is the other one.
"""

PIECE = 8  # neighbouring elements of a row that a thread has, 16 bytes: what an access moves
MAX_DIM = 8192
WARP = 32
LEAST_THREADS = 128  # of a block
THREADS = {"add": 768, "norm": 1024, "backward": 512}  # of a multiprocessor, unless one block alone has more
MULTIPROCESSORS = 132  # of an H100


def lanes_of(dim: int) -> int:
    """Neighbouring threads that share a row: a power of two of them in one warp, or whole warps."""
    pieces = -(-dim // PIECE)
    return -(-pieces // WARP) * WARP if pieces > WARP else 1 << (pieces - 1).bit_length()


def abreast_of(dim: int) -> int:
    """Rows that a block has side by side."""
    return -(-LEAST_THREADS // lanes_of(dim))


def threads_of(dim: int) -> int:
    """Threads of a block."""
    return lanes_of(dim) * abreast_of(dim)


def blocks_of(name: str, dim: int) -> int:
    """Blocks of a multiprocessor."""
    return max(1, THREADS[name] // threads_of(dim))


def batch_of(name: str, dim: int) -> int:
    """Rows of a thread that are loaded together, as many as its registers take."""
    if name == "backward":
        return 2 if threads_of(dim) <= THREADS[name] else 1
    return 2 if name == "add" and threads_of(dim) > THREADS[name] else 4
