import numpy as np
import pytest
import torch
from data_helpers import pieces

from qlatrain.data.packing import IGNORE_INDEX, Document, PackedBatch, Packer, Position, StreamPosition


def documents(lengths: list[int]) -> list[Document]:
    """Document d holds 100·d, 100·d + 1, ..."""
    return [
        Document(Position(document=d), np.arange(100 * d, 100 * d + n, dtype=np.int32)) for d, n in enumerate(lengths)
    ]


def packer(source: list[Document], length: int, interleave: int = 1) -> Packer:
    return Packer(source, length, StreamPosition.beginning(interleave))


def test_a_small_batch_by_hand():
    rows = list(packer(documents([3, 6, 1, 2]), 4))
    batch = PackedBatch.from_rows(rows)
    x = IGNORE_INDEX
    assert batch.input_ids.tolist() == [[0, 1, 2, 100, 101, 102, 103, 104, 105, 200, 300, 301]]
    assert batch.labels.tolist() == [[1, 2, x, 101, 102, 103, 104, 105, x, x, 301, x]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3, 0, 0, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 8, 9, 10, 12]
    assert batch.cu_seqlens_cpu.tolist() == batch.cu_seqlens.tolist()
    assert (batch.max_seqlen, batch.num_targets) == (4, 8)
    assert {batch.input_ids.dtype, batch.labels.dtype, batch.position_ids.dtype} == {torch.int64}
    assert batch.cu_seqlens.dtype == batch.cu_seqlens_cpu.dtype == torch.int32
    assert [row.end for row in rows] == [
        StreamPosition(Position(document=2), (Position(document=1, offset=1),)),
        StreamPosition(Position(document=2), (Position(document=1, offset=5),)),
        StreamPosition(Position(document=4), (None,)),
    ]


@pytest.mark.parametrize("length", [2, 3, 7, 16, 500])
def test_every_token_is_predicted_once(length):
    lengths = np.random.default_rng(length).integers(1, 60, size=40).tolist()
    source = documents(lengths)
    rows = list(packer(source, length))
    batch = PackedBatch.from_rows(rows)
    assert [len(row.input_ids) for row in rows[:-1]] == [length] * (len(rows) - 1)
    assert batch.input_ids[0].tolist() == [t for d in source for t in d.tokens]
    assert batch.labels[0][batch.labels[0] != IGNORE_INDEX].tolist() == [t for d in source for t in d.tokens[1:]]
    assert batch.num_targets == sum(lengths) - len(lengths)
    assert batch.max_seqlen == max(len(ids) for ids, _ in pieces(batch)) <= length
    for ids, labels in pieces(batch):
        assert len({int(i) // 100 for i in ids}) == 1, "a segment holds one document"
        for token, label in zip(ids, labels, strict=True):
            last = token % 100 == lengths[token // 100] - 1
            assert label == (IGNORE_INDEX if last else token + 1)


def test_packing_can_begin_at_any_token():
    source = documents([5, 9, 2, 8])
    flat = [t for d in source for t in d.tokens]
    for d, document in enumerate(source):
        for offset in range(len(document.tokens)):
            start = StreamPosition(Position(document=d + 1), (Position(document=d, offset=offset),))
            batch = PackedBatch.from_rows(list(Packer(source[d + 1 :], 4, start, [document])))
            assert batch.input_ids[0].tolist() == flat[flat.index(100 * d + offset) :]
    with pytest.raises(ValueError, match="token 5 of document 0 in epoch 0, which is not there"):
        Packer(source, 4, StreamPosition(Position(document=1), (Position(offset=5),)), source[:1])


def test_documents_give_rows_in_turn():
    rows = list(packer(documents([5, 2, 3, 6]), 2, interleave=3))
    assert [row.input_ids.tolist() for row in rows] == [
        [0, 1],
        [100, 101],
        [200, 201],
        [2, 3],
        [300, 301],  # takes the place of document 1
        [202],  # there is no other to fill the row with
        [4],
        [302, 303],
        [304, 305],
    ]
    assert rows[2].end == StreamPosition(
        Position(document=3), (Position(document=0, offset=2), None, Position(document=2, offset=2))
    )
    assert rows[4].end.opened == (Position(document=2, offset=2), Position(offset=4), Position(document=3, offset=2))


def test_documents_are_taken_only_when_needed():
    taken = []

    def source():
        for document in documents([4, 4]):
            taken.append(document)
            yield document

    packer(source(), 4).next_row()
    assert len(taken) == 1


def test_to_keeps_the_host_boundaries():
    batch = PackedBatch.from_rows(list(packer(documents([3, 5]), 4)))
    moved = batch.to("meta")
    assert {moved.input_ids.device.type, moved.labels.device.type, moved.position_ids.device.type} == {"meta"}
    assert moved.cu_seqlens.device.type == "meta" and moved.cu_seqlens_cpu.device.type == "cpu"
    assert (moved.max_seqlen, moved.num_targets) == (batch.max_seqlen, batch.num_targets)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_to_cuda_gives_the_same_values():
    batch = PackedBatch.from_rows(list(packer(documents([3, 5]), 4)))
    moved = batch.to("cuda")
    for name in ("input_ids", "labels", "position_ids", "cu_seqlens"):
        assert torch.equal(getattr(moved, name).cpu(), getattr(batch, name))
