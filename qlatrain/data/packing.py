"""Tokenised documents to packed rows, and rows to the batch a model takes.

Several documents are open side by side and give rows in turn, so that neighbouring rows are of different ones: a
batch cut from one long document has a noisy gradient. A document cut by the end of a row goes on in a later row as a
segment of its own: state and positions begin again there. Labels look one token past the end of the row, so every
token of a document but its first is predicted exactly once, whatever the row length.

N = rows × sequence_length tokens; D = segments.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import torch

IGNORE_INDEX = -100  # a label that is no target, as in torch's cross_entropy


@dataclass(frozen=True)
class Position:
    """A token of the corpus: token `offset` of a document."""

    epoch: int = 0
    block: int = 0  # streamed sources: the block of `shuffle_block` documents; else 0
    document: int = 0  # in the order of the epoch, or of the block
    offset: int = 0  # tokens, of the document with its bos
    source_state: dict | None = None  # streamed sources: where the block begins


@dataclass(frozen=True)
class StreamPosition:
    """Where packing stands: the document that is opened next, and the open ones, the one whose row comes next first."""

    following: Position  # offset 0
    # Their next tokens; None takes the following document when its row comes. Of conversations, those in the window.
    opened: tuple[Position | None, ...]

    @classmethod
    def beginning(cls, interleave: int) -> "StreamPosition":
        return cls(Position(), (None,) * interleave)


@dataclass(frozen=True)
class Document:
    position: Position  # of its first token
    tokens: np.ndarray  # int32 [length], length >= 1


@dataclass(frozen=True)
class Counts:
    """What became of conversations on their way into rows; of text, which is neither padded nor left out, all zero."""

    packed: int = 0  # conversations in rows, the cut ones too
    cut: int = 0  # at the end of the row, being longer
    dropped: int = 0  # in no row
    tokens: int = 0  # in rows
    targets: int = 0  # of those
    padding: int = 0  # tokens that fill rows

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    @property
    def fill(self) -> float:
        """The part of the rows that is not padding."""
        return self.tokens / max(self.tokens + self.padding, 1)


@dataclass(frozen=True)
class Row:
    input_ids: np.ndarray  # int32 [length]
    labels: np.ndarray  # int32 [length]
    segments: list[int]  # lengths, they add up to length
    end: StreamPosition  # after this row
    counts: Counts = Counts()  # since the row before


@dataclass(frozen=True)
class PackedBatch:
    """Rows in one packed sequence, and all that layers need to know of its boundaries."""

    input_ids: torch.Tensor  # int64 [1, N]
    labels: torch.Tensor  # int64 [1, N]; the next token of the same document, or -100
    position_ids: torch.Tensor  # int64 [1, N]; from 0 in each segment
    cu_seqlens: torch.Tensor  # int32 [D + 1]; segment d is tokens cu_seqlens[d] to cu_seqlens[d + 1]
    cu_seqlens_cpu: torch.Tensor  # the same, always on the CPU
    max_seqlen: int  # tokens of the longest segment
    num_targets: int  # labels that are not -100; on the host, so that nobody waits for the device to count them

    @classmethod
    def from_rows(cls, rows: list[Row]) -> "PackedBatch":
        assert rows, "a batch needs at least one row"
        lengths = np.concatenate([row.segments for row in rows]).astype(np.int64)
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        input_ids = np.concatenate([row.input_ids for row in rows]).astype(np.int64)
        labels = np.concatenate([row.labels for row in rows]).astype(np.int64)
        position_ids = np.arange(len(input_ids)) - np.repeat(cu_seqlens[:-1].astype(np.int64), lengths)
        boundaries = torch.from_numpy(cu_seqlens)
        return cls(
            input_ids=torch.from_numpy(input_ids)[None],
            labels=torch.from_numpy(labels)[None],
            position_ids=torch.from_numpy(position_ids)[None],
            cu_seqlens=boundaries,
            cu_seqlens_cpu=boundaries,
            max_seqlen=int(lengths.max()),
            num_targets=int((labels != IGNORE_INDEX).sum()),
        )

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on `device`. To CUDA through pinned memory, without waiting for the copies."""
        device = torch.device(device)

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if device.type == "cuda" and tensor.device.type == "cpu":
                return tensor.pin_memory().to(device, non_blocking=True)
            return tensor.to(device)

        return replace(
            self,
            input_ids=move(self.input_ids),
            labels=move(self.labels),
            position_ids=move(self.position_ids),
            cu_seqlens=move(self.cu_seqlens),
        )


