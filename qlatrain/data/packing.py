"""Tokenised documents to packed rows, and rows to the batch a model takes.

The stream of documents is cut every `sequence_length` tokens. A document cut by the end of a row goes on in the
next row as a segment of its own: state and positions begin again there. Labels look one token past the end of the
row, so every token of a document but its first is predicted exactly once, whatever the row length.

N = rows × sequence_length tokens; D = segments.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

IGNORE_INDEX = -100  # a label that is no target, as in torch's cross_entropy


@dataclass(frozen=True)
class Position:
    """Where a walk over the documents stands: before token `offset` of a document."""

    epoch: int = 0
    block: int = 0  # streamed sources: the block of `shuffle_block` documents; else 0
    document: int = 0  # in the order of the epoch, or of the block
    offset: int = 0  # tokens, of the document with its bos
    source_state: dict | None = None  # streamed sources: where the block begins


@dataclass(frozen=True)
class Document:
    position: Position  # of its first token
    tokens: np.ndarray  # int32 [length], length >= 1


@dataclass(frozen=True)
class Row:
    input_ids: np.ndarray  # int32 [length]
    labels: np.ndarray  # int32 [length]
    segments: list[int]  # lengths, they add up to length
    end: Position  # of the token that comes after this row


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
    """Rows of `sequence_length` tokens from documents in order; at the end of the documents a shorter one.

    Args:
        documents: the first is the one that `start` stands in. Taken one at a time, and only when needed.
        sequence_length: tokens a row.
        start: where the first row begins.
    """

    def __init__(self, documents: Iterable[Document], sequence_length: int, start: Position):
        self.position = start
        self._documents = iter(documents)
        self._sequence_length = sequence_length
        self._document: Document | None = None

    def __iter__(self) -> Iterator[Row]:
        while (row := self.next_row()) is not None:
            yield row

    def next_row(self) -> Row | None:
        """The next row, or None when the documents have ended."""
        input_ids = np.empty(self._sequence_length, dtype=np.int32)
        labels = np.empty(self._sequence_length, dtype=np.int32)
        segments: list[int] = []
        filled = 0
        while filled < self._sequence_length:
            if self._document is None and not self._take_document():
                break
            tokens, offset = self._document.tokens, self.position.offset
            size = min(self._sequence_length - filled, len(tokens) - offset)
            input_ids[filled : filled + size] = tokens[offset : offset + size]
            targets = tokens[offset + 1 : offset + size + 1]
            labels[filled : filled + len(targets)] = targets
            labels[filled + len(targets) : filled + size] = IGNORE_INDEX  # the document's last token, if it is here
            segments.append(size)
            filled += size
            if offset + size < len(tokens):
                self.position = replace(self.position, offset=offset + size)
            else:
                self.position = replace(self.position, document=self.position.document + 1, offset=0)
                self._document = None
        if not filled:
            return None
        return Row(input_ids[:filled], labels[:filled], segments, self.position)

    def _take_document(self) -> bool:
        document = next(self._documents, None)
        if document is None:
            return False
        offset = self.position.offset
        if offset >= len(document.tokens) or (offset and document.position != replace(self.position, offset=0)):
            raise ValueError(
                f"The data position to resume from is token {offset} of document {self.position.document} in epoch "
                f"{self.position.epoch}, which is not there: the corpus has changed since the checkpoint. Restore "
                "it, or start with resume=never."
            )
        self._document = document
        self.position = replace(document.position, offset=offset)
        return True
