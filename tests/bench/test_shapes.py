import itertools
from pathlib import Path

import pytest

from qlatrain.bench.shapes import BatchShape, Shape, parse_batch, parse_shape, shape_of_model

MODELS = Path(__file__).parent.parent.parent / "configs" / "model"

WRITTEN = {
    "8x4096 16/32": Shape(8, 4096, 16, 32),
    "1x32768 2/8": Shape(1, 32768, 2, 8),
    "32768 packed16 16/32": Shape(1, 32768, 16, 32, documents=16),
    "8x4096 16/16 96/192": Shape(8, 4096, 16, 16, 96, 192),
    "64 packed3 1/2 16/24": Shape(1, 64, 1, 2, 16, 24, 3),
}


@pytest.mark.parametrize("text", WRITTEN)
def test_as_written_and_back(text):
    assert parse_shape(text) == WRITTEN[text]
    assert str(WRITTEN[text]) == text
    assert not set(WRITTEN[text].slug) & set(" /")


def test_slugs_are_the_names_of_keys():
    assert parse_shape("8x4096 16/32").slug == "8x4096_16-32"
    assert parse_shape("32768 packed16 16/32 96/192").slug == "32768_packed16_16-32_96-192"
    assert len({shape.slug for shape in WRITTEN.values()}) == len(WRITTEN)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("4096 16/32", "is no shape: write B×T"),
        ("8x4096", "is no shape"),
        ("8x 16/32", "is no shape"),
        ("8x4096 16", "is no shape"),
        ("8x4096 16/32 128", "is no shape"),
        ("8x4096 packed4 16/32", "is no shape"),
        ("-8x4096 16/32", "is no shape"),
        ("eight", "is no shape"),
        ("0x4096 16/32", "a size is 0"),
        ("8x4096 0/32", "a size is 0"),
        ("64 packed0 1/1", "a size is 0"),
        ("8x4096 16/24", "24 value heads are no multiple of 16"),
        ("4 packed5 1/1", "5 documents need at least 5 tokens"),
    ],
)
def test_what_is_no_shape(text, said):
    with pytest.raises(ValueError) as caught:
        parse_shape(text, "bench.cpu.shapes")
    message = str(caught.value)
    assert message.startswith(f"bench.cpu.shapes holds {text!r}") and said in message and "\n" not in message


def test_documents_of_a_seed():
    shape = parse_shape("1000 packed16 1/1")
    bounds = shape.bounds(3)
    assert len(bounds) == 17 and bounds[0] == 0 and bounds[-1] == 1000
    assert all(start < end for start, end in itertools.pairwise(bounds))
    assert bounds == shape.bounds(3) != shape.bounds(4)
    assert parse_shape("5 packed5 1/1").bounds(0) == [0, 1, 2, 3, 4, 5]
    assert parse_shape("5 packed1 1/1").bounds(0) == [0, 5]
    assert parse_shape("2x5 1/1").bounds(0) is None


def test_shape_of_a_model(tmp_path):
    model = (MODELS / "tiny.yaml").read_text()
    heads = "linear_num_key_heads: 2\nlinear_num_value_heads: 6\nlinear_key_head_dim: 96\nlinear_value_head_dim: 192\n"
    kept = [line for line in model.splitlines() if not line.startswith("linear_")]
    (tmp_path / "some_model.yaml").write_text("\n".join(kept) + f"\n{heads}")
    assert shape_of_model(tmp_path, "some_model", 4096, 4, None) == Shape(4, 1024, 2, 6, 96, 192)
    assert str(shape_of_model(tmp_path, "some_model", 4096, 1, 7)) == "4096 packed7 2/6 96/192"
    with pytest.raises(ValueError, match=r"bench.from_model=same_model is not there: .*did you mean some_model\?"):
        shape_of_model(tmp_path, "same_model", 4096, 4, None)


BATCHES = {
    "2x4096": BatchShape(2, 4096),
    "1x32768": BatchShape(1, 32768),
    "32768 packed16": BatchShape(1, 32768, 16),
}


@pytest.mark.parametrize("text", BATCHES)
def test_batch_as_written_and_back(text):
    shape = parse_batch(text)
    assert shape == BATCHES[text] and str(shape) == text
    assert parse_batch(text.replace("x", "×")) == shape
    assert shape.all_tokens == shape.batch * shape.tokens and " " not in shape.slug
    assert shape == parse_shape(f"{text} 16/32").rows and shape.bounds(3) == parse_shape(f"{text} 16/32").bounds(3)


NO_BATCHES = {
    "4096": "bench.shape=4096 is no batch: write B×T or T packedN: 2x4096, 32768 packed16",
    "2x4096 16/32": "bench.shape=2x4096 16/32 is no batch",
    "0x4096": "bench.shape=0x4096 has a size of 0",
    "4096 packed0": "bench.shape=4096 packed0 has a size of 0",
    "4 packed5": "bench.shape=4 packed5: 5 documents need at least 5 tokens",
    "2x1": "bench.shape=2x1 has no token that another one predicts: make it longer",
    "5 packed5": "bench.shape=5 packed5 has no token that another one predicts",
}


@pytest.mark.parametrize("text", NO_BATCHES)
def test_what_is_no_batch(text):
    with pytest.raises(ValueError) as caught:
        parse_batch(text)
    assert str(caught.value).startswith(NO_BATCHES[text])
