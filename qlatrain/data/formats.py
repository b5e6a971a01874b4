"""The two kinds of documents, text and conversations: how each becomes tokens, and tokens become rows.

Everything around them, the order, the threads, the position to resume from and the validation set, is the same.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from qlatrain.data.chat import Chat
from qlatrain.data.conversation_packing import ConversationPacker, TokenisedConversation
from qlatrain.data.conversations import TextOrConversation
from qlatrain.data.packing import IGNORE_INDEX, Document, Packer, Position, Row, StreamPosition
from qlatrain.data.tokenizer import Tokenizer

TOO_LONG = ("cut", "drop", "error")


class Format(Protocol):
    """What to do with documents of one kind. Safe to call from several threads."""

    sequence_length: int
    description: dict  # JSON-able; what, beside the source, the order of tokens depends on
    beginning: StreamPosition  # where packing starts

    def tokenise(self, position: Position, document: TextOrConversation) -> Document | TokenisedConversation | None:
        """The tokens of a document; None when there is nothing in it."""

    def packer(self, documents: Iterable, start: StreamPosition, opened: Sequence) -> Packer | ConversationPacker:
        """What makes rows of documents that were tokenised. opened: those at `start.opened`."""

    def check(self, documents: Iterator[TextOrConversation]) -> None:
        """Raises ValueError when an epoch of `documents` gives no row. Reads no more of them than it must."""

    def text(self, document: TextOrConversation) -> str:
        """The document as one string."""

    def validation_rows(self, documents: Iterator[TextOrConversation], rows: int) -> tuple[list[Row], int]:
        """The first `rows` rows of `documents`, or all when there are fewer, and the UTF-8 bytes of their targets."""

    def padding(self) -> Row:
        """A row without targets: one whole row, the shape that every layer has met already."""


class TextFormat:
    """Text: rows without a gap, in which documents go on from row to row."""

    def __init__(self, tokenizer: Tokenizer, sequence_length: int, interleave: int):
        self.sequence_length = sequence_length
        self.description = {"interleave": interleave, **describe_tokenizer(tokenizer)}
        self.beginning = StreamPosition.beginning(interleave)
        self._tokenizer = tokenizer

    def tokenise(self, position: Position, document: str) -> Document | None:
        return None if is_empty(document) else Document(position, self._tokenizer.encode(document))

    def packer(
        self, documents: Iterable[Document], start: StreamPosition, opened: Sequence[Document | None] = ()
    ) -> Packer:
        return Packer(documents, self.sequence_length, start, opened)

    def check(self, documents: Iterator[str]) -> None:
        tokens = 0
        for text in documents:
            tokens += 0 if is_empty(text) else len(self._tokenizer.encode(text))
            if tokens >= self.sequence_length:
                return
        raise ValueError(
            f"The training documents hold {tokens} tokens, less than one row of "
            f"data.sequence_length={self.sequence_length}; add documents or shorten the row."
        )

    def text(self, document: str) -> str:
        return document

    def validation_rows(self, documents: Iterator[str], rows: int) -> tuple[list[Row], int]:
        taken: list[Document] = []
        text_bytes = 0

        def tokenised() -> Iterator[Document]:
            nonlocal text_bytes
            for text in documents:
                document = self.tokenise(Position(document=len(taken)), text)
                if document is not None:
                    taken.append(document)
                    text_bytes += len(text.encode("utf-8", errors="replace"))
                    yield document

        packer = self.packer(tokenised(), StreamPosition.beginning(1))
        packed = first_rows(packer.next_row, rows)
        (within,) = packer.position.opened
        if within is not None:  # the last row ends within a document: its targets go one token further
            tokens = taken[-1].tokens
            read = self._tokenizer.count_bytes(tokens[: within.offset + 1])
            text_bytes -= self._tokenizer.count_bytes(tokens) - read
        return packed, text_bytes

    def padding(self) -> Row:
        return padding_row(self._tokenizer, self.sequence_length)


class ConversationFormat:
    """Conversations: each whole in one row, the assistant's turns as targets."""

    def __init__(self, tokenizer: Tokenizer, sequence_length: int, lookahead: int, too_long: str):
        self.sequence_length = sequence_length
        self.chat = Chat(tokenizer)
        self.description = {"lookahead": lookahead, "too_long": too_long}
        self.description |= {**describe_tokenizer(tokenizer), **self.chat.description}
        self.beginning = StreamPosition(Position(), ())
        self._tokenizer = tokenizer
        self._lookahead = lookahead
        self._too_long = too_long

    def tokenise(self, position: Position, document: TextOrConversation) -> TokenisedConversation | None:
        """Its tokens, cut to a row; none when it is dropped: as too long, or because the cut left no target."""
        if isinstance(document, str):  # an empty line
            return None
        tokens, targets = self.chat.encode(document)
        labels = np.full_like(tokens, IGNORE_INDEX)
        labels[:-1] = np.where(targets[1:], tokens[1:], IGNORE_INDEX)
        longer = len(tokens) > self.sequence_length
        if longer and self._too_long == "error":
            raise ValueError(
                f"{document.place()} is {len(tokens)} tokens long, more than data.sequence_length="
                f"{self.sequence_length}; make the row longer, or set data.too_long to cut or drop."
            )
        tokens, labels = tokens[: self.sequence_length], labels[: self.sequence_length]
        if longer and (self._too_long == "drop" or (labels == IGNORE_INDEX).all()):
            tokens, labels = tokens[:0], labels[:0]
        return TokenisedConversation(position, tokens, labels, cut=longer)

    def packer(
        self,
        documents: Iterable[TokenisedConversation],
        start: StreamPosition,
        opened: Sequence[TokenisedConversation] = (),
    ) -> ConversationPacker:
        padding_id = self._tokenizer.eos_id or 0
        return ConversationPacker(documents, self.sequence_length, self._lookahead, padding_id, start, opened)

    def check(self, documents: Iterator[TextOrConversation]) -> None:
        count = 0
        for document in documents:
            conversation = self.tokenise(Position(), document)
            if conversation is not None and len(conversation.tokens):
                return
            count += conversation is not None
        if count == 0:
            raise ValueError("There are no conversations to train on: every line is empty; add some.")
        raise ValueError(
            f"None of the {count} training conversations has a turn of the assistant within "
            f"data.sequence_length={self.sequence_length} tokens (data.too_long={self._too_long}); make the row longer."
        )

    def text(self, document: TextOrConversation) -> str:
        return document if isinstance(document, str) else self.chat.text(document)

    def validation_rows(self, documents: Iterator[TextOrConversation], rows: int) -> tuple[list[Row], int]:
        tokenised = (self.tokenise(Position(document=number), document) for number, document in enumerate(documents))
        packer = self.packer((conversation for conversation in tokenised if conversation), self.beginning)
        packed = first_rows(packer.next_row, rows)
        return packed, sum(self._tokenizer.count_bytes(row.labels[row.labels != IGNORE_INDEX]) for row in packed)

    def padding(self) -> Row:
        return padding_row(self._tokenizer, self.sequence_length)


def describe_tokenizer(tokenizer: Tokenizer) -> dict:
    # without its folder, which may move
    return {"tokenizer": Path(tokenizer.name).name, "tokenizer_vocab_size": tokenizer.vocab_size}


def is_empty(text: str) -> bool:
    """True when there is nothing to learn from: no characters, or only white space."""
    return not text or text.isspace()


def first_rows(next_row: Callable[[], Row | None], count: int) -> list[Row]:
    return [row for _ in range(count) if (row := next_row()) is not None]


def padding_row(tokenizer: Tokenizer, sequence_length: int) -> Row:
    ids = np.full(sequence_length, tokenizer.eos_id or 0, dtype=np.int32)
    return Row(ids, np.full_like(ids, IGNORE_INDEX), [len(ids)], StreamPosition.beginning(1))
