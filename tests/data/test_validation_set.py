import pytest
from data_helpers import as_values, config, corpus, make_texts, open_data, pieces, predicted, write_jsonl
from test_tokenizer import byte_bpe

KINDS = ["map", "stream"]


@pytest.mark.parametrize("kind", KINDS)
def test_all_rows_hold_every_held_out_token(tmp_path, kind):
    data = open_data(corpus(tmp_path, kind, [*make_texts(60), "", " "]))
    texts = list(data.validation.documents())
    batches = data.validation.batches(rows=10_000, micro_rows=3)
    assert predicted(batches) == [token for text in texts for token in [*text.encode(), 257]]
    assert [as_values(b) for b in data.validation.batches(10_000, 3)] == [as_values(b) for b in batches]
    assert data.validation.bytes_per_token(10_000) == pytest.approx(
        sum(len(text.encode()) for text in texts) / sum(batch.num_targets for batch in batches)
    )
    assert 0 < batches[-1].input_ids.shape[1] <= 3 * 32
    assert all(batch.input_ids.shape == (1, 96) for batch in batches[:-1])


@pytest.mark.parametrize("rows", [1, 2, 5, 9])
def test_rows_are_bounded_and_bytes_counted_to_the_token(tmp_path, rows):
    data = open_data(corpus(tmp_path, "map", make_texts(60)))
    targets = predicted(data.validation.batches(rows, 4))
    assert sum(b.input_ids.numel() for b in data.validation.batches(rows, 4)) == rows * 32
    text_bytes = sum(token < 256 for token in targets)  # every byte of a bytes-tokenised text is a target
    assert data.validation.bytes_per_token(rows) == pytest.approx(text_bytes / len(targets))


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_bytes_per_token_of_a_subword_tokenizer(tmp_path, rows):
    folder = byte_bpe(tmp_path / "tok", {"eos_token": "</s>"})
    texts = [f"the cat sat on the hat and mat {i} " * 3 for i in range(30)]
    data = open_data(corpus(tmp_path, "map", texts, tokenizer=folder))
    batches = data.validation.batches(rows, 1000)
    text_bytes = len(data.tokenizer.decode(predicted(batches)).encode())
    assert data.validation.bytes_per_token(rows) == pytest.approx(text_bytes / batches[0].num_targets)
    assert data.validation.bytes_per_token(rows) > 1.5


@pytest.mark.parametrize(("rows", "micro_rows"), [(1, 1), (5, 2), (7, 3), (8, 2), (10_000, 4)])
def test_processes_share_the_rows_and_agree_on_the_number_of_batches(tmp_path, rows, micro_rows):
    data = open_data(corpus(tmp_path, "map", make_texts(60)))
    whole = predicted(data.validation.batches(rows, micro_rows))
    for world_size in (2, 4, 8):
        ranks = [data.validation.batches(rows, micro_rows, rank, world_size) for rank in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1
        assert predicted(batch for step in zip(*ranks, strict=True) for batch in step) == whole
        for batch in (batch for batches in ranks for batch in batches):
            assert batch.num_targets == sum((labels != -100).sum() for _, labels in pieces(batch))
            assert batch.input_ids.shape[1] > 0
            if batch.num_targets == 0 and batch.input_ids.shape[1] == 32:
                assert set(batch.input_ids[0].tolist()) <= {257}


def test_bad_validation(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", ["a" * 100, " ", " ", " "])
    for seed in range(20):
        try:
            data = open_data(config(source="text", files=[path], validation_fraction=0.5), seed)
        except ValueError:
            continue  # the only text is held out
        with pytest.raises(ValueError, match="No document with text is held out"):
            data.validation.batches(4, 4)
        with pytest.raises(ValueError, match=r"validation\.rows=0"):
            data.validation.batches(0, 4)
        break
    else:
        raise AssertionError("no seed holds out only empty documents")
