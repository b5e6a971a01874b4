"""Which documents are held out, and in what order the others come: functions of (seed, index, epoch) alone.

Every choice is made by one hash rather than a random generator, so it is the same on every process, for every
number of workers and in every version of numpy, and any epoch or block can be entered without the ones before.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np

from qlatrain.data.conversations import TextOrConversation
from qlatrain.data.packing import Position, not_there
from qlatrain.data.sources import DocumentReader, DocumentSource, DocumentStream

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the increment of splitmix64
SPLIT, ORDER = 0, 1  # what a hash is for; keeps the held-out choice independent of the order of training


def hash64(indices: np.ndarray, *keys: int) -> np.ndarray:
    """A uniform uint64 for each index: its place in the splitmix64 sequence seeded by `keys` (Steele et al. 2014)."""
    # The keys are mixed before the index comes in: added to it, seed 1 would be seed 0 moved on by one document.
    seed = np.zeros(1, dtype=np.uint64)
    for key in keys:
        seed = _mix(seed + np.uint64(key % 2**64) + np.uint64(GOLDEN))
    return _mix(seed + (indices.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN))


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64; uint64 arithmetic that wraps."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def permutation(size: int, *keys: int) -> np.ndarray:
    """0..size - 1 in the order of their hashes, int64 [size]."""
    return np.argsort(hash64(np.arange(size), *keys), kind="stable")


class IndexedOrder:
    """Order and split of a source read by index.

    round(fraction · documents) are held out, at least one, and at least one is left. An epoch is a permutation of
    the rest by (seed, epoch), or, without `shuffle`, the rest in their own order. Holds 16 bytes a document in memory.

    Raises:
        ValueError: there is one document and part of it should be held out.
    """

    def __init__(self, source: DocumentSource, seed: int, validation_fraction: float, shuffle: bool):
        self._source = source
        self._seed = seed
        self._shuffle = shuffle
        count = len(source)
        held_out = 0
        if validation_fraction > 0:
            if count < 2:
                raise ValueError(
                    f"data.validation_fraction={validation_fraction} needs at least 2 documents, and there is {count}; "
                    "split it into several, or set data.validation_fraction=0."
                )
            held_out = min(max(round(validation_fraction * count), 1), count - 1)
        shuffled = permutation(count, seed, SPLIT)
        self.validation_indices = shuffled[:held_out]
        self.train_indices = np.sort(shuffled[held_out:])
        self.description = {**source.description, "documents": count, "seed": seed, "shuffle": shuffle}
        self.description["validation_fraction"] = validation_fraction

    def walk(self, start: Position) -> Iterator[tuple[Position, Callable[[], TextOrConversation]]]:
        """Endless: from the document at `start` on, each document's position and a function that reads it."""
        epoch, first = start.epoch, start.document
        while True:
            order = self.epoch_order(epoch)
            for document in range(first, len(order)):
                position = Position(epoch=epoch, document=document)
                yield position, partial(self._source.__getitem__, int(order[document]))
            epoch, first = epoch + 1, 0

    def documents_at(self, positions: Iterable[Position]) -> list[TextOrConversation]:
        """The documents at `positions`.

        Raises:
            ValueError: the corpus has no such document.
        """
        orders: dict[int, np.ndarray] = {}
        return [self._document_at(position, orders) for position in positions]

    def _document_at(self, position: Position, orders: dict[int, np.ndarray]) -> TextOrConversation:
        if position.epoch not in orders:
            orders[position.epoch] = self.epoch_order(position.epoch)
        order = orders[position.epoch]
        if position.document >= len(order):
            raise not_there(position)
        return self._source[int(order[position.document])]

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Indices of the training documents in the order of `epoch`, int64."""
        if not self._shuffle:
            return self.train_indices
        return self.train_indices[permutation(len(self.train_indices), self._seed, ORDER, epoch)]

    def train_documents(self) -> Iterator[TextOrConversation]:
        """Every training document once, in a fixed mixed order, so that a beginning of it is a fair sample."""
        mixed = self.train_indices[permutation(len(self.train_indices), self._seed, SPLIT)]
        return (self._source[int(index)] for index in mixed)

    def validation_documents(self) -> Iterator[TextOrConversation]:
        """Every held-out document once, in a fixed mixed order."""
        return (self._source[int(index)] for index in self.validation_indices)


class StreamedOrder:
    """Order and split of a source that can only be read from front to back.

    A document is held out when the hash of (seed, index) falls below the fraction. The others are permuted within
    blocks of `shuffle_block` documents read, by (seed, epoch, block). While a block is given out the next is read,
    one document for each given, so that reading is spread evenly; up to two blocks of documents are in memory.
    """

    def __init__(
        self, source: DocumentStream, seed: int, validation_fraction: float, shuffle: bool, shuffle_block: int
    ):
        self._source = source
        self._seed = seed
        self._fraction = validation_fraction
        self._shuffle = shuffle
        self._block_size = shuffle_block
        self.description = {**source.description, "seed": seed, "validation_fraction": validation_fraction}
        self.description |= {"shuffle": shuffle, "shuffle_block": shuffle_block}

    def walk(self, start: Position) -> Iterator[tuple[Position, Callable[[], TextOrConversation]]]:
        """As `IndexedOrder.walk`; reading happens in the thread that takes the items."""
        block = _Block(self, self._source.open(start.source_state), start.epoch, start.block)
        block.read_rest()
        first = start.document
        while True:
            following = block.following()
            for place, document in enumerate(block.in_order()[first:], first):
                following.read_one()
                position = Position(block.epoch, block.number, place, source_state=block.state)
                yield position, partial(_given, document)
            following.read_rest()
            block, first = following, 0

    def documents_at(self, positions: Iterable[Position]) -> list[TextOrConversation]:
        """As `IndexedOrder.documents_at`; reads through each block that a position is in."""
        blocks: dict[tuple[int, int], list[TextOrConversation]] = {}
        return [self._document_at(position, blocks) for position in positions]

    def _document_at(
        self, position: Position, blocks: dict[tuple[int, int], list[TextOrConversation]]
    ) -> TextOrConversation:
        key = position.epoch, position.block
        if key not in blocks:
            block = _Block(self, self._source.open(position.source_state), *key)
            block.read_rest()
            blocks[key] = block.in_order()
        if position.document >= len(blocks[key]):
            raise not_there(position)
        return blocks[key][position.document]

    def held_out(self, indices: np.ndarray) -> np.ndarray:
        """bool [indices]: which documents are validation's."""
        return hash64(indices, self._seed, SPLIT).astype(np.float64) < self._fraction * 2.0**64

    def train_documents(self) -> Iterator[TextOrConversation]:
        """Every training document once, as they come."""
        return self._documents(held_out=False)

    def validation_documents(self) -> Iterator[TextOrConversation]:
        """Every held-out document once, as they come. Reads through the others to find them."""
        return self._documents(held_out=True)

    def _documents(self, held_out: bool) -> Iterator[TextOrConversation]:
        reader = self._source.open()
        index = 0
        while True:
            for held in self.held_out(np.arange(index, index + 1024)):
                document = reader.read()
                if document is None:
                    return
                if held == held_out:
                    yield document
            index += 1024


