"""Tokenised conversations to packed rows: each whole in one row, a segment of its own.

A row begins with the conversation that has waited longest, so that none waits for ever. Behind it come, one after the
other, the longest that still fits of those in the window: the next `lookahead` conversations of the epoch (best-fit
decreasing, over a window). What is left is one more segment, of padding: it has no targets, and as no segment sees
another, nothing attends to it. The window takes from the next epoch only when it is empty, so that every conversation
of an epoch comes before the next begins.
"""

from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qlatrain.data.packing import IGNORE_INDEX, Counts, Position, Row, StreamPosition


@dataclass(frozen=True)
class TokenisedConversation:
    position: Position
    tokens: np.ndarray  # int32 [length], at most a row; none when it was dropped
    labels: np.ndarray  # int32 [length]; the next token where that is the assistant's, or -100
    cut: bool = False


class ConversationPacker:
    """Rows of `sequence_length` tokens from conversations in order.

    Args:
        conversations: the first is the one at `start.following`. Taken one at a time, and only when needed.
        sequence_length: tokens a row.
        lookahead: conversations in the window.
        padding_id: the token that fills a row.
        start: where the first row begins.
        opened: the conversations of `start.opened`: those in the window, the one that waits longest first.
    """

    def __init__(
        self,
        conversations: Iterable[TokenisedConversation],
        sequence_length: int,
        lookahead: int,
        padding_id: int,
        start: StreamPosition,
        opened: Sequence[TokenisedConversation] = (),
    ):
        self._conversations = iter(conversations)
        self._sequence_length = sequence_length
        self._lookahead = lookahead
        self._padding_id = padding_id
        self._following = start.following
        self._next: TokenisedConversation | None = None  # taken from the iterator, not yet into the window
        self._window: dict[int, TokenisedConversation] = {}  # by when they came
        self._by_length: list[tuple[int, int]] = []  # (length, -when): of one length the one that came first is last
        self._came = 0
        self._dropped = 0  # since the last row
        for conversation in opened:
            self._take_in(conversation)

    def __iter__(self) -> Iterator[Row]:
        while (row := self.next_row()) is not None:
            yield row

    @property
    def position(self) -> StreamPosition:
        return StreamPosition(self._following, tuple(held.position for held in self._window.values()))

    def next_row(self) -> Row | None:
        """The next row, or None when the conversations have ended."""
        self._fill_window()
        if not self._window:
            return None
        chosen = [self._leave(next(iter(self._window)))]
        room = self._sequence_length - len(chosen[0].tokens)
        while True:
            self._fill_window()
            fitting = bisect_right(self._by_length, (room, 1))
            if not fitting:
                break
            chosen.append(self._leave(-self._by_length[fitting - 1][1]))
            room -= len(chosen[-1].tokens)
        input_ids = np.full(self._sequence_length, self._padding_id, dtype=np.int32)
        labels = np.full(self._sequence_length, IGNORE_INDEX, dtype=np.int32)
        filled = self._sequence_length - room
        input_ids[:filled] = np.concatenate([conversation.tokens for conversation in chosen])
        labels[:filled] = np.concatenate([conversation.labels for conversation in chosen])
        segments = [len(conversation.tokens) for conversation in chosen] + [room] * (room > 0)
        counts = Counts(
            packed=len(chosen),
            cut=sum(conversation.cut for conversation in chosen),
            dropped=self._dropped,
            tokens=filled,
            targets=int((labels != IGNORE_INDEX).sum()),
            padding=room,
        )
        self._dropped = 0
        return Row(input_ids, labels, segments, self.position, counts)

    def _fill_window(self) -> None:
        """Take conversations in until the window is full or the epoch of those in it ends."""
        while len(self._window) < self._lookahead:
            self._next = self._next or next(self._conversations, None)
            if self._next is None:
                return
            if self._window and self._next.position.epoch != next(iter(self._window.values())).position.epoch:
                return
            taken, self._next = self._next, None
            self._following = replace(taken.position, document=taken.position.document + 1)
            self._take_in(taken)

    def _take_in(self, conversation: TokenisedConversation) -> None:
        if not len(conversation.tokens):
            self._dropped += 1
            return
        self._window[self._came] = conversation
        insort(self._by_length, (len(conversation.tokens), -self._came))
        self._came += 1

    def _leave(self, when: int) -> TokenisedConversation:
        """Take the conversation that came at `when` out of the window."""
        conversation = self._window.pop(when)
        self._by_length.pop(bisect_right(self._by_length, (len(conversation.tokens), -when)) - 1)
        return conversation
