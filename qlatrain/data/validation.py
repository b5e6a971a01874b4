"""Held-out documents: the same rows at every evaluation, and what turns their loss into bits per byte."""

from collections.abc import Iterator

from qlatrain.data.formats import Format
from qlatrain.data.order import IndexedOrder, StreamedOrder
from qlatrain.data.packing import IGNORE_INDEX, Counts, PackedBatch, Row
from qlatrain.data.stream import bounded


class ValidationSet:
    """The documents that training never sees, in a fixed order, cut after a number of rows."""

    def __init__(self, order: IndexedOrder | StreamedOrder, form: Format):
        self._order = order
        self._format = form
        self._packed: tuple[int, list[Row], int] | None = None

    def batches(self, rows: int, micro_rows: int, rank: int = 0, world_size: int = 1) -> list[PackedBatch]:
        """The first `rows` rows of held-out documents, or all when there are fewer; the part of process `rank`.

        Every process gets the same number of batches, of `micro_rows` rows or, at the end, fewer: the last row may
        be shorter than the others, and a process for which no row is left gets one row without targets. So sum
        losses and `num_targets` over all batches and processes, then divide.

        Raises:
            ValueError: rows or micro_rows is below 1, or no document with text is held out.
        """
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        if rows < 1 or micro_rows < 1:
            raise ValueError(f"validation.rows={rows} and train.micro_batch_size={micro_rows} must both be 1 or more.")
        packed, _ = self._pack(rows)
        result = []
        for step in range(0, len(packed), micro_rows * world_size):
            first = step + micro_rows * rank
            result.append(PackedBatch.from_rows(packed[first : first + micro_rows] or [self._format.padding()]))
        return result

    def bytes_per_token(self, rows: int) -> float:
        """UTF-8 bytes of the targets in those rows over their number: bits per byte = nll / ln 2 / bytes_per_token.

        nll is the mean negative log-likelihood of a target, in nats.
        """
        packed, text_bytes = self._pack(rows)
        targets = sum(int((row.labels != IGNORE_INDEX).sum()) for row in packed)
        if targets == 0:
            raise ValueError("The held-out documents have no token to predict: each is one token; use longer ones.")
        return text_bytes / targets

    def counts(self, rows: int) -> Counts:
        """What became of the held-out conversations on their way into those rows."""
        packed, _ = self._pack(rows)
        return sum((row.counts for row in packed), Counts())

    def documents(self, max_bytes: int | None = None) -> Iterator[str]:
        """The text of the held-out documents once, in the same order: at most `max_bytes` UTF-8 bytes when given."""
        return bounded(map(self._format.text, self._order.validation_documents()), max_bytes)

    def _pack(self, rows: int) -> tuple[list[Row], int]:
        """(rows, UTF-8 bytes of their targets). Kept, as every evaluation asks for the same."""
        if self._packed is None or self._packed[0] != rows:
            packed, text_bytes = self._format.validation_rows(self._order.validation_documents(), rows)
            if not packed:
                raise ValueError(
                    "No document with text is held out; raise data.validation_fraction, or set it to 0 to train "
                    "without validation."
                )
            self._packed = rows, packed, text_bytes
        return self._packed[1:]
