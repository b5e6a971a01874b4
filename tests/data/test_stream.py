import json
import subprocess
import sys
import threading
from collections import Counter

import pytest
from data_helpers import (
    as_values,
    config,
    corpus,
    make_texts,
    open_data,
    predicted,
    save_dataset,
    take_rows,
    write_jsonl,
)

from qlatrain.data.stream import bounded

KINDS = ["map", "stream"]


def saved(stream) -> dict:
    """The position as it comes back from a checkpoint."""
    return json.loads(json.dumps(stream.state_dict()))


def following(state: dict) -> dict:
    """The block of the document that is opened next."""
    return state["blocks"][state["following"][0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shuffle", "interleave"), [(True, 1), (False, 1), (True, 5), (False, 2)])
def test_resume_from_every_position_gives_the_same_rows(tmp_path, kind, shuffle, interleave):
    texts = [*make_texts(24)[:12], "", " \n", *make_texts(24)[12:]]
    settings = corpus(tmp_path, kind, texts, shuffle=shuffle, interleave=interleave)
    after = 12
    with open_data(settings).train as stream:
        states = [saved(stream)]
        rows = []
        while following(states[-1])["epoch"] < 3:
            rows += take_rows(stream, 1)
            states.append(saved(stream))
    count = len(rows) - after
    assert count > 30 and following(states[count])["epoch"] >= 1
    assert {state["opened"][0] is None for state in states} == {True, False}
    with open_data(settings).train as inline, open_data(config_with(settings, workers=3)).train as threaded:
        for at in range(count):
            for stream in (inline, threaded):
                stream.load_state_dict(states[at])
                assert saved(stream) == states[at]
                assert take_rows(stream, 2) == rows[at : at + 2]
                assert saved(stream) == states[at + 2]
        inline.load_state_dict(states[5])
        assert take_rows(inline, count) == rows[5 : 5 + count]


def config_with(settings, **changes):
    return config(**{**vars(settings), **changes})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("interleave", [1, 3])
def test_threads_change_neither_rows_nor_positions(tmp_path, kind, workers, interleave):
    settings = corpus(tmp_path, kind, make_texts(30), interleave=interleave)
    runs = []
    for count in (0, workers):
        with open_data(config_with(settings, workers=count)).train as stream:
            runs.append(
                [(as_values(stream.next_global_batch(rows)[0]), saved(stream)) for rows in [1, 4, 4, 2, 7, 1] * 6]
            )
    assert runs[0] == runs[1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_of_an_epoch_is_predicted_once(tmp_path, kind):
    texts = [*make_texts(40), "", " \n", "", "", " ", ""]
    with open_data(corpus(tmp_path, kind, texts, shuffle=False)).train as stream:
        train = sorted(stream.documents(), key=make_texts(40).index)
        expected = [token for text in train for token in [*text.encode(), 257]]
        targets = []
        while len(targets) < 2 * len(expected):
            targets += predicted(stream.next_global_batch(2))
    assert targets[: 2 * len(expected)] == expected * 2


@pytest.mark.parametrize("kind", KINDS)
def test_neighbouring_rows_are_of_different_documents(tmp_path, kind):
    texts = [chr(97 + i) * 400 for i in range(24)]
    with open_data(corpus(tmp_path, kind, texts, validation_fraction=0.0, interleave=4)).train as stream:
        rows = [row[0] for row in take_rows(stream, 400 * 24 // 32)]
    letters = [{chr(token) for token in row if token < 256} for row in rows]
    for first, four in enumerate(zip(*(letters[i:] for i in range(4)), strict=False)):
        assert not set.intersection(*four), f"rows {first} to {first + 3}"
    found = Counter(token for row in rows for token in row if token < 256)
    assert set(found) == {ord(text[0]) for text in texts}
    assert all(count >= 300 for count in found.values()), "all documents of an epoch before the next"


@pytest.mark.parametrize("kind", KINDS)
def test_processes_share_one_global_batch(tmp_path, kind):
    settings = corpus(tmp_path, kind, make_texts(30))
    with open_data(settings).train as stream:
        whole = [as_values(stream.next_global_batch(1)[0]) for _ in range(24)]
    for world_size, micro_rows in [(1, 2), (2, 4), (2, 1), (4, 2), (8, 1)]:
        streams = [open_data(settings).train for _ in range(world_size)]
        found = []
        for _ in range(3):
            for rank, stream in enumerate(streams):
                batches = stream.next_global_batch(8, rank, world_size, micro_rows)
                assert [batch.input_ids.shape for batch in batches] == [(1, micro_rows * 32)] * (
                    8 // world_size // micro_rows
                )
                found += [
                    (batch.input_ids[0, at : at + 32].tolist(), batch.labels[0, at : at + 32].tolist())
                    for batch in batches
                    for at in range(0, micro_rows * 32, 32)
                ]
        assert found == [row[:2] for row in whole]
        assert all(saved(stream) == saved(streams[0]) for stream in streams)


@pytest.mark.parametrize(
    ("global_rows", "world_size", "micro_rows"), [(8, 3, 1), (8, 2, 3), (8, 4, 4), (0, 1, 1), (4, 1, 0)]
)
def test_rows_that_do_not_divide(tmp_path, global_rows, world_size, micro_rows):
    with open_data(corpus(tmp_path, "map", make_texts(30))).train as stream:
        message = f"={global_rows} is not a multiple of {world_size} processes × train.micro_batch_size={micro_rows}"
        with pytest.raises(ValueError, match=message):
            stream.next_global_batch(global_rows, 0, world_size, micro_rows)


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_a_position_does_not_grow(tmp_path, kind):
    sizes = []
    for count in (20, 2000):
        (tmp_path / str(count)).mkdir()
        with open_data(corpus(tmp_path / str(count), kind, make_texts(count), interleave=8)).train as stream:
            for _ in range(10):
                stream.next_global_batch(count // 10)
                sizes.append(len(json.dumps(stream.state_dict())))
    assert max(sizes[10:]) - max(sizes[:10]) < 200 and max(sizes) < 2500


@pytest.mark.parametrize("kind", KINDS)
def test_a_position_survives_another_row_length(tmp_path, kind):
    settings = corpus(tmp_path, kind, make_texts(30), shuffle=False)
    with open_data(settings).train as stream:
        take_rows(stream, 5)
        state = saved(stream)
        expected = [token for row in take_rows(stream, 8) for token in row[0]]
    with open_data(config_with(settings, sequence_length=64)).train as stream:
        stream.load_state_dict(state)
        assert [token for row in take_rows(stream, 4) for token in row[0]] == expected


def test_positions_of_another_corpus_are_refused(tmp_path):
    settings = corpus(tmp_path, "map", make_texts(30))
    with open_data(settings).train as stream:
        take_rows(stream, 3)
        state = saved(stream)
    (tmp_path / "more").mkdir()
    more = write_jsonl(tmp_path / "more" / "c.jsonl", make_texts(31))
    for changes, seed, what in [
        ({"files": [more]}, 0, "documents was 30 and is 31"),
        ({}, 1, "seed was 0 and is 1"),
        ({"validation_fraction": 0.1}, 0, "validation_fraction was 0.2 and is 0.1"),
        ({"shuffle": False}, 0, "shuffle was True and is False"),
        ({"interleave": 2}, 0, "interleave was 1 and is 2"),
        ({"source": "stdlib"}, 0, "source was 'text' and is 'stdlib'"),
    ]:
        with open_data(config_with(settings, **changes), seed).train as stream, pytest.raises(ValueError, match=what):
            stream.load_state_dict(state)
    state["corpus"]["tokenizer_vocab_size"] = 99
    with open_data(settings).train as stream, pytest.raises(ValueError, match="tokenizer_vocab_size was 99 and is 258"):
        stream.load_state_dict(state)


def test_a_moved_corpus_is_the_same_corpus(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
    for kind in KINDS:
        settings, moved = (corpus(tmp_path / folder, kind, make_texts(30)) for folder in "ab")
        with open_data(settings).train as stream, open_data(moved).train as other:
            take_rows(stream, 3)
            other.load_state_dict(saved(stream))
            assert take_rows(other, 3) == take_rows(stream, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_corpus_shorter_than_a_row(tmp_path, kind):
    texts = ["abc"] * 10
    settings = corpus(tmp_path, kind, texts, validation_fraction=0.0, sequence_length=51)
    with pytest.raises(ValueError, match=r"hold 50 tokens, less than one row of data\.sequence_length=51"):
        open_data(settings)
    with open_data(config_with(settings, sequence_length=50)).train as stream:
        assert stream.next_global_batch(1)[0].num_targets == 40


def test_a_large_corpus_is_not_tokenised_to_measure_it(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", ["a" * 100] * 1000)
    data = open_data(config(source="text", files=[path]))
    reads = []
    source = data.train._order._source
    data.train._order._source = type("Counted", (), {"__getitem__": lambda _, i: reads.append(i) or source[i]})()
    data.train._format.check(data.train._order.train_documents())
    assert len(reads) == 1


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_an_unreadable_document_is_reported_each_time(tmp_path, workers):
    path = tmp_path / "c.jsonl"
    write_jsonl(path, make_texts(20))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:12], '{"no": 1}', *lines[12:]]))
    settings = config(source="text", files=[str(path)], shuffle=False, validation_fraction=0.0, workers=workers)
    with pytest.raises(ValueError, match=r"c\.jsonl:13 has no field 'text'"):
        list(open_data(config_with(settings, workers=0)).train.documents())
    settings.sequence_length = 16
    data = try_open(settings)
    with data.train as stream:
        beginning = saved(stream)
        for _ in range(3):
            with pytest.raises(ValueError, match=r"c\.jsonl:13 has no field 'text'"):
                stream.next_global_batch(200)
        good = take_rows(stream, 3)
        assert len(good) == 3
        stream.load_state_dict(beginning)
        assert take_rows(stream, 3) == good, "nothing was lost to the error"


def try_open(settings):
    """A stream over a corpus with one bad line: another seed when the check of one row happens upon that line."""
    for seed in range(20):
        try:
            return open_data(settings, seed)
        except ValueError:
            continue
    raise AssertionError("the bad line comes first for every seed")


def test_threads_end(tmp_path):
    before = set(threading.enumerate())
    data = open_data(corpus(tmp_path, "map", make_texts(30), workers=3))
    take_rows(data.train, 5)
    assert set(threading.enumerate()) - before
    data.train.close()
    data.train.close()
    assert not set(threading.enumerate()) - before


def test_the_interpreter_exits_without_close(tmp_path):
    folder = save_dataset(tmp_path / "ds", make_texts(300))
    code = f"""
from qlatrain.config import DataConfig
from qlatrain.data import build_data
data = build_data(DataConfig(name="t", source="hf", dataset={folder!r}, streaming=True, sequence_length=32), 0)
data.train.next_global_batch(8)
print("done")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and result.stdout == "done\n" and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 1}, "sequence_length=1 must be 2"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0 must be at least 0 and below 1"),
        ({"validation_fraction": -0.1}, "validation_fraction=-0.1"),
        ({"workers": -1}, "workers=-1"),
        ({"interleave": 0}, "interleave=0"),
        ({"shuffle_block": 0}, "shuffle_block=0"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        open_data(config(**changes))


def test_one_document_cannot_be_split(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", ["a" * 100])
    with pytest.raises(ValueError, match=r"validation_fraction=0\.2 needs at least 2 documents, and there is 1"):
        open_data(config(source="text", files=[path]))
    data = open_data(config(source="text", files=[path], validation_fraction=0.0))
    assert data.validation is None


def test_bounded_texts():
    assert list(bounded(["", "ab", "  ", "cde"], None)) == ["ab", "cde"]
    assert list(bounded(["ab", "cde", "f"], 4)) == ["ab", "cd"]
    assert list(bounded(["ab", "cde"], 2)) == ["ab"]
    assert list(bounded(["a", "éé"], 4)) == ["a", "é"]
