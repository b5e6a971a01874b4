import math
import random
from collections import Counter, defaultdict

import pytest

from qlatrain.metrics import bigram
from qlatrain.metrics.bigram import BigramByteModel


def slow_bits_per_byte(training: list[str], validation: list[str]) -> float:
    """The formula of the module docstring, a byte at a time."""
    after, unigram = defaultdict(Counter), Counter()
    for document in training:
        context = "start"
        for byte in document.encode():
            after[context][byte] += 1
            unigram[byte] += 1
            context = byte
    total, bits, count = sum(unigram.values()), 0.0, 0
    for document in validation:
        context = "start"
        for byte in document.encode():
            p = (unigram[byte] + 1) / (total + 256)
            if context in after:
                seen = after[context]
                p = (seen[byte] + len(seen) * p) / (sum(seen.values()) + len(seen))
            bits, count, context = bits - math.log2(p), count + 1, byte
    return bits / count


@pytest.fixture(params=[1 << 22, 40], ids=["one block", "many blocks"])
def block(request, monkeypatch):
    monkeypatch.setattr(bigram, "_BLOCK", request.param)


def test_against_a_slow_one(block):
    words = ["alpha", "β", "gamma\n", " ", "naïve", "x", "日本"]
    rng = random.Random(0)
    documents = ["".join(rng.choices(words, k=rng.randrange(0, 30))) for _ in range(60)]
    validation = [*documents[50:], "unseen: ÿ€Q", "", "a"]
    assert BigramByteModel(documents[:50]).bits_per_byte(validation) == pytest.approx(
        slow_bits_per_byte(documents[:50], validation), rel=1e-12
    )


def test_probabilities_sum_to_one():
    assert BigramByteModel(["hello", "world"]).probabilities.sum(axis=1) == pytest.approx([1.0] * 257)


def test_known_texts():
    assert BigramByteModel(["ab" * 5000]).bits_per_byte(["ab" * 500]) < 0.02
    noise = random.Random(1).choices(range(128), k=200_000)
    text = bytes(noise).decode("ascii")
    assert BigramByteModel([text[:150_000]]).bits_per_byte([text[150_000:]]) == pytest.approx(7, abs=0.25)


def test_no_pair_across_documents():
    counts = bigram.pair_counts(["ab", "cd"])
    assert counts[ord("b"), ord("c")] == 0
    assert counts[bigram.START, ord("c")] == counts[bigram.START, ord("a")] == 1
    assert counts.sum() == 4


def test_nothing_to_count():
    with pytest.raises(ValueError, match="training text"):
        BigramByteModel([""])
    with pytest.raises(ValueError, match="no bytes"):
        BigramByteModel(["a"]).bits_per_byte([])
