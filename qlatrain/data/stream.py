"""The training stream: one endless sequence of rows, the same for every process, and the position in it.

The global batch of a step is the next `global_rows` rows of that sequence, and each process takes its slice of
them, so what is learned in a step does not depend on how many processes share it. Every process tokenises the
whole batch; that is cheap beside the model, and it is what makes a position valid for any number of processes.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace

from qlatrain.data.conversation_packing import TokenisedConversation
from qlatrain.data.conversations import TextOrConversation
from qlatrain.data.formats import Format, is_empty
from qlatrain.data.order import IndexedOrder, StreamedOrder
from qlatrain.data.packing import Counts, Document, PackedBatch, Position, Row, StreamPosition

IN_FLIGHT = 4  # documents a worker may be ahead; with one global batch of rows, all that is held read


class TrainStream:
    """Endless batches of training documents.

    With `workers` threads documents are read and tokenised ahead, and the next global batch is packed while the
    model works on the last; with 0 all happens in `next_global_batch`. The rows are the same. Use it in a `with`
    statement or call `close`.

    Raises:
        ValueError: the training documents give no row.
    """

    def __init__(self, order: IndexedOrder | StreamedOrder, form: Format, workers: int):
        self._order = order
        self._format = form
        form.check(order.train_documents())
        self._workers = workers
        self._readers = ThreadPoolExecutor(workers, "qlatrain-read") if workers else None
        self._packing = ThreadPoolExecutor(1, "qlatrain-pack") if workers else None
        self._filling: Future | None = None
        self._stopping = False  # tells the packing thread to leave off
        self._counts = Counts()
        self._start(form.beginning)

    @property
    def counts(self) -> Counts:
        """Of the rows handed out since the beginning, over all processes; a resumed stream counts on."""
        return self._counts

    def next_global_batch(
        self, global_rows: int, rank: int = 0, world_size: int = 1, micro_rows: int | None = None
    ) -> list[PackedBatch]:
        """The next `global_rows` rows; of them the slice of process `rank`, in batches of `micro_rows`.

        Args:
            global_rows: rows of the step, over all processes.
            rank: this process, 0 <= rank < world_size.
            world_size: processes.
            micro_rows: rows a batch; all of the slice when None.

        Returns:
            global_rows / world_size / micro_rows batches on the CPU. Over ranks in order they hold all the rows,
            in order.

        Raises:
            ValueError: the rows cannot be divided so, or a document cannot be read.
        """
        assert not self._stopping, "the stream is closed"
        per_rank, micro_rows = divide_rows(global_rows, rank, world_size, micro_rows)
        self._wait()
        self._fill(global_rows)
        rows = [self._rows.popleft() for _ in range(global_rows)]
        self._position = rows[-1].end
        self._counts = sum((row.counts for row in rows), self._counts)
        if self._packing is not None:
            self._filling = self._packing.submit(self._fill, global_rows)
        first = rank * per_rank
        return [PackedBatch.from_rows(rows[at : at + micro_rows]) for at in range(first, first + per_rank, micro_rows)]

    def state_dict(self) -> dict:
        """The position after the last global batch handed out: JSON-able, its size independent of the data's."""
        return {**pack_position(self._position), "counts": asdict(self._counts), "corpus": self._corpus()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state`, to the same document and token, with any number of workers and processes.

        Raises:
            ValueError: the position was saved with another corpus, order or tokenizer.
        """
        saved, current = state["corpus"], self._corpus()
        changed = [
            f"{name} was {saved.get(name)!r} and is {current.get(name)!r}"
            for name in sorted({*saved, *current})
            if saved.get(name) != current.get(name)
        ]
        if changed:
            raise ValueError(
                f"The saved data position belongs to another corpus: {'; '.join(changed)}. Restore the data settings "
                "of the checkpoint, or start with resume=never."
            )
        self._halt()
        self._stopping = False
        self._counts = Counts(**state.get("counts", {}))  # checkpoints were written before there were any
        self._start(unpack_position(state))

    def documents(self, max_bytes: int | None = None) -> Iterator[str]:
        """The text of the training documents once, in a fixed order: at most `max_bytes` UTF-8 bytes when given."""
        return bounded(map(self._format.text, self._order.train_documents()), max_bytes)

    def close(self) -> None:
        """End the threads. Nothing can be read afterwards."""
        self._halt()
        for executor in (self._readers, self._packing):
            if executor is not None:
                executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "TrainStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _corpus(self) -> dict:
        """What the order of tokens depends on. Not the row length: a position is valid for rows of any length."""
        return {**self._order.description, **self._format.description}

    def _start(self, position: StreamPosition) -> None:
        self._position = position
        self._rows: deque[Row] = deque()
        places = [at for at in position.opened if at is not None]
        documents = iter(self._order.documents_at(places))
        opened = [at and self._format.tokenise(replace(at, offset=0), next(documents)) for at in position.opened]
        walk = self._order.walk(position.following)
        tokenised = in_order(self._tokenise, walk, self._readers, IN_FLIGHT * self._workers)
        self._packer = self._format.packer((one for one in tokenised if one is not None), position, opened)

    def _tokenise(
        self, item: tuple[Position, Callable[[], TextOrConversation]]
    ) -> Document | TokenisedConversation | None:
        position, read = item
        return self._format.tokenise(position, read())

    def _fill(self, count: int) -> None:
        """Have `count` rows ready. Runs in one thread at a time: the caller's, or the packing one's."""
        try:
            while len(self._rows) < count and not self._stopping:
                self._rows.append(self._packer.next_row())
        except BaseException:
            if not self._stopping:
                self._start(self._position)  # so that asking again meets the same error, not a gap
            raise

    def _wait(self) -> None:
        if self._filling is not None:
            filling, self._filling = self._filling, None
            filling.result()

    def _halt(self) -> None:
        """Stop reading ahead; what was read ahead is dropped."""
        self._stopping = True
        with suppress(Exception):  # an error in rows that nobody asked for
            self._wait()


def pack_position(position: StreamPosition) -> dict:
    """A position as JSON: a block, and with it the state of its source, is written once however many are in it."""
    blocks: list[dict] = []

    def place(at: Position) -> list[int]:
        block = {"epoch": at.epoch, "block": at.block, "source_state": at.source_state}
        if block not in blocks:
            blocks.append(block)
        return [blocks.index(block), at.document, at.offset]

    following, opened = place(position.following), [at and place(at) for at in position.opened]
    return {"blocks": blocks, "following": following, "opened": opened}


def unpack_position(state: dict) -> StreamPosition:
    """What `pack_position` made."""

    def position(place: list[int]) -> Position:
        block, document, offset = place
        return Position(**state["blocks"][block], document=document, offset=offset)

    return StreamPosition(position(state["following"]), tuple(place and position(place) for place in state["opened"]))


def divide_rows(global_rows: int, rank: int, world_size: int, micro_rows: int | None) -> tuple[int, int]:
    """(rows of a process, rows of a batch); ValueError when they do not divide."""
    assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
    per_rank = global_rows // world_size
    micro_rows = per_rank if micro_rows is None else micro_rows
    if global_rows < 1 or micro_rows < 1 or global_rows % (world_size * micro_rows):
        raise ValueError(
            f"train.global_batch_size={global_rows} is not a multiple of {world_size} processes × "
            f"train.micro_batch_size={micro_rows}; change one of them."
        )
    return per_rank, micro_rows


def in_order(function: Callable, items: Iterable, executor: ThreadPoolExecutor | None, in_flight: int) -> Iterator:
    """`map(function, items)`, up to `in_flight` calls ahead in `executor`; results in order, errors as raised."""
    if executor is None:
        yield from map(function, items)
        return
    pending: deque[Future] = deque()
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) >= in_flight:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def bounded(texts: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    """`texts` without the empty ones, cut after `max_bytes` UTF-8 bytes in all."""
    left = max_bytes
    for text in texts:
        if is_empty(text):
            continue
        if left is None:
            yield text
            continue
        content = text.encode("utf-8", errors="replace")
        if len(content) >= left:
            if cut := content[:left].decode("utf-8", errors="ignore"):
                yield cut
            return
        left -= len(content)
        yield text