def _given(document: TextOrConversation) -> TextOrConversation:
    return document


class _Block:
    """The training documents among `shuffle_block` documents of one epoch."""

    def __init__(self, order: StreamedOrder, reader: DocumentReader, epoch: int, number: int):
        self.epoch = epoch
        self.number = number
        self.state = reader.state()
        self.documents: list[TextOrConversation] = []
        self._order = order
        self._reader = reader
        self._read = 0
        self._ended = False  # with it the epoch
        first = number * order._block_size
        self._held_out = order.held_out(np.arange(first, first + order._block_size))

    def read_one(self) -> bool:
        """Read one document more; False when the block is complete."""
        if self._ended or self._read == len(self._held_out):
            return False
        document = self._reader.read()
        if document is None:
            self._ended = True
            return False
        if not self._held_out[self._read]:
            self.documents.append(document)
        self._read += 1
        return True

    def read_rest(self) -> None:
        while self.read_one():
            pass

    def in_order(self) -> list[TextOrConversation]:
        """The documents as they are given out; the block must have been read."""
        if not self._order._shuffle:
            return self.documents
        order = permutation(len(self.documents), self._order._seed, ORDER, self.epoch, self.number)
        return [self.documents[i] for i in order]

    def following(self) -> "_Block":
        if self._ended:
            return _Block(self._order, self._order._source.open(), self.epoch + 1, 0)
        return _Block(self._order, self._reader, self.epoch, self.number + 1)
