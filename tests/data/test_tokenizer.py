import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlatrain.data import check_vocab, load_tokenizer

# Every byte that UTF-8 can hold: all of ASCII, two-, three- and four-byte characters with all lead bytes.
ALL_BYTES = "".join(map(chr, range(128))) + "".join(
    chr(point) for point in [*range(0x80, 0x800), *range(0x800, 0xD800, 97), *range(0xE000, 0x110000, 991)]
)
TEXTS = [
    "",
    "a",
    "def f():\n\treturn 'x'\r\n",
    " two  spaces ",
    "héllo wörld",
    "👩‍👩‍👧 🇳🇴 日本語",
    ALL_BYTES,
    "<|bos|>",
    "x<|eos|>y",
]


def byte_bpe(folder, special: dict[str, str]) -> str:
    """A small trained Hugging Face tokenizer with the special tokens given."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[*special.values(), "<|tool|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat, the hat"] * 3, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(str(folder))
    return str(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_the_utf8_bytes(text):
    ids = load_tokenizer("bytes").encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == [256, *text.encode(), 257]
    assert load_tokenizer("bytes").decode(ids) == text


def test_saved_bytes_tokenizer_opens_in_transformers_and_agrees(tmp_path):
    ours = load_tokenizer("bytes")
    ours.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert len(saved) == ours.vocab_size == 258
    assert (saved.bos_token_id, saved.eos_token_id) == (ours.bos_id, ours.eos_id) == (256, 257)
    assert set(ALL_BYTES.encode()) == set(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}
    for text in TEXTS:
        if "<|" not in text:  # outside training, special tokens in a text are special tokens
            assert saved.encode(text, add_special_tokens=False) == list(text.encode())
            assert saved.encode(text) == ours.encode_prompt(text).tolist() == [256, *text.encode()]
        ids = ours.encode(text)
        assert saved.decode(ids.tolist(), skip_special_tokens=True) == ours.decode(ids) == text
    assert [saved.convert_tokens_to_ids(saved.convert_ids_to_tokens(i)) for i in range(258)] == list(range(258))
    broken = [0xE2, 0x82, 65, 0xFF, 0x80, 0xF0, 0x9F, 0x98, 66, 0xC0]
    assert saved.decode(broken) == ours.decode(broken)


@pytest.mark.parametrize(
    ("special", "before", "after"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, "<s>", "</s>"),
        ({"eos_token": "</s>"}, "</s>", "</s>"),
        ({"bos_token": "<s>"}, "<s>", None),
        ({}, None, None),
    ],
)
def test_hugging_face_tokenizer_wraps_documents(tmp_path, special, before, after):
    folder = byte_bpe(tmp_path, special)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    text = "the cat 👩‍👧 sat"
    expected = theirs.encode(text, add_special_tokens=False)

    def ids_of(token: str | None) -> list[int]:
        return [] if token is None else [theirs.convert_tokens_to_ids(token)]

    expected = ids_of(before) + expected
    assert ours.encode_prompt(text).tolist() == expected
    expected += ids_of(after)
    ids = ours.encode(text)
    assert ids.dtype == np.int32 and ids.tolist() == expected
    assert ours.decode(ids) == text
    assert ours.count_bytes(ids) == len(text.encode())
    assert ours.vocab_size == len(theirs)
    ours.save_pretrained(tmp_path / "again")
    assert load_tokenizer(str(tmp_path / "again")).encode(text).tolist() == expected


def test_control_tokens_in_a_text_stay_text(tmp_path):
    assert (load_tokenizer("bytes").encode("a<|bos|><|eos|>")[1:-1] < 256).all()
    ours = load_tokenizer(byte_bpe(tmp_path, {"bos_token": "<s>", "eos_token": "</s>"}))
    text = "a</s> <s>b<|tool|>"
    ids = ours.encode(text)
    assert (ids[1:-1] > 2).all(), "the three special tokens are ids 0 to 2"
    assert ours.decode(ids) == text


def test_lone_surrogates_do_not_break_encoding(tmp_path):
    folder = byte_bpe(tmp_path, {})
    for name in ("bytes", folder):
        assert load_tokenizer(name).decode(load_tokenizer(name).encode("a\ud800b")) == "a?b"


def test_bad_tokenizers(tmp_path):
    with pytest.raises(ValueError, match=r"data\.tokenizer='.*nothing' could not be opened"):
        load_tokenizer(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"model\.vocab_size=257 is smaller than the 258"):
        check_vocab(load_tokenizer("bytes"), 257)
    check_vocab(load_tokenizer("bytes"), 258)
