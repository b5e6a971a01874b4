from dataclasses import replace

import numpy as np
import pytest
from data_helpers import pieces

from qlatrain.data.conversation_packing import ConversationPacker, TokenisedConversation
from qlatrain.data.packing import IGNORE_INDEX, Counts, PackedBatch, Position, StreamPosition

BEGINNING = StreamPosition(Position(), ())
PADDING = 7


def conversations(lengths: list[int], epoch: int = 0) -> list[TokenisedConversation]:
    """Conversation d holds 1000·d, 1000·d + 1, ..., of which every third is a target; of length 0: dropped."""
    made = []
    for d, length in enumerate(lengths):
        tokens = np.arange(1000 * d + 1000, 1000 * d + 1000 + length, dtype=np.int32)
        labels = np.where((np.arange(length) % 3 == 1) & (np.arange(length) < length - 1), tokens + 1, IGNORE_INDEX)
        made.append(TokenisedConversation(Position(epoch=epoch, document=d), tokens, labels.astype(np.int32)))
    return made


def packer(source, length: int = 10, lookahead: int = 4, start=BEGINNING, opened=()) -> ConversationPacker:
    return ConversationPacker(source, length, lookahead, PADDING, start, opened)


def held(row) -> list[int]:
    """Numbers of the conversations of a row, from its segments; None for padding."""
    starts = np.cumsum([0, *row.segments[:-1]])
    return [None if row.input_ids[at] == PADDING else int(row.input_ids[at]) // 1000 - 1 for at in starts]


def test_a_small_batch_by_hand():
    rows = list(packer(conversations([4, 8, 3, 2, 0, 6, 10, 1])))
    assert [held(row) for row in rows] == [[0, 5], [1, 3], [2, 7, None], [6]]
    assert [row.segments for row in rows] == [[4, 6], [8, 2], [3, 1, 6], [10]]
    x = IGNORE_INDEX
    assert rows[0].input_ids.tolist() == [1000, 1001, 1002, 1003, *range(6000, 6006)]
    assert rows[0].labels.tolist() == [x, 1002, x, x, x, 6002, x, x, 6005, x]
    assert rows[2].input_ids.tolist() == [3000, 3001, 3002, 8000, *[PADDING] * 6]
    assert rows[2].labels.tolist() == [x, 3002, *[x] * 8]
    batch = PackedBatch.from_rows(rows)
    assert batch.cu_seqlens.tolist() == [0, 4, 10, 18, 20, 23, 24, 30, 40]
    assert batch.position_ids[0, 20:30].tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4, 5]
    assert [row.counts for row in rows] == [
        Counts(packed=2, dropped=1, tokens=10, targets=3),
        Counts(packed=2, tokens=10, targets=2),
        Counts(packed=2, tokens=4, targets=1, padding=6),
        Counts(packed=1, tokens=10, targets=3),
    ]
    assert [(row.end.following.document, [at.document for at in row.end.opened]) for row in rows] == [
        (7, [1, 2, 3, 6]),
        (8, [2, 6, 7]),
        (8, [6]),
        (8, []),
    ]


@pytest.mark.parametrize("lookahead", [1, 2, 7, 500])
@pytest.mark.parametrize("length", [24, 100])
def test_every_conversation_is_whole_in_one_row(length, lookahead):
    lengths = np.random.default_rng(length).integers(0, 25, size=200).tolist()
    source = conversations(lengths)
    rows = list(packer(source, length, lookahead))
    assert all(len(row.input_ids) == len(row.labels) == sum(row.segments) == length for row in rows)
    found = [number for row in rows for number in held(row)]
    kept = [d for d, n in enumerate(lengths) if n]
    assert sorted(d for d in found if d is not None) == kept
    batch = PackedBatch.from_rows(rows)
    for ids, labels in pieces(batch):
        if ids[0] == PADDING:
            assert set(ids) == {PADDING} and set(labels) == {IGNORE_INDEX}
        else:
            one = source[int(ids[0]) // 1000 - 1]
            assert ids.tolist() == one.tokens.tolist() and labels.tolist() == one.labels.tolist()
    total = sum((row.counts for row in rows), Counts())
    assert (total.packed, total.dropped, total.cut) == (len(kept), len(lengths) - len(kept), 0)
    assert (total.tokens, total.targets) == (sum(lengths), batch.num_targets)
    assert total.tokens + total.padding == length * len(rows)
    assert total.fill == pytest.approx(sum(lengths) / (length * len(rows)))
    first = [min(d for d in held(row) if d is not None) for row in rows]
    assert [held(row)[0] for row in rows] == first, "the one that has waited longest comes first"


def test_nothing_that_fits_is_left_waiting():
    lengths = np.random.default_rng(1).integers(1, 60, size=300).tolist()
    source = conversations(lengths)
    for row in packer(source, 64, 16):
        room = row.counts.padding
        assert all(lengths[at.document] > room for at in row.end.opened)


@pytest.mark.parametrize(("lookahead", "fill"), [(1, 0.8), (32, 0.98), (256, 0.997)])
def test_rows_are_filled_well(lookahead, fill):
    """Lengths as in chat data: log-normal, a median of an eighth of the row."""
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(128), 0.8, size=3000), 8, 1024).astype(int).tolist()
    rows = list(packer(conversations(lengths), 1024, lookahead))
    assert sum((row.counts for row in rows[:-3]), Counts()).fill > fill


def test_an_epoch_is_over_before_the_next_begins():
    epochs = [replace_epoch(conversations([5, 3, 4, 2, 6, 9, 1]), epoch) for epoch in range(3)]
    rows = list(packer([one for epoch in epochs for one in epoch], 10, 100))
    found = [number for row in rows for number in held(row) if number is not None]
    assert [sorted(found[at : at + 7]) for at in (0, 7, 14)] == [list(range(7))] * 3
    assert all(None not in held(row) for row in rows[:-1] if held(row)[-1] in (0, 5)), "filled from the next epoch"
    assert len({at.epoch for row in rows for at in row.end.opened}) == 3
    assert all(len({at.epoch for at in row.end.opened}) <= 1 for row in rows)


def replace_epoch(source: list[TokenisedConversation], epoch: int) -> list[TokenisedConversation]:
    return [replace(one, position=replace(one.position, epoch=epoch)) for one in source]


@pytest.mark.parametrize("lookahead", [1, 3, 50])
def test_packing_can_begin_after_any_row(lookahead):
    lengths = np.random.default_rng(2).integers(0, 11, size=60).tolist()
    source = [one for epoch in range(2) for one in replace_epoch(conversations(lengths), epoch)]
    rows = list(packer(source, 10, lookahead))

    def of(at: Position) -> int:
        return at.epoch * len(lengths) + at.document

    for number, row in enumerate(rows):
        opened = [source[of(at)] for at in row.end.opened]
        again = list(packer(source[of(row.end.following) :], 10, lookahead, row.end, opened))
        assert [as_values(other) for other in again] == [as_values(other) for other in rows[number + 1 :]]


def as_values(row) -> tuple:
    return row.input_ids.tolist(), row.labels.tolist(), row.segments, row.end, row.counts


def test_nothing_to_pack():
    assert list(packer([])) == [] and list(packer(conversations([0, 0]))) == []
    assert Counts().fill == 0
