import itertools

import pytest

from qlatrain.bench.shapes import Shape, parse_shape, shape_of_model

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
    (tmp_path / "some_model.yaml").write_text(
        "linear_num_key_heads: 2\nlinear_num_value_heads: 6\nlinear_key_head_dim: 96\nlinear_value_head_dim: 192\n"
    )
    assert shape_of_model(tmp_path, "some_model", 4096, 4, None) == Shape(4, 1024, 2, 6, 96, 192)
    assert str(shape_of_model(tmp_path, "some_model", 4096, 1, 7)) == "4096 packed7 2/6 96/192"
    with pytest.raises(ValueError, match=r"bench.from_model=same_model is not there: .*did you mean some_model\?"):
        shape_of_model(tmp_path, "same_model", 4096, 4, None)