class Packer:
    """Rows of `sequence_length` tokens from documents in order; at the end of the documents shorter ones.

    Args:
        documents: the first is the one at `start.following`. Taken one at a time, and only when needed.
        sequence_length: tokens a row.
        start: where the first row begins; as many documents are open side by side as it has places for.
        opened: the documents of `start.opened`; None where it has None.

    Raises:
        ValueError: a document of `start` has fewer tokens than it says.
    """

    def __init__(
        self,
        documents: Iterable[Document],
        sequence_length: int,
        start: StreamPosition,
        opened: Sequence[Document | None] = (),
    ):
        self._documents = iter(documents)
        self._sequence_length = sequence_length
        self._following = start.following
        self._open: deque[_OpenDocument | None] = deque(
            None if at is None else _OpenDocument(document, at.offset)
            for at, document in zip(start.opened, opened or [None] * len(start.opened), strict=True)
        )

    def __iter__(self) -> Iterator[Row]:
        while (row := self.next_row()) is not None:
            yield row

    @property
    def position(self) -> StreamPosition:
        return StreamPosition(self._following, tuple(document and document.position for document in self._open))

    def next_row(self) -> Row | None:
        """The next row, or None when the documents have ended."""
        for _ in range(len(self._open)):
            input_ids, labels, segments = self._fill_row()
            self._open.rotate(-1)
            if segments:
                return Row(input_ids, labels, segments, self.position)
        return None

    def _fill_row(self) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """A row's ids, labels and segments from the first open document and, as they end, those in its place."""
        input_ids = np.empty(self._sequence_length, dtype=np.int32)
        labels = np.empty(self._sequence_length, dtype=np.int32)
        segments: list[int] = []
        filled = 0
        while filled < self._sequence_length:
            current = self._open[0] = self._open[0] or self._open_next()
            if current is None:
                break
            tokens, offset = current.tokens, current.offset
            size = min(self._sequence_length - filled, len(tokens) - offset)
            input_ids[filled : filled + size] = tokens[offset : offset + size]
            targets = tokens[offset + 1 : offset + size + 1]
            labels[filled : filled + len(targets)] = targets
            labels[filled + len(targets) : filled + size] = IGNORE_INDEX  # the document's last token, if it is here
            segments.append(size)
            filled += size
            current.offset += size
            if current.offset == len(tokens):
                self._open[0] = None
        return input_ids[:filled], labels[:filled], segments

    def _open_next(self) -> "_OpenDocument | None":
        document = next(self._documents, None)
        if document is None:
            return None
        self._following = replace(document.position, document=document.position.document + 1)
        return _OpenDocument(document, 0)


class _OpenDocument:
    """A document and the token of it that comes next."""

    def __init__(self, document: Document, offset: int):
        if offset >= len(document.tokens):
            raise not_there(replace(document.position, offset=offset))
        self.tokens = document.tokens
        self.offset = offset
        self._start = document.position

    @property
    def position(self) -> Position:
        return replace(self._start, offset=self.offset)


def not_there(position: Position) -> ValueError:
    """What to raise when the corpus does not reach to a saved position."""
    return ValueError(
        f"The data position to resume from is token {position.offset} of document {position.document} in epoch "
        f"{position.epoch}, which is not there: the corpus has changed since the checkpoint. Restore "
        "it, or start with resume=never."
    )
