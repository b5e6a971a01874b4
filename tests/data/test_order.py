import numpy as np
import pytest
from data_helpers import corpus, make_texts, open_data

from qlatrain.data.order import hash64, permutation

HASHES = [10705738211186751225, 3032427185751592386, 18053816495668303280]


def sides(tmp_path, kind, seed=0, texts=None, **changes):
    data = open_data(corpus(tmp_path, kind, texts or make_texts(60), **changes), seed)
    with data.train:
        return list(data.train.documents()), list(data.validation.documents())


def test_hashes_are_fixed_and_depend_on_every_key():
    # Literals: a run must be resumable after any update of ours or of numpy.
    assert hash64(np.arange(3), 0, 1).tolist() == HASHES
    orders = [permutation(50, *keys).tolist() for keys in [(0, 0), (0, 1), (1, 0), (1, 1), (-1, 0)]]
    assert len({tuple(order) for order in orders}) == 5 and all(sorted(order) == list(range(50)) for order in orders)
    near, far = permutation(50, 0), permutation(50, 1)
    assert not {tuple(near - far)} & {(shift,) * 50 for shift in range(-49, 50)}, "seeds are not shifts of each other"
    assert abs(hash64(np.arange(100_000), 3).astype(np.float64).mean() / 2**64 - 0.5) < 0.01


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_split_is_disjoint_complete_and_stable(tmp_path, kind):
    (tmp_path / "1").mkdir(), (tmp_path / "2").mkdir()
    train, held_out = sides(tmp_path / "1", kind)
    assert sorted(train + held_out) == sorted(make_texts(60))
    assert not set(train) & set(held_out) and held_out
    assert sides(tmp_path / "2", kind, shuffle=False, sequence_length=8) == (train, held_out)
    assert set(sides(tmp_path / "2", kind, seed=1)[1]) != set(held_out)
    if kind == "map":
        assert len(held_out) == 12


@pytest.mark.parametrize(("fraction", "expected"), [(0.001, 1), (0.5, 2), (0.999, 3)])
def test_each_side_has_a_document(tmp_path, fraction, expected):
    train, held_out = sides(tmp_path, "map", texts=["a" * 50] * 4, validation_fraction=fraction)
    assert (len(train), len(held_out)) == (4 - expected, expected)


@pytest.mark.parametrize("kind", ["map", "stream"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_is_every_training_document_once(tmp_path, kind, shuffle):
    texts = make_texts(45)
    data = open_data(corpus(tmp_path, kind, texts, shuffle=shuffle))
    with data.train:
        train = sorted(data.train.documents(), key=texts.index)
        size = sum(len(text) + 2 for text in train)
        ids = []
        while len(ids) < 2 * size:
            ids += data.train.next_global_batch(1)[0].input_ids[0].tolist()
    decoded = "".join("|" if i == 256 else "" if i == 257 else chr(i) for i in ids[: 2 * size]).split("|")[1:]
    epochs = [decoded[: len(train)], decoded[len(train) :]]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(train)
    if shuffle:
        assert epochs[0] != train and epochs[0] != epochs[1]
    else:
        assert epochs[0] == epochs[1] == train
    if kind == "stream":  # shuffled within blocks of 7 documents read
        blocks = [texts.index(text) // 7 for text in epochs[0]]
        assert blocks == sorted(blocks)
