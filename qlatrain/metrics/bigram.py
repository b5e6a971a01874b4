"""A bigram model over bytes: what a model's bits per byte must beat to have learnt more than byte pairs.

Smoothing is Witten and Bell's (IEEE Trans. Information Theory 37(4), 1991): the chance of a byte b after a context a is
(count(a, b) + T(a) · p(b)) / (count(a) + T(a)), T(a) the number of different bytes seen after a, and p(b) the add-one
smoothed frequency of b. It has nothing to tune and gives no byte a chance of zero.
"""

from collections.abc import Iterable, Iterator

import numpy as np

START = 256  # the context of a document's first byte
_BLOCK = 1 << 22  # bytes counted at once


class BigramByteModel:
    """Byte-pair statistics of a set of documents.

    Every byte of a document is predicted, the first from a start context; no byte is predicted across the border of
    two documents, and the end of a document is not predicted.
    """

    def __init__(self, documents: Iterable[str]):
        """Counts the UTF-8 bytes of the documents. Raises `ValueError` when they hold none."""
        self.counts = pair_counts(documents)  # [257, 256] int64: context, byte
        if not self.counts.any():
            raise ValueError("the documents to fit the bigram baseline on hold no bytes; give it training text")
        unigram = self.counts.sum(axis=0) + 1.0
        unigram /= unigram.sum()
        seen = (self.counts > 0).sum(axis=1, keepdims=True)
        # a context never seen falls back to the byte frequencies alone
        seen[seen == 0] = 1
        self.probabilities = (self.counts + seen * unigram) / (self.counts.sum(axis=1, keepdims=True) + seen)

    def bits_per_byte(self, documents: Iterable[str]) -> float:
        """Mean of -log₂ p over all UTF-8 bytes of the documents. Raises `ValueError` when they hold none."""
        counts = pair_counts(documents)
        if not counts.any():
            raise ValueError("the documents to evaluate the bigram baseline on hold no bytes")
        return float(-(counts * np.log2(self.probabilities)).sum() / counts.sum())


def pair_counts(documents: Iterable[str]) -> np.ndarray:
    """How often each byte follows each context: [257, 256] int64, row `START` for the first byte of a document."""
    counts = np.zeros(257 * 256, dtype=np.int64)
    for data, starts in _blocks(documents):
        context = np.empty(len(data), dtype=np.int32)
        context[1:] = data[:-1]
        context[starts] = START
        # bincount over pair codes: np.add.at does the same an order of magnitude slower
        counts += np.bincount(context * 256 + data, minlength=257 * 256)
    return counts.reshape(257, 256)


def _blocks(documents: Iterable[str]) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Whole documents joined to blocks: `(bytes uint8, offsets at which documents begin)`, no block empty.

    Joined, because a count table for each short document would cost more than the counting.
    """
    pieces, starts, size = [], [], 0
    for document in documents:
        if not document:
            continue
        starts.append(size)
        pieces.append(document.encode("utf-8", errors="replace"))
        size += len(pieces[-1])
        if size >= _BLOCK:
            yield np.frombuffer(b"".join(pieces), dtype=np.uint8), starts
            pieces, starts, size = [], [], 0
    if size:
        yield np.frombuffer(b"".join(pieces), dtype=np.uint8), starts
